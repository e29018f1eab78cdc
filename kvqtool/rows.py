"""Between a model's tensors (batch, heads, tokens, head_dim) and stored rows, token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.errors import RunError
from kvqtool.hadamard import turn, turn_back
from kvqtool.methods import get_method
from kvqtool.side import EXACT
from kvqtool.spec import KvSpec

Pair = tuple[Tensor, Tensor]
Rows = dict[str, Tensor]


def to_rows(states: Tensor) -> Tensor:
    """(B, H, T, D) -> (T, B, H, D) float32: the order rows are stored in."""
    return states.permute(2, 0, 1, 3).float()


def by_group(states: Tensor, size: int | None) -> Tensor:
    """(T, B, C) -> (T * B, C) in the order of `PackedBody`: by token, or by group of `size` tokens
    and then by sequence.
    """
    tokens, batch, channels = states.shape
    size = size or 1
    grouped = states.reshape(tokens // size, size, batch, channels).transpose(1, 2)
    return grouped.reshape(tokens * batch, channels)


def by_token(rows: Tensor, batch: int, size: int | None) -> Tensor:
    """(T * B, C) -> (T, B, C): the inverse of `by_group`."""
    channels, size = rows.shape[1], size or 1
    grouped = rows.view(len(rows) // (batch * size), batch, size, channels)
    return grouped.transpose(1, 2).reshape(-1, batch, channels)


def from_rows(states: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, B, H, D) -> (B, H, T, D) in the model's dtype."""
    return states.permute(1, 2, 0, 3).to(dtype)


def join(left: Pair, right: Pair) -> Pair:
    """Put keys and values of later tokens behind those of earlier ones, (B, H, T, D) each."""
    return torch.cat([left[0], right[0]], dim=2), torch.cat([left[1], right[1]], dim=2)


def cut(states: Pair, start: int, stop: int | None = None) -> Pair:
    """Return keys and values of tokens start..stop-1, or from `start` on, (B, H, T, D) each."""
    return states[0][:, :, start:stop], states[1][:, :, start:stop]


def own(states: Pair) -> Pair:
    """Return keys and values in tensors of their own, contiguous."""
    key, value = (part.clone(memory_format=torch.contiguous_format) for part in states)
    return key, value


def extremes(states: Pair) -> Tensor:
    """Return the least and the greatest of keys and of values, (any,), NaN where there is one."""
    ends = [end for side in states if side.numel() for end in side.aminmax()]
    return torch.stack(ends) if ends else states[0].new_zeros(1)


def check_finite(ends: Tensor, layer: int) -> None:
    """Raise for states of a layer that hold NaN or infinity, by their `extremes`.

    Raises:
        RunError: naming the layer.
    """
    if not all(map(math.isfinite, ends.tolist())):
        raise RunError(
            f"layer {layer} produced NaN or infinite states; run in float32 or check the model"
        )


def join_rows(parts: list[tuple[Rows, Rows]]) -> tuple[Rows, Rows]:
    """Put encoded rows of keys and values behind each other."""
    if len(parts) == 1:
        return parts[0]
    key, value = (
        {name: torch.cat([part[name] for part in side]) for name in side[0]}
        for side in zip(*parts, strict=True)
    )
    return key, value


def flatten_pair(states: Pair, spec: KvSpec, layer: int) -> Pair:
    """(T, B, H, D) each -> (T * B, H * D) as they are encoded, rotated where the scheme says so.

    Raises:
        RunError: for states of a layer that hold NaN or infinity.
    """
    check_finite(extremes(states), layer)
    key, value = (
        by_group(turn(side, quant).flatten(2), quant.token_group)
        for side, quant in zip(states, (spec.key, spec.value), strict=True)
    )
    return key, value


def split_pair(rows: Pair, spec: KvSpec, batch: int, heads: int) -> Pair:
    """(T * B, H * D) each -> (T, B, H, D): the inverse of `flatten_pair`, to within rounding."""
    sides = zip(rows, (spec.key, spec.value), strict=True)
    shape = len(rows[0]) // batch, batch, heads, -1
    key, value = (
        turn_back(by_token(side, batch, quant.token_group).view(shape), quant)
        for side, quant in sides
    )
    return key, value


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
