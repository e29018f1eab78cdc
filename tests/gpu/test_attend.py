"""Fused attention on the GPU against float64, at the shapes of the CPU shim and at real lengths."""

from __future__ import annotations

import pytest
import torch
from attention_case import CASES, LONG, Case, build, on_device

from kvqtool.fused import attend, new_workspace

pytestmark = pytest.mark.gpu
# Keys after rotation, queries and weights are rounded to fp16 (2**-11 each), sums are float32.
TOLERANCE = 2e-3


def error(case: Case) -> float:
    """Return the error over the greatest value, of the second launch on one workspace."""
    built = on_device(build(case), "cuda")
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = new_workspace(built.variant, built.query, case.num_kv_heads, blocks)
    arguments = (built.query, built.context, built.tables, built.variant, workspace)
    first, second = attend(*arguments), attend(*arguments)
    torch.cuda.synchronize()
    assert torch.equal(first, second) or (first - second).abs().max() < 1e-3
    assert not workspace.counters.any()
    return float((second.cpu().double() - built.expected).abs().max() / built.greatest_value)


@pytest.mark.parametrize("case", (*CASES, *LONG), ids=str)
def test_fused_attention_equals_float64(case: Case) -> None:
    assert error(case) < TOLERANCE
