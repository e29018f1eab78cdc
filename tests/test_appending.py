"""The appending kernel, compiled for the CPU: token by token it writes what packing does."""

from __future__ import annotations

import pytest
import torch
from packing_case import PackCase, append_all, build_pack, lists_of, same_lists
from shim.build import HAS_COMPILER, mostly_slow, run_on_cpu

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed")
CASES = (
    PackCase("nuq4-1%", tokens=20, num_kv_heads=1),
    PackCase("nuq3-1%", tokens=66, num_kv_heads=1),
    PackCase("nuq2-1%-pc", tokens=18, batch=2),
    PackCase("nuq3-5%", tokens=10, tied=True, bfloat16=True),
    PackCase("int4", tokens=5, head_dim=64, layout="interleaved"),
    PackCase("nuq3-1%-postrope", tokens=5, head_dim=96),
    PackCase("nuq3-1%-pc-comp/nuq3-1%-comp", tokens=6, batch=2),
    PackCase("nuq2-5%-comp/nuq4-1%", tokens=5, layout="interleaved", head_dim=64),
    PackCase("nuq4-1%-postrope/nuq2-5%-qnorm-comp", tokens=5, bfloat16=True, tied=True),
    PackCase("nuq4-1%-qnorm-comp/nuq3-comp", tokens=5, head_dim=96),
    PackCase("nuq8-1%/int8", tokens=6, head_dim=64),
    PackCase("nuq8-1%/nuq2-1%-comp", tokens=5, head_dim=64),
    PackCase("nuq3-1%-comp/nuq8-1%", tokens=5, head_dim=64),
    PackCase("nuq3-pc-comp/nuq4-1%-comp", tokens=6, head_dim=64),
    PackCase("nuq3-1%/nuq3-1%-vrot", tokens=6, batch=2),
    PackCase("nuq4-1%/nuq2-5%-vrot-comp", tokens=5, head_dim=96, tied=True),
    PackCase("nuq3-1%-comp/nf4-vrot", tokens=5, head_dim=64, num_kv_heads=3, bfloat16=True),
    PackCase("nuq3-1%-comp/nuq4-1%-comp", tokens=4, head_dim=256, num_kv_heads=1),
)


@pytest.mark.parametrize("case", mostly_slow((CASES[1], CASES[6], CASES[11]), CASES), ids=str)
def test_token_by_token_equals_all_at_once(case: PackCase) -> None:
    built = build_pack(case)
    growing = append_all(built, run_on_cpu, room=(1024, 1024))
    assert torch.equal(growing.pages.slabs, built.expected.pages.slabs)
    assert torch.equal(growing.pages.ranges, built.expected.pages.ranges)
    same_lists(growing.pages, built.expected.pages)
    assert not growing.dropped.any()


def test_outliers_without_room_are_counted() -> None:
    built = build_pack(PackCase("nuq3-5%", tokens=10, num_kv_heads=1))
    growing = append_all(built, run_on_cpu, room=(4, 4))
    lost = sum(max(len(words) - 4, 0) for words in lists_of(built.expected.pages))
    assert lost > 0
    assert int(growing.dropped) == lost
    assert int(growing.pages.outlier_index[..., 1::2].max()) == 1
