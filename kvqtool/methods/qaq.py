"""qaq: QAQ's mid-point quantizer (arXiv 2403.04643), per token, keys after RoPE.

A vector's range without its outliers is cut into 2**B equal cells and every number becomes its
cell's middle, so that rounding errs by at most half a cell, range / 2**(B+1).
"""

from __future__ import annotations

from torch import Tensor

from kvqtool.codebook import as_half, midpoint_levels
from kvqtool.histogram import LevelHistogram
from kvqtool.methods.base import Method
from kvqtool.side import QuantSpec


class QaqMethod(Method):
    """Levels in the middle of equal cells."""

    name = "qaq"
    summary = "QAQ: middles of equal cells of a token's range; keys after RoPE"
    paper = "https://arxiv.org/abs/2403.04643"

    def fit(self, spec: QuantSpec, histogram: LevelHistogram | None) -> tuple[Tensor, Tensor]:
        """Return the mid-points; data does not matter."""
        levels = as_half(midpoint_levels(spec.bits))
        return levels, levels
