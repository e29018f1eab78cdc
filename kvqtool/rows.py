"""Between a model's tensors (batch, heads, tokens, head_dim) and stored rows, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.methods import get_method
from kvqtool.side import EXACT
from kvqtool.spec import KvSpec

Pair = tuple[Tensor, Tensor]
Rows = dict[str, Tensor]


def to_rows(states: Tensor) -> Tensor:
    """(B, H, T, D) -> (T, B, H, D) float32: the order rows are stored in."""
    return states.permute(2, 0, 1, 3).float()


def from_rows(states: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, B, H, D) -> (B, H, T, D) in the model's dtype."""
    return states.permute(1, 2, 0, 3).to(dtype)


def join(left: Pair, right: Pair) -> Pair:
    """Put keys and values of later tokens behind those of earlier ones, (B, H, T, D) each."""
    return torch.cat([left[0], right[0]], dim=2), torch.cat([left[1], right[1]], dim=2)


def encode_pair(
    states: Pair, spec: KvSpec, codebooks: tuple[Codebook, Codebook], dtype: torch.dtype
) -> tuple[Rows, Rows]:
    """Encode rows of keys and values, (rows, channels) float32 each; fp keeps them in `dtype`."""
    key, value = (
        get_method(quant.method).quantize(
            side.to(dtype) if quant.method == EXACT else side, book, quant
        )
        for side, quant, book in zip(states, (spec.key, spec.value), codebooks, strict=True)
    )
    return key, value


def decode_pair(
    rows: tuple[Rows, Rows],
    spec: KvSpec,
    codebooks: tuple[Codebook, Codebook],
    channels: tuple[int, int],
) -> Pair:
    """Decode what `encode_pair` gave."""
    sides = zip(rows, (spec.key, spec.value), codebooks, channels, strict=True)
    key, value = (
        get_method(quant.method).dequantize(side, book, quant, count)
        for side, quant, book, count in sides
    )
    return key, value
