"""Sources are found and put together; without a GPU or CuPy one sentence says so."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvqtool.cuda import Kernel, kernel_folder, load_kernel, run_on_gpu, source_text, unavailable
from kvqtool.errors import InputError, RunError
from kvqtool.variant import Variant

ROOT = Path(__file__).parents[1]
SOURCES = (
    "append",
    "attend",
    "compensate",
    "dequantize",
    "floats",
    "layout",
    "lists",
    "matvec",
    "pack",
    "survey",
)


def test_a_checkout_reads_its_own_sources() -> None:
    assert kernel_folder() == ROOT / "kernels"


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_holds_every_header_once(name: str) -> None:
    text = source_text(name)
    assert '#include "device.cuh"' not in text
    assert text.count("// Warp operations, tensor-core steps") == 1
    assert "#pragma once" not in text


def test_every_source_of_the_folder_is_known() -> None:
    sources = {path.stem for path in (ROOT / "kernels").glob("*.cu")}
    assert sources == set(SOURCES)
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
    with pytest.raises(InputError, match="not 5"):
        Variant(128, 5, 4, False, True, True, 1)


@pytest.mark.parametrize(("needed", "refused"), [(166_000, True), (160_000, False)])
def test_a_gpu_with_less_shared_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, needed: int, refused: bool
) -> None:
    runtime = SimpleNamespace(
        deviceGetAttribute=lambda attribute, device: {97: 164_000}[attribute],
        CUDARuntimeError=RuntimeError,
    )
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    reason = unavailable(torch.device("cuda", 0), needed)
    wanted = "the kernel needs 166000 bytes of shared memory, this GPU has 164000"
    assert reason == (wanted if refused else None)
