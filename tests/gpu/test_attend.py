"""Fused attention on the GPU against float64, at the shapes of the CPU shim and at real lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_case import CASES, LONG, Case, build, log_tolerance, on_device

from kvqtool.fused import attend, new_workspace

pytestmark = pytest.mark.gpu
# Keys after rotation, queries and weights are rounded to fp16 (2**-11 each), sums are float32.
TOLERANCE = 2e-3


def error(case: Case) -> float:
    """Return the error over the greatest value, of the second launch on one workspace."""
    built = on_device(build(case), "cuda")
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = new_workspace(built.variant, built.query, case.num_kv_heads, blocks)
    log_sums = torch.full(built.log_sums.shape, torch.nan, device="cuda")
    arguments = (built.query, built.context, built.tables, built.variant)
    first = attend(*arguments, workspace)
    second = attend(*arguments, replace(workspace, log_sums=log_sums))
    torch.cuda.synchronize()
    assert torch.equal(first, second) or (first - second).abs().max() < 1e-3
    assert not workspace.counters.any()
    assert (log_sums.cpu().double() - built.log_sums).abs().max() < log_tolerance(built)
    return float((second.cpu().double() - built.expected).abs().max() / built.greatest_value)


@pytest.mark.parametrize("case", (*CASES, *LONG), ids=str)
def test_fused_attention_equals_float64(case: Case) -> None:
    assert error(case) < TOLERANCE
