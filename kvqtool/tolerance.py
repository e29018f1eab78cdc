"""QAQ's formulas: how far a key or a value may be off, and the bits that keep it there
(arXiv 2403.04643).

    keys    sigma_K^2 = ln(T^3 / (T - 1) * sigma_S^2 + 1) / |Q|^2
    values  sigma_V   = sigma_X / (sqrt(T) S)
    bits    B = ceil(log2(range / (2 sqrt(3) sigma)))

T tokens are attended to, S is a token's predicted attention weight, Q the query as it meets the
keys, its softmax scale included. `released` is what the authors' code computes instead
(ClubieDong/QAQ-KVCacheQuantization at f8d47e0): twice the step, one added inside the logarithm, and
a constant for |Q|^2.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from kvqtool.side import WIDTHS

RELEASED_QUERY_NORM: Final = 300.0


def key_tolerance(tokens: Tensor, budget: float, query_norm: Tensor | float) -> Tensor:
    """Return sigma_K, the standard deviation that a key's numbers may be off by.

    Args:
        tokens: T, the tokens attended to; one token counts as two.
        budget: sigma_S, the standard deviation allowed in an attention weight.
        query_norm: |Q|^2, broadcast against `tokens`.
    """
    count = tokens.double().clamp_min(2.0)
    growth = count**3 / (count - 1) * budget**2
    return (torch.log1p(growth) / query_norm).sqrt()


def value_tolerance(tokens: Tensor, budget: float, attention: Tensor) -> Tensor:
    """Return sigma_V, the standard deviation that a value's numbers may be off by.

    Args:
        tokens: T, the tokens attended to.
        budget: sigma_X, the standard deviation allowed in a coordinate of the output.
        attention: S, a token's predicted weight; infinite tolerance at 0.
    """
    return budget / (tokens.double().sqrt() * attention.double())


def needed_bits(spread: Tensor, sigma: Tensor, formula: str = "paper") -> Tensor:
    """Return the real number of bits that a range asks for, before it is rounded up.

    Args:
        spread: width of the range, not negative.
        sigma: the tolerance.
        formula: `paper`, or `released` for the released code's arithmetic.
    """
    cells = spread.double() / (2 * math.sqrt(3) * sigma)
    if formula == "released":
        return torch.log2(cells / 2 + 1)
    return torch.log2(cells)


def stored_width(bits: Tensor) -> Tensor:
    """Return the least of WIDTHS that holds so many bits, uint8; the greatest where none does."""
    ends = torch.tensor(WIDTHS[:-1], dtype=torch.float64, device=bits.device)
    widths = torch.tensor(WIDTHS, dtype=torch.uint8, device=bits.device)
    return widths[torch.bucketize(bits.double(), ends)]
