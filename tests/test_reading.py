"""The torch reference of the kernels against float64 attention on what the codec decodes."""

from __future__ import annotations

import pytest
import torch
from attention_case import CASES, Case, build

from kvqtool.reading import attend_reference

# Keys, their scales and outliers' deltas are rounded to fp16 (2**-11 each), the output too.
TOLERANCE = 2e-3
# The greatest scores of these cases are about 10, of rounded keys: 10 * 2**-11.
LOG_TOLERANCE = 5e-3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_float64(case: Case) -> None:
    built = build(case)
    log_sums = torch.empty(built.log_sums.shape)
    out = attend_reference(built.query, built.context, built.tables, built.variant, log_sums)
    assert (out.double() - built.expected).abs().max() < TOLERANCE * built.greatest_value
    assert (log_sums.double() - built.log_sums).abs().max() < LOG_TOLERANCE
