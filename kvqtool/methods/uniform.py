"""int: asymmetric uniform quantization with a float offset, the baseline of every KV-cache paper.

u in [-1, 1] is rounded to 2**bits equally spaced levels, the range's ends among them. The offset is
not rounded to an integer (KVQuant's released `quant_fn_zp` without --clamp), which matters for
channels of one sign.
"""

from __future__ import annotations

from torch import Tensor

from kvqtool.codebook import as_half, uniform_levels
from kvqtool.histogram import LevelHistogram
from kvqtool.methods.base import Method
from kvqtool.side import QuantSpec


class UniformMethod(Method):
    """Equally spaced levels."""

    name = "int"
    summary = "uniform levels between a vector's least and greatest value"
    paper = "https://arxiv.org/abs/2401.18079 (baseline)"

    def fit(self, spec: QuantSpec, histogram: LevelHistogram | None) -> tuple[Tensor, Tensor]:
        """Return the uniform levels; data does not matter."""
        levels = as_half(uniform_levels(spec.bits))
        return levels, levels
