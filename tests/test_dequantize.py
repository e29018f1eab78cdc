"""The dequantizing kernel, compiled for the CPU, against the torch reference."""

from __future__ import annotations

import pytest
from attention_case import CASES, Case, build
from shim.build import HAS_COMPILER, mostly_slow, run_on_cpu

from kvqtool.reading import decode_pages, dequantize

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed")
QUICK = (Case("nuq4-1%", (130,), sinks=5, bfloat16=True),)


def same(case: Case) -> None:
    """Raise unless keys and values are the reference's, rounded to the dtype."""
    built = build(case)
    dtype = built.query.dtype
    found = dequantize(built.context, built.tables, built.variant, dtype, run_on_cpu)
    wanted = decode_pages(built.context, built.tables, built.variant)
    for b, length in enumerate(case.lengths):
        for left, right in zip(found, wanted, strict=True):
            kept = left[b, :, :length].float(), right[b, :, :length].to(dtype).float()
            # The sine of an angle is off by a few 1e-6 at most: half a unit of the last place here.
            step = 2.0**-7 if case.bfloat16 else 2.0**-10
            assert ((kept[0] - kept[1]).abs() <= step * kept[1].abs() + 1e-3).all()


@pytest.mark.parametrize("case", mostly_slow(QUICK, [c for c in CASES if c.group == 1]), ids=str)
def test_kernel_equals_the_reference(case: Case) -> None:
    same(case)
