"""Hadamard rotation of value heads: every channel of a head becomes a mixture of all of them, so
that none stands out and a token's outliers cost it little (QuaRot, arXiv 2404.00456, for values).

The rotation is symmetric and orthogonal: it is its own inverse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
