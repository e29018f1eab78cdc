"""Attention of many queries to many tokens, some tokens at a time: partial results are joined by
their log-sum-exps, so that the past need never lie decoded all at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvqtool.rows import Pair, cut, join


def attend_causal(query: Tensor, parts: Iterable[Pair], past: int, scale: float) -> Tensor:
    """Attend with the last tokens of a sequence to all of it, each to those before it and itself.

    Args:
        query: (batch, num_heads, queries, head_dim), of the last `queries` tokens.
        parts: keys and values, (batch, num_kv_heads, any, head_dim) each, of tokens in order.
        past: tokens before the first query's.
        scale: factor on scores.

    Returns:
        (batch, num_heads, queries, head_dim) in the query's dtype.
    """
    return attend_share(query, parts, past, scale)[0].to(query.dtype)


def attend_share(query: Tensor, parts: Iterable[Pair], past: int, scale: float) -> Pair:
    """Attend with the last tokens of a sequence to a share of it.

    Args:
        query: as for `attend_causal`.
        parts: as for `attend_causal`: tokens that every query sees, then the queries' own or none.
        past: how many every query sees.
        scale: factor on scores.

    Returns:
        (batch, num_heads, queries, head_dim) float32, and the log-sum-exp of scores, (batch,
        num_heads, queries) float32.
    """
    total, own = _Total(query), None
    for part in parts:
        before = max(min(past, part[0].shape[2]), 0)
        past -= before
        if before:
            total.add(*_partial(query, cut(part, 0, before), scale))
        if before < part[0].shape[2]:
            fresh = cut(part, before)
            own = fresh if own is None else join(own, fresh)
    if own is not None:
        assert own[0].shape[2] == query.shape[2], "the last tokens are the queries'"
        total.add(*_triangle(query, own, scale))
    return total.result, total.weight


class _Total:
    """The joint result of partial ones, float32."""

    def __init__(self, query: Tensor) -> None:
        """Start with nothing seen."""
        self.result = torch.zeros_like(query, dtype=torch.float32)
        self.weight = torch.full_like(query[..., 0], -torch.inf, dtype=torch.float32)

    def add(self, out: Tensor, weight: Tensor) -> None:
        """Join what other tokens gave, (B, H, Q, D), and the log-sum-exp of scores, (B, H, Q)."""
        joint = torch.logaddexp(self.weight, weight)
        self.result.mul_((self.weight - joint).exp_()[..., None])
        self.result.addcmul_(out.float(), (weight - joint).exp_()[..., None])
        self.weight = joint


def _partial(query: Tensor, states: Pair, scale: float) -> Pair:
    """Attend to tokens that every query sees: the queries of a KV head's heads behind each other,
    so that no key is repeated.
    """
    batch, heads, queries, head_dim = query.shape
    folded = query.reshape(batch, states[0].shape[1], -1, head_dim)
    out, weight = _attend(folded, states, scale, is_causal=False)
    return out.reshape(query.shape), weight.reshape(batch, heads, queries)


def _triangle(query: Tensor, states: Pair, scale: float) -> Pair:
    """Attend to the queries' own tokens, each to those up to its own."""
    repeats = query.shape[1] // states[0].shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in states)
    return _attend(query, (key, value), scale, is_causal=True)


def _attend(query: Tensor, states: Pair, scale: float, *, is_causal: bool) -> Pair:
    """Return the result of as many query heads as there are KV heads, (B, H, Q, D), and the
    log-sum-exp of scores, (B, H, Q) float32.
    """
    key, value = states
    if query.is_cuda:
        # What torch's scaled_dot_product_attention runs, which keeps the log-sum-exp to itself.
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )
        return found[0], found[1]
    score = query.float() @ key.float().transpose(-1, -2) * scale
    if is_causal:
        score = score.masked_fill(
            ~torch.ones_like(score[0, 0], dtype=torch.bool).tril(), -torch.inf
        )
    return score.softmax(-1) @ value.float(), score.logsumexp(-1)
