"""The appending kernel on the GPU writes what packing at once does, in a graph too."""

from __future__ import annotations

import pytest
import torch
from moved import moved
from packing_case import PackCase, append_all, build_pack, same_lists

from kvqtool.cuda import run_on_gpu

pytestmark = pytest.mark.gpu
CASES = (
    PackCase("nuq4-1%", tokens=140, num_kv_heads=8, batch=2),
    PackCase("nuq3-1%", tokens=70, num_kv_heads=32, tied=True),
    PackCase("nuq2-1%-pc", tokens=66, head_dim=64, bfloat16=True),
    PackCase("nuq3-1%-pc-comp/nuq3-1%-comp", tokens=140, num_kv_heads=8, batch=2),
    PackCase("nuq4-1%-comp/nuq2-5%-comp", tokens=66, head_dim=64, bfloat16=True, tied=True),
    PackCase("nuq3-1%-comp/nuq4-1%-comp", tokens=66, head_dim=256, num_kv_heads=1),
    PackCase("nuq3-1%/nuq3-1%-vrot-comp", tokens=66, num_kv_heads=8, batch=2),
    PackCase("nuq4-1%-comp/nuq2-5%-vrot", tokens=66, head_dim=96, tied=True),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_by_token_equals_all_at_once(case: PackCase) -> None:
    built = build_pack(case)
    growing = append_all(moved(built, "cuda"), run_on_gpu, room=(8192, 8192))  # any slab's fit
    pages = moved(growing.pages, "cpu")
    assert not growing.dropped.any()
    assert torch.equal(pages.slabs, built.expected.pages.slabs)
    assert torch.equal(pages.ranges, built.expected.pages.ranges)
    same_lists(pages, built.expected.pages)
