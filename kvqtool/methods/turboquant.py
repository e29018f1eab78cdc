"""tq: a token's norm, and the optimal levels of a normal distribution for its rotated coordinates,
after TurboQuant (arXiv 2504.19874, the quantizer for mean squared error).

A vector that is rotated at random and divided by its norm has coordinates that are nearly normal
with variance 1 / d, whatever the vector was. So one codebook known beforehand serves all, and
nothing needs calibration. Here the rotation is a Hadamard matrix behind fixed random signs, and d
is N of `-gN`: a norm every N channels, in fp16 as root mean square.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from statistics import NormalDist
from typing import Final

import torch
from torch import Tensor

from kvqtool.bits import pack_codes, unpack_words
from kvqtool.codebook import Codebook, as_half
from kvqtool.codec import nearest_level
from kvqtool.histogram import LevelHistogram
from kvqtool.memory import groups_per_token
from kvqtool.methods.base import Method
from kvqtool.side import QuantSpec

_ROUNDS: Final = 4000  # of Lloyd's algorithm; 16 levels have settled to 1e-12 by then


class TurboQuantMethod(Method):
    """Lloyd-Max levels of a normal distribution, scaled by each token's root mean square."""

    name = "tq"
    summary = "Lloyd-Max levels of a normal distribution over randomly rotated heads, and a norm"
    paper = "https://arxiv.org/abs/2504.19874"

    def fit(self, spec: QuantSpec, histogram: LevelHistogram | None) -> tuple[Tensor, Tensor]:
        """Return the levels of a standard normal distribution; data does not matter."""
        levels = as_half(torch.tensor(lloyd_max_levels(spec.bits), dtype=torch.float64))
        return levels, levels

    def quantize(self, states: Tensor, codebook: Codebook, spec: QuantSpec) -> dict[str, Tensor]:
        """Encode rotated rows, (rows, channels) float32: `words` and `norms`."""
        groups = groups_per_token(spec, states.shape[1])
        grouped = states.contiguous().view(len(states), groups, states.shape[1] // groups)
        norms = as_half(grouped.square().mean(-1).sqrt())
        inverse = torch.where(norms > 0, 1.0 / norms, torch.zeros_like(norms))
        normalized = (grouped * inverse[..., None]).view(states.shape)
        codes = nearest_level(normalized, codebook.levels)
        return {"words": pack_codes(codes, spec.bits), "norms": norms.half()}

    def dequantize(
        self, buffers: dict[str, Tensor], codebook: Codebook, spec: QuantSpec, channels: int
    ) -> Tensor:
        """Decode rotated rows, (rows, channels) float32."""
        codes = unpack_words(buffers["words"], spec.bits, channels)
        levels = codebook.decode_levels.index_select(0, codes.flatten())
        norms = buffers["norms"].float()
        grouped = levels.view(*norms.shape, channels // norms.shape[1])
        return (grouped * norms[..., None]).view(codes.shape)


@cache
def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """Return the 2**bits levels of least mean squared error for a standard normal variable.

    Lloyd's algorithm (Max 1960): thresholds halfway between levels, levels at the means of what
    lies between thresholds, (pdf(a) - pdf(b)) / (cdf(b) - cdf(a)).
    """
    normal, count = NormalDist(), 1 << bits
    levels = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    for _ in range(_ROUNDS):
        middles = [(a + b) / 2 for a, b in pairwise(levels)]
        ends = [-math.inf, *middles, math.inf]
        density, mass = [normal.pdf(x) for x in ends], [_mass_below(x) for x in ends]
        levels = [(density[i] - density[i + 1]) / (mass[i + 1] - mass[i]) for i in range(count)]
    return tuple((b - a) / 2 for a, b in zip(levels, reversed(levels), strict=True))[::-1]


def _mass_below(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))
