"""nf: NormalFloat levels, quantiles of a normal distribution (QLoRA, arXiv 2305.14314; KVQuant's nf
baseline).
"""

from __future__ import annotations

from torch import Tensor

from kvqtool.codebook import as_half, normalfloat_levels
from kvqtool.histogram import LevelHistogram
from kvqtool.methods.base import Method
from kvqtool.side import QuantSpec


class NormalFloatMethod(Method):
    """Levels at normal quantiles."""

    name = "nf"
    summary = "NormalFloat levels over a vector's range"
    paper = "https://arxiv.org/abs/2305.14314"

    def fit(self, spec: QuantSpec, histogram: LevelHistogram | None) -> tuple[Tensor, Tensor]:
        """Return the NormalFloat levels; data does not matter."""
        levels = as_half(normalfloat_levels(spec.bits))
        return levels, levels
