"""Hadamard rotation of heads: every channel of a head becomes a mixture of all of them, so
that none stands out and a token's outliers cost it little (QuaRot, arXiv 2404.00456).

The rotation is symmetric and orthogonal: it is its own inverse.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from kvqtool.side import NORMED, QuantSpec


def turn(states: Tensor, spec: QuantSpec) -> Tensor:
    """Rotate heads as a side's scheme asks.

    Args:
        states: (..., head_dim) float32, keys or values.
        spec: the side's scheme.

    Returns:
        The same shape; the states themselves where the scheme does not rotate.
    """
    if not spec.rotated:
        return states
    return rotate_heads(states * _signs(states) if spec.method == NORMED else states)


def turn_back(states: Tensor, spec: QuantSpec) -> Tensor:
    """Undo `turn`, to within rounding."""
    if not spec.rotated:
        return states
    turned = rotate_heads(states)
    return turned * _signs(states) if spec.method == NORMED else turned


def _signs(states: Tensor) -> Tensor:
    """Return (head_dim,) signs drawn once and for all: the bits of a hash of the width."""
    head_dim = states.shape[-1]
    digest = hashlib.shake_256(f"kvqtool signs {head_dim}".encode()).digest(head_dim)
    return torch.tensor([1.0 - 2.0 * (byte & 1) for byte in digest], device=states.device)


def rotate_heads(states: Tensor) -> Tensor:
    """Rotate heads by a normalised Hadamard matrix; doing it twice gives the states back.

    Args:
        states: (..., head_dim) float32. A head_dim that is no power of two is rotated in blocks of
            the greatest power of two that divides it.

    Returns:
        The same shape. Sums run in the order of the fast Walsh-Hadamard transform, one float32
        operation each, then one product with 1 / sqrt(block).
    """
    head_dim = states.shape[-1]
    block = head_dim & -head_dim
    turned = states.reshape(-1, block)
    half = 1
    while half < block:
        pairs = turned.view(len(turned), -1, 2, half)
        left, right = pairs[:, :, 0], pairs[:, :, 1]
        turned = torch.stack([left + right, left - right], dim=2).view(len(turned), block)
        half *= 2
    return (turned * (1.0 / math.sqrt(block))).view(states.shape)
