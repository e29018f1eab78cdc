"""Attention functions that kvqtool registers with transformers, by explicit call only.

`kvqtool_band` is sdpa with three exceptions. Where a cache hands over keys that some queries see
exactly and others as packed (the recent window moves along inside a multi-token call), every query
attends to what decoding would have stored. Where it hands over a placeholder for keys that lie in
its pages, the fused kernel attends to them. Where a model caps its scores, which sdpa does not
know, they are written out, some queries at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvqtool.errors import RunError
from kvqtool.masks import band_mask, causal_mask, is_mark
from kvqtool.scratch import QUERIES_AT_ONCE

BAND: Final = "kvqtool_band"
_BAND_ATTRIBUTE: Final = "_kvqtool_band"
_PACKED_ATTRIBUTE: Final = "_kvqtool_packed"
_WITNESS_ATTRIBUTE: Final = "_kvqtool_witness"
# What some models' attention takes beside keys and values, and neither a band nor a kernel knows.
_UNKNOWN: Final = ("s_aux", "position_bias")


@dataclass(frozen=True)
class Scoring:
    """How products of queries and keys become scores.

    Args:
        scaling: their factor.
        softcap: c of c tanh(score / c), or None.
    """

    scaling: float
    softcap: float | None = None

    def apply(self, products: Tensor) -> Tensor:
        """Return the scores of products in float32."""
        scores = products * self.scaling
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap


@dataclass(frozen=True)
class Watch(ABC):
    """Sees queries before they attend; `sees_exactly`: these attend to exact states only."""

    sees_exactly: bool

    @abstractmethod
    def look(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scoring: Scoring
    ) -> Tensor | None:
        """Take queries and keys, as `band_attention` has them.

        Returns:
            The values to attend to, packed where they are; None for those there are.
        """


@dataclass(frozen=True)
class Band:
    """The exact states of the most recent tokens, and how far back a query still sees them.

    Args:
        key: (batch, num_kv_heads, tail, head_dim) exact keys of the last `tail` tokens, after RoPE.
        value: likewise the values.
        exact_from: (queries,) int64, the first of the call's keys that each query sees exactly.
        watch: told of the queries before they attend, where bits depend on attention.
    """

    key: Tensor
    value: Tensor
    exact_from: Tensor
    watch: Watch | None = None


class PackedKeys(Protocol):
    """Keys that lie in a cache's pages; a placeholder of NaN carries them to attention."""

    @property
    def sees_all(self) -> bool:
        """Whether a query sees whatever the pages say, and no mask is to be looked at."""

    def attend(self, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Return attention's output, (batch, 1, num_heads, head_dim), of one query a sequence."""

    def attend_causal(self, query: Tensor, scaling: float) -> Tensor:
        """Return attention's output, (batch, queries, num_heads, head_dim), of the last queries."""

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
    AttentionMaskInterface.register(BAND, band_mask)


def band_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend by kernel where the keys lie in pages, mixing exact and packed scores where they carry
    a band; plain sdpa otherwise, or the same with capped scores.

    Args:
        module: the attention module.
        query: (batch, num_heads, queries, head_dim).
        key: (batch, num_kv_heads, tokens, head_dim).
        value: (batch, num_kv_heads, tokens, value_dim).
        attention_mask: (batch, 1, queries, tokens) bool, or None or `band_mask`'s mark for causal
            order.
        **options: transformers' own: scaling, dropout, sliding_window, ...

    Returns:
        (batch, queries, num_heads, value_dim), and None for the weights.
    """
    witness = getattr(key, _WITNESS_ATTRIBUTE, None)
    if witness is not None:
        witness(next((name for name in _UNKNOWN if options.get(name) is not None), None))
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    scoring = Scoring(scaling, options.get("softcap"))
    is_plain = is_mark(attention_mask)
    attention_mask = None if is_plain else attention_mask
    packed: PackedKeys | None = getattr(key, _PACKED_ATTRIBUTE, None)
    if packed is not None:
        out = _attend_packed(query, packed, attention_mask, scoring, is_plain=is_plain)
        if out is not None:
            return out, None
        key, value = packed.expand()
    band: Band | None = getattr(key, _BAND_ATTRIBUTE, None)
    if band is not None:
        _refuse_unknown(options)
        if band.watch is not None:
            shown = band.watch.look(query, key, attention_mask, scoring)
            value = value if shown is None else shown
            band = None if band.watch.sees_exactly else band
    if band is None and scoring.softcap is None:
        if is_plain:
            attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    band = band or _empty_band(key, value, query.shape[2])
    return _mixed_attention(query, (key, value), band, attention_mask, scoring), None


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Raise for options of attention that mixing exact and packed scores does not know.

    Raises:
        RunError: naming the first.
    """
    for unsupported in _UNKNOWN:
        if options.get(unsupported) is not None:
            raise RunError(
                f"a recent window does not work with attention that uses {unsupported}; "
                "use a spec that keeps none (no -r, kivi or qaq)"
            )


def _attend_packed(
    query: Tensor, packed: PackedKeys, mask: Tensor | None, scoring: Scoring, *, is_plain: bool
) -> Tensor | None:
    """Return attention's output straight from pages, or None where that cannot be."""
    if query.shape[2] > 1:
        plainly = is_plain and scoring.softcap is None
        return packed.attend_causal(query, scoring.scaling) if plainly else None
    if packed.sees_all or mask is None or bool(mask.all()):
        return packed.attend(query, scoring.scaling, scoring.softcap)
    return None


def _empty_band(key: Tensor, value: Tensor, queries: int) -> Band:
    """Return a band of no exact states."""
    nothing = torch.full((queries,), key.shape[2], device=key.device)
    return Band(key[:, :, :0], value[:, :, :0], nothing)


def _mixed_attention(
    query: Tensor,
    packed: tuple[Tensor, Tensor],
    band: Band,
    mask: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    """S = where(exact, q.K_exact, q.K_packed); one softmax; P_exact V_exact + P_packed
    V_packed.
    """
    key, value = packed
    out, tail = [], band.key.shape[2]
    for rows in query_blocks(query.shape[2]):
        weights, recent = mixed_weights(query, key, band, mask, scoring, rows)
        weights = weights.to(value.dtype)
        exact = weights[..., key.shape[2] - tail :] * recent
        weights[..., key.shape[2] - tail :] -= exact
        part = torch.einsum("bhgqt,bhtd->bhgqd", weights, value)
        part += torch.einsum("bhgqt,bhtd->bhgqd", exact, band.value)
        out.append(part.flatten(1, 2).transpose(1, 2))
    return torch.cat(out, dim=1).contiguous()


def query_blocks(queries: int) -> Iterator[slice]:
    """Cut queries into runs, so that weights take memory by tokens, not by their square."""
    for start in range(0, queries, QUERIES_AT_ONCE):
        yield slice(start, min(start + QUERIES_AT_ONCE, queries))


def mixed_weights(
    query: Tensor, key: Tensor, band: Band, mask: Tensor | None, scoring: Scoring, rows: slice
) -> tuple[Tensor, Tensor]:
    """Return the attention weights of some of the last queries.

    Returns:
        (batch, num_kv_heads, group, rows, tokens) float32, 0 where nothing is seen; and which of
        the band's tokens each row sees exactly, (rows, tail) bool.
    """
    batch, heads, queries, _ = query.shape
    groups, tokens, tail = heads // key.shape[1], key.shape[2], band.key.shape[2]
    grouped = query[:, :, rows].reshape(batch, key.shape[1], groups, rows.stop - rows.start, -1)

    def scores(states: Tensor) -> Tensor:
        return scoring.apply(torch.einsum("bhgqd,bhtd->bhgqt", grouped, states).float())

    position = torch.arange(tokens - queries, tokens, device=query.device)[rows, None]
    age = position - torch.arange(tokens, device=query.device)
    places = torch.arange(tokens - tail, tokens, device=query.device)
    recent = places >= band.exact_from.to(query.device)[rows, None]
    score = scores(key)
    score[..., tokens - tail :] = torch.where(recent, scores(band.key), score[..., tokens - tail :])
    seen = (age >= 0)[None, None] if mask is None else mask[:, :, rows]
    unseen = ~seen[:, :, None]
    score = score.masked_fill(unseen, torch.finfo(torch.float32).min)
    return score.softmax(-1).masked_fill_(unseen, 0.0), recent
