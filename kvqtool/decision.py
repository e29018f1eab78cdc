"""What QAQ's bits follow from: facts about tokens, and the widths that those come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvqtool.rows import Pair
from kvqtool.spec import KvSpec
from kvqtool.tolerance import key_tolerance, needed_bits, stored_width, value_tolerance


@dataclass(frozen=True)
class Facts:
    """What some tokens' bits follow from, in one layer or in several that share them.

    Args:
        spread: widths of the ranges of keys and of values, (tokens, batch, units) float32.
        attention: the greatest weight that each got, (tokens, batch, units) float32.
        query_norm: |Q|^2, (units,) float32, or one number.
    """

    spread: Pair
    attention: Tensor
    query_norm: Tensor | float


def decide(facts: Facts, counts: Tensor, spec: KvSpec) -> Pair:
    """Return the widths of keys and of values, (tokens, batch, units) uint8.

    Args:
        facts: about the tokens.
        counts: T of QAQ's formulas, (tokens, batch) int64.
        spec: the scheme, whose bits are by token.
    """
    assert spec.adaptive is not None, "only such specs come here"
    assert spec.key.error_budget is not None and spec.value.error_budget is not None
    seen, counts = facts.attention, counts.to(facts.attention.device)[..., None]
    sigmas = (
        key_tolerance(counts, spec.key.error_budget, facts.query_norm),
        value_tolerance(counts, spec.value.error_budget, seen),
    )
    key, value = (
        stored_width(needed_bits(spread, sigma, spec.adaptive.formula))
        for spread, sigma in zip(facts.spread, sigmas, strict=True)
    )
    return key, value


def united(facts: Sequence[Facts]) -> Facts:
    """Return the facts of layers whose tokens share their bits: the greatest of each."""
    device = facts[0].attention.device

    def greatest(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.to(device) for part in parts]).amax(0)

    norms = [torch.as_tensor(each.query_norm).float() for each in facts]
    return Facts(
        (greatest([f.spread[0] for f in facts]), greatest([f.spread[1] for f in facts])),
        greatest([f.attention for f in facts]),
        greatest(norms),
    )
