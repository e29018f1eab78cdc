"""had: uniform levels over heads rotated by a Hadamard matrix, what QuaRot (arXiv 2404.00456) and
INT4 caches with block-diagonal rotations do.

A rotation spreads a channel that stands out over its whole head, so that a token's own range,
`-gN` for one every N channels, serves all of them. `-gN` with N the head's width is the common
form: a scale and an offset per token and head.
"""

from __future__ import annotations

from torch import Tensor

from kvqtool.codebook import as_half, uniform_levels
from kvqtool.histogram import LevelHistogram
from kvqtool.methods.base import Method
from kvqtool.side import QuantSpec


class HadamardMethod(Method):
    """Equally spaced levels of rotated heads."""

    name = "had"
    summary = "uniform levels over heads rotated by a Hadamard matrix"
    paper = "https://arxiv.org/abs/2404.00456"

    def fit(self, spec: QuantSpec, histogram: LevelHistogram | None) -> tuple[Tensor, Tensor]:
        """Return the uniform levels; data does not matter."""
        levels = as_half(uniform_levels(spec.bits))
        return levels, levels
