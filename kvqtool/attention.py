"""Attention functions that kvqtool registers with transformers, by explicit call only.

`kvqtool_band` is sdpa with two exceptions. Where a cache hands over keys that some queries see
exactly and others as packed (the recent window moves along inside a multi-token call), every query
attends to what decoding would have stored. Where it hands over a placeholder for keys that lie in
its pages, the fused kernel attends to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvqtool.errors import RunError

BAND: Final = "kvqtool_band"
_BAND_ATTRIBUTE: Final = "_kvqtool_band"
_PACKED_ATTRIBUTE: Final = "_kvqtool_packed"
_WITNESS_ATTRIBUTE: Final = "_kvqtool_witness"
# What some models' attention takes beside keys and values, and neither a band nor a kernel knows.
_UNKNOWN: Final = ("s_aux", "position_bias")


@dataclass(frozen=True)
class Band:
    """The exact states of the most recent tokens, and how far back a query still sees them.

    Args:
        key: (batch, num_kv_heads, tail, head_dim) exact keys of the last `tail` tokens, after RoPE.
        value: likewise the values.
        exact_from: (queries,) int64, the first of the call's keys that each query sees exactly.
    """

    key: Tensor
    value: Tensor
    exact_from: Tensor


class PackedKeys(Protocol):
    """Keys that lie in a cache's pages; a placeholder of NaN carries them to attention."""

    def attend(self, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Return attention's output, (batch, 1, num_heads, head_dim), of one query a sequence."""

    def expand(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values themselves, (batch, num_kv_heads, tokens, head_dim)."""


def mark_packed(keys: Tensor, packed: PackedKeys) -> None:
    """Attach what stands for the keys a cache returns."""
    setattr(keys, _PACKED_ATTRIBUTE, packed)


def mark_witness(keys: Tensor, witness: Callable[[str | None], None]) -> None:
    """Ask to be told when attention is handed this very tensor, and what of its options kernels do
    not know.
    """
    setattr(keys, _WITNESS_ATTRIBUTE, witness)


def mark_band(keys: Tensor, band: Band) -> Tensor:
    """Attach a band to the keys a cache returns; the model hands this very tensor to the attention
    function.
    """
    setattr(keys, _BAND_ATTRIBUTE, band)
    return keys


def register_band_attention() -> None:
    """Make `kvqtool_band` known to transformers, its mask function with it (without one, padding is
    ignored).
    """
    AttentionInterface.register(BAND, band_attention)
    AttentionMaskInterface.register(BAND, sdpa_mask)


def band_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend by kernel where the keys lie in pages, mixing exact and packed scores where they carry
    a band; plain sdpa otherwise.

    Args:
        module: the attention module.
        query: (batch, num_heads, queries, head_dim).
        key: (batch, num_kv_heads, tokens, head_dim).
        value: (batch, num_kv_heads, tokens, value_dim).
        attention_mask: (batch, 1, queries, tokens) bool, or None for causal order.
        **options: transformers' own: scaling, dropout, sliding_window, ...

    Returns:
        (batch, queries, num_heads, value_dim), and None for the weights.
    """
    witness = getattr(key, _WITNESS_ATTRIBUTE, None)
    if witness is not None:
        witness(next((name for name in _UNKNOWN if options.get(name) is not None), None))
    packed: PackedKeys | None = getattr(key, _PACKED_ATTRIBUTE, None)
    if packed is not None:
        if attention_mask is None or bool(attention_mask.all()):
            scaling = options.get("scaling") or query.shape[-1] ** -0.5
            return packed.attend(query, scaling, options.get("softcap")), None
        key, value = packed.expand()
    band: Band | None = getattr(key, _BAND_ATTRIBUTE, None)
    if band is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for unsupported in ("softcap", "s_aux", "position_bias"):
        if options.get(unsupported) is not None:
            raise RunError(
                f"a recent window (-r) does not work with attention that uses {unsupported}; "
                "drop -r"
            )
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return _mixed_attention(query, (key, value), band, attention_mask, scaling), None


def _mixed_attention(
    query: Tensor, packed: tuple[Tensor, Tensor], band: Band, mask: Tensor | None, scaling: float
) -> Tensor:
    """S = where(exact, q.K_exact, q.K_packed); one softmax; P_exact V_exact + P_packed
    V_packed.
    """
    key, value = packed
    batch, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    tokens, tail = key.shape[2], band.key.shape[2]
    grouped = query.view(batch, key.shape[1], groups, queries, -1)

    def scores(states: Tensor) -> Tensor:
        return torch.einsum("bhgqd,bhtd->bhgqt", grouped, states).float() * scaling

    position = torch.arange(tokens - queries, tokens, device=query.device)[:, None]
    age = position - torch.arange(tokens, device=query.device)
    places = torch.arange(tokens - tail, tokens, device=query.device)
    recent = places >= band.exact_from.to(query.device)[:, None]
    score = scores(key)
    score[..., tokens - tail :] = torch.where(recent, scores(band.key), score[..., tokens - tail :])
    seen = (age >= 0)[None, None] if mask is None else mask
    score = score.masked_fill(~seen[:, :, None], torch.finfo(torch.float32).min)
    weights = score.softmax(-1).to(value.dtype)
    exact = weights[..., tokens - tail :] * recent
    weights[..., tokens - tail :] -= exact
    out = torch.einsum("bhgqt,bhtd->bhgqd", weights, value)
    out += torch.einsum("bhgqt,bhtd->bhgqd", exact, band.value)
    return out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous()
