"""Packing kernels, compiled for the CPU, against the codec: the same bits."""

from __future__ import annotations

import pytest
import torch
from packing_case import CASES, PackCase, build_pack, same_pages
from shim.build import HAS_COMPILER, mostly_slow, run_on_cpu

from kvqtool.packing import pack

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed")


QUICK = (PackCase("nuq4-5%/nuq2-1%", batch=3, tokens=66), PackCase(bfloat16=True, tied=True))


@pytest.mark.parametrize("case", mostly_slow(QUICK, CASES), ids=str)
def test_packed_pages_equal_the_codec_bit_for_bit(case: PackCase) -> None:
    built = build_pack(case)
    pages = pack(built.states, built.turns, built.code, built.tables, built.variant, run_on_cpu)
    same_pages(pages, built.expected)


def test_pages_hold_outliers() -> None:
    built = build_pack(PackCase())
    assert torch.count_nonzero(built.expected.outlier_words) > 100
