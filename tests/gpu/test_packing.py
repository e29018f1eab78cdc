"""Packing kernels on the GPU against the codec on the CPU: the same bits."""

from __future__ import annotations

import pytest
from moved import moved
from packing_case import CASES, PackCase, build_pack, same_packed

from kvqtool.packing import pack

pytestmark = pytest.mark.gpu
LONG = (
    PackCase("nuq4-1%", tokens=2000, num_kv_heads=8, batch=2),
    PackCase("nuq3-1%", tokens=1000, num_kv_heads=32, tied=True),
    PackCase("nuq3-1%-pc-comp/nuq3-1%-comp", tokens=1000, num_kv_heads=8, batch=2),
    PackCase("nuq3-1%-comp/nuq3-1%-vrot-comp", tokens=1000, num_kv_heads=8, batch=2),
)


def check(case: PackCase) -> None:
    """Pack on the GPU and compare."""
    built = build_pack(case)
    there = moved(built, "cuda")
    found = pack(there.prompt, there.turns, there.code, there.tables, there.variant)
    same_packed(moved(found, "cpu"), built.expected)


@pytest.mark.parametrize("case", (*CASES, *LONG), ids=str)
def test_packed_pages_equal_the_codec_bit_for_bit(case: PackCase) -> None:
    check(case)
