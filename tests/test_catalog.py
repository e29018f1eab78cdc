"""The catalog: every row usable, sourced and unlike the number on the box where that differs."""

import pytest

from kvqtool.catalog import GPUS, find_gpu
from kvqtool.errors import InputError

GIB = 2**30
WANTED = (
    *("t4", "v100-16", "v100-32", "rtx-3090", "rtx-4090", "rtx-5090", "rtx-6000-ada", "a10", "l4"),
    *("l40s", "a100-40", "a100-80", "h100", "h100-pcie", "h100-nvl", "h200", "gh200", "b200"),
    *("b300", "mi300x", "mi325x", "mi355x", "rtx-pro-6000", "m3-ultra-512", "m4-max-128"),
)


def test_every_row_is_usable_and_says_where_it_is_from() -> None:
    names = [gpu.name for gpu in GPUS]
    assert len(set(names)) == len(names)
    assert set(WANTED) <= set(names)
    for gpu in GPUS:
        assert gpu.source.startswith("https://")
        assert 8 * GIB < gpu.memory_bytes < 400 * GIB
        assert 1e11 <= gpu.bandwidth <= 9e12


def test_memory_is_what_drivers_report() -> None:
    assert find_gpu("h100").memory_bytes == 81559 << 20
    assert find_gpu("b300").memory_bytes / GIB == pytest.approx(268.6, abs=0.1)  # 288 GB on the box
    assert find_gpu("m4-max-128").memory_bytes == 96 * GIB


@pytest.mark.parametrize("name", ["H100", "rtx 4090", "RTX-4090", "a10080", "M3 Ultra 512"])
def test_names_are_found_however_they_are_written(name: str) -> None:
    assert find_gpu(name) in GPUS


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'gtx-9' is not in the catalog; use --gpu-memory.*h100"):
        find_gpu("gtx-9")
