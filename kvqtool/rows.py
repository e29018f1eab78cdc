"""Between a model's tensors (batch, heads, tokens, head_dim) and stored rows, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from kvqtool.errors import RunError
from kvqtool.side import QuantSpec

Pair = tuple[Tensor, Tensor]


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


def stored_dtype(states: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Give fp its states in the model's dtype; codecs take float32."""
    return states.to(dtype) if spec.method == "fp" else states


def check_finite(states: Tensor, layer: int) -> None:
    """Raise RunError for states of a layer that hold NaN or infinity."""
    if not torch.isfinite(states).all():
        raise RunError(
            f"layer {layer} produced NaN or infinite states; run in float32 or check the model"
        )


def join(left: Pair, right: Pair) -> Pair:
    """Put keys and values of later tokens behind those of earlier ones, (B, H, T, D) each."""
    return torch.cat([left[0], right[0]], dim=2), torch.cat([left[1], right[1]], dim=2)
