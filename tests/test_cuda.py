"""Sources are found and put together; without a GPU or CuPy one sentence says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from attention_case import Case, build

from kvqtool.cuda import Kernel, kernel_folder, load_kernel, run_on_gpu, source_text, unavailable
from kvqtool.errors import InputError, RunError
from kvqtool.fused import Variant, attend, new_workspace

ROOT = Path(__file__).parents[1]


def test_a_checkout_reads_its_own_sources() -> None:
    assert kernel_folder() == ROOT / "kernels"


@pytest.mark.parametrize("name", ["attend", "pack", "append", "dequantize"])
def test_a_source_holds_every_header_once(name: str) -> None:
    text = source_text(name)
    assert '#include "device.cuh"' not in text
    assert text.count("// Warp operations, tensor-core steps") == 1
    assert "#pragma once" not in text


def test_every_source_of_the_folder_is_known() -> None:
    sources = {path.stem for path in (ROOT / "kernels").glob("*.cu")}
    assert sources == {"attend", "pack", "append", "dequantize"}
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.cu`" in page for name in sources)


def test_a_cpu_is_refused_with_one_sentence() -> None:
    reason = unavailable(torch.device("cpu"))
    assert reason == "the kernels run on CUDA devices, not on cpu"
    with pytest.raises(RunError, match="not on cpu"):
        run_on_gpu(Kernel("attend", "attend", ()), (1, 32, 0), [torch.zeros(1)])


def test_a_missing_cupy_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RunError, match=r"cupy is not installed; install kvqtool\[cuda12\]"):
        load_kernel(Kernel("attend", "attend", (("X", 1),)), 0, 0)


def test_an_unknown_head_size_or_width_is_refused() -> None:
    with pytest.raises(InputError, match="not 80"):
        Variant(80, 4, 4, False, True, True, 1)
    with pytest.raises(InputError, match="not 8"):
        Variant(128, 8, 4, False, True, True, 1)


def test_a_query_of_another_shape_is_refused() -> None:
    built = build(Case("nuq4-1%", (20,)))
    workspace = new_workspace(built.variant, built.query, 2, blocks=1)
    arguments = (built.context, built.tables, built.variant, workspace)
    with pytest.raises(InputError, match=r"expected a contiguous torch.float16 query of 128"):
        attend(built.query.float(), *arguments)
    with pytest.raises(InputError, match="state row for each of 2 sequences"):
        attend(built.query.repeat(2, 1, 1), *arguments)
