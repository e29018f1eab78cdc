"""How kernels turn keys by their position: tables of angles, and polynomials in their place.

Between the places of a page a slow pair of channels turns so little that a few Chebyshev
polynomials of the place give its angles' cosine and sine (Jacobi and Anger's expansion):

    cos(x t) = J_0(x) - 2 J_2(x) T_2(t) + 2 J_4(x) T_4(t) - ...
    sin(x t) = 2 J_1(x) T_1(t) - 2 J_3(x) T_3(t) + ...            -1 <= t <= 1

Kernels then turn the query once a page and multiply keys as they lie (kernels/attend_terms.cuh).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

import torch
from torch import Tensor

from kvqtool.memory import PAGE_TOKENS

MIDDLE: Final = PAGE_TOKENS // 2  # of a page: places are counted from here
TERMS: Final = 8  # T_0 to T_7
STEP_PAIRS: Final = 8  # pairs of channels of a tensor-core step
# Angles that polynomials give may be off by this share of half the mean distance of a code's
# levels, 2 to 4 bits alike.
_SHARE: Final = 1 / 30
_NODES: Final = 64


def angle_table(inv_freq: Tensor) -> Tensor:
    """Return cosines and sines of a page's places from its middle, in the order of key fragments.

    Args:
        inv_freq: (head_dim / 2,) radians a token of each pair, float64; 0 where nothing turns.

    Returns:
        (8 tiles, steps, 32 lanes, rows r and r + 8, cosine and sine, 2 places) float16.
    """
    places = torch.arange(PAGE_TOKENS, dtype=torch.float64)[:, None] - MIDDLE
    phase = places * inv_freq.cpu().double()
    turns = torch.stack([phase.cos(), phase.sin()], dim=-1).half()
    # (tile, r + 8, r, step, column, half, which) -> (tile, step, r, column, r + 8, which, half)
    split = turns.view(PAGE_TOKENS // 16, 2, 8, len(inv_freq) // 8, 4, 2, 2)
    return split.permute(0, 3, 2, 4, 1, 6, 5).flatten(2, 3).contiguous()


def frequency_table(inv_freq: Tensor) -> Tensor:
    """Return turns a token times 2**64, whole turns dropped, as bits of (head_dim / 2,) int64.

    A position times this number, modulo 2**64, is its phase to 2**-64 of a turn a token.
    """
    turns = [round(Fraction(f) / Fraction(math.tau) * 2**64) for f in inv_freq.double().tolist()]
    return torch.tensor([(turn + 2**63) % 2**64 - 2**63 for turn in turns], dtype=torch.int64)


def coefficients(inv_freq: Tensor) -> Tensor:
    """Return what T_0 to T_7 of a place are multiplied with: even ones make a pair's cosine, odd
    ones its sine.

    Args:
        inv_freq: (pairs,) radians a token.

    Returns:
        (pairs, 8) float64.
    """
    theta = (torch.arange(_NODES, dtype=torch.float64) + 0.5) * (math.pi / _NODES)
    phase = MIDDLE * inv_freq.cpu().double()[:, None] * theta.cos()
    order = torch.arange(TERMS, dtype=torch.float64)[:, None]
    basis = (order * theta).cos().T * (2 / _NODES)  # (nodes, terms)
    basis[:, 0] /= 2
    return torch.where(torch.arange(TERMS) % 2 == 0, phase.cos() @ basis, phase.sin() @ basis)


def coefficient_table(inv_freq: Tensor) -> Tensor:
    """Return `coefficients` as the kernel reads them, (head_dim / 4, 8, 2 pairs) float16."""
    return coefficients(inv_freq).half().view(-1, 2, TERMS).transpose(1, 2).contiguous()


def turned_steps(inv_freq: Tensor, group: int, bits: int) -> int:
    """Return how many tensor-core steps, from the first on, need keys turned token by token: some
    pair of theirs, or of a later step, turns too fast for the polynomials that a warp has room for.

    Args:
        inv_freq: (head_dim / 2,) radians a token.
        group: query heads that a warp takes at once; they share eight columns.
        bits: of keys.
    """
    places = (torch.arange(PAGE_TOKENS, dtype=torch.float64) - MIDDLE) / MIDDLE
    terms = TERMS // group
    basis = (torch.arange(TERMS, dtype=torch.float64)[:, None] * places.acos()).cos()
    weights = coefficients(inv_freq)
    exact = MIDDLE * inv_freq.cpu().double()[:, None] * places
    cosine, sine = (weights[:, k:terms:2] @ basis[k:terms:2] for k in (0, 1))
    error = torch.hypot(cosine - exact.cos(), sine - exact.sin()).amax(1)
    (fast,) = torch.nonzero(error > _SHARE / (1 << max(bits, 4)), as_tuple=True)
    return int(fast[-1]) // STEP_PAIRS + 1 if len(fast) else 0
