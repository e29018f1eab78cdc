"""The mask function of kvqtool's attention: sdpa's, but for calls whose queries are the last tokens
of a past that all of them see, where a mask would take memory by its square and say nothing new.

Such a call gets a mark instead: one False, expanded to the mask's shape. Attention that does not
know it sees nothing, not everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask


def band_mask(**options: Any) -> Tensor | None:
    """Return what `sdpa_mask` does, or the mark of plain causal order.

    Args:
        **options: those of transformers' mask functions.
    """
    if not _is_plain(options):
        mask: Tensor | None = sdpa_mask(**options)
        return mask
    shape = options["batch_size"], 1, options["q_length"], options["kv_length"]
    return _mark(shape, options.get("device", "cpu"))


def _mark(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Return the mark of a shape. Where a spread model's layers lie on several devices accelerate
    calls its `to`, and torch's own would write out every element: a mask that hides everything.
    """
    mark = torch.zeros((), dtype=torch.bool, device=device).expand(shape)

    def to(device: torch.device | str, **_: Any) -> Tensor:
        return _mark(shape, device)

    mark.to = to  # type: ignore[method-assign, assignment]  # of this tensor alone
    return mark


def is_mark(mask: Tensor | None) -> bool:
    """Whether a mask is the mark of plain causal order, or a part of it."""
    return mask is not None and mask.dim() == 4 and mask.numel() > 1 and not any(mask.stride())


def causal_mask(queries: int, tokens: int, device: torch.device) -> Tensor:
    """Return (1, 1, queries, tokens) bool: the last `queries` tokens see what came before and
    themselves.
    """
    everything = torch.ones(1, 1, queries, tokens, dtype=torch.bool, device=device)
    return everything.tril(tokens - queries)


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether queries are several, the last tokens of the keys, and see all up to themselves."""
    queries, keys = options["q_length"], options["kv_length"]
    places = options.get("q_offset", 0), options.get("kv_offset", 0)
    if not all(isinstance(number, int) for number in (queries, keys, *places)):
        return False
    if options.get("mask_function") is not causal_mask_function or places[1]:
        return False
    if not options.get("allow_is_causal_skip", True) or options.get("local_size") is not None:
        return False
    padding = options.get("attention_mask")
    is_last = 1 < queries < keys and places[0] + queries == keys
    return is_last and (padding is None or bool(padding.all()))
