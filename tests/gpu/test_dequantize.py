"""The dequantizing kernel on the GPU against the torch reference on the CPU."""

from __future__ import annotations

import pytest
import torch
from attention_case import CASES, Case, build, on_device

from kvqtool.reading import decode_pages, dequantize

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", [c for c in CASES if c.group == 1], ids=str)
def test_kernel_equals_the_reference(case: Case) -> None:
    built = build(case)
    wanted = decode_pages(built.context, built.tables, built.variant)
    moved = on_device(built, "cuda")
    dtype = built.query.dtype
    found = dequantize(moved.context, moved.tables, built.variant, dtype)
    torch.cuda.synchronize()
    step = 2.0**-7 if case.bfloat16 else 2.0**-10  # a unit of the last place
    for b, length in enumerate(case.lengths):
        for left, right in zip(found, wanted, strict=True):
            kept = left[b, :, :length].cpu().float(), right[b, :, :length]
            assert ((kept[0] - kept[1]).abs() <= step * kept[1].abs() + 1e-3).all()
