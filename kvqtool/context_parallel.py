"""One sequence over several processes: each keeps a share of the tokens and attends to it, and the
results are merged.

Shares are contiguous runs of the prompt's pages; sinks are the first process's, what fills no page
and every later token the last one's. All else of the model runs in every process. A layer's
attention over all tokens T is that over the shares T_p, weighted: with l_p = log sum exp(score)
over T_p, out = sum_p softmax(l)_p out_p. One sum of (out_p, l_p) a layer is all that processes
exchange, and no process ever holds more than its share.

with attach(model, bundle, read_path="fused") as session:
    cache = ContextParallelCache(session.new_cache(bundle), ranks)
    for ids in cache.calls(prompt_ids, 2048):
        logits = next_logits(model, ids, cache)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache

from kvqtool.cache import KvqCache
from kvqtool.errors import InputError, RunError
from kvqtool.layer import KvqLayer
from kvqtool.memory import PAGE_TOKENS
from kvqtool.ranks import Ranks
from kvqtool.sharding import check_pages, first_pages
from kvqtool.shared_layer import SharedLayer

_ONE_WAY: Final = "a cache shared by processes only grows; use one process to go back or reorder"


class ContextParallelCache(Cache):
    """A `KvqCache` that keeps this process's share of every layer that keeps all tokens.

    Every process makes one and feeds it the same calls. Sliding layers, and those kvqtool does not
    pack, are kept whole.
    """

    def __init__(self, cache: KvqCache, ranks: Ranks) -> None:
        """Share a cache that is still empty.

        Args:
            cache: this process's, with exact prefill; `nbytes` and reports are its own.
            ranks: this process among all, which have met (`ranks.join_ranks`).

        Raises:
            InputError: when the cache holds tokens, keeps a recent window or reads prompts
                otherwise, or kernels do not read a layer that is to be shared.
        """
        if cache.get_seq_length():
            raise InputError("the cache holds tokens; share an empty one and read the prompt then")
        if cache.bundle.spec.has_window:
            raise InputError(
                f"{cache.bundle.spec} keeps a recent window; share a cache without -r among "
                "processes"
            )
        if cache.prefill != "exact":
            raise InputError(f"prefill {cache.prefill} is not shared by processes; use exact")
        self.own = cache
        self._ranks = ranks
        self._prompt: int | None = None
        layers = [
            SharedLayer(cache, number, layer, ranks)
            if isinstance(layer, KvqLayer) and not layer.is_sliding
            else layer
            for number, layer in enumerate(cache.layers)
        ]
        super().__init__(layers=layers)

    def calls(self, ids: Tensor, most: int) -> Iterator[Tensor]:
        """Cut a prompt into calls of the model that end where shares do.

        Without this the first call is the prompt that is shared, and all further tokens go to the
        last process.

        Args:
            ids: (batch, tokens) int64, the whole prompt.
            most: tokens of a call at most.

        Yields:
            (batch, up to `most`) int64.

        Raises:
            InputError: when there is not a page for each process.
        """
        self._prompt, start = ids.shape[1], 0
        ends = self._bounds(ids.shape[1])[1:]
        while start < self._prompt:
            stop = min(start + most, next(end for end in ends if end > start))
            yield ids[:, start : min(stop, self._prompt)]
            start = stop

    def _bounds(self, tokens: int) -> list[int]:
        """Return where each process's share of a prompt begins, and where the last one ends:
        nowhere.
        """
        sinks, processes = self.own.bundle.spec.sink_tokens, self._ranks.world_size
        check_pages(tokens, sinks, processes)
        firsts = first_pages(tokens, sinks, processes)[1:]
        return [0, *(sinks + first * PAGE_TOKENS for first in firsts), sys.maxsize]

    def announce(self, layer_idx: int, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
        """See `KvqCache.announce`."""
        self.own.announce(layer_idx, cos, sin, positions)

    def announce_mask(self, mask: Tensor | None) -> None:
        """See `KvqCache.announce_mask`."""
        self.own.announce_mask(mask)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what falls to this process of a layer's new states, and return what its new tokens
        attend to; see `KvqLayer.update`.

        Raises:
            InputError: when the prompt has no page for each process.
            RunError: when a call of a prompt ends within a share, or the layer cannot be read from
                pages after all.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, SharedLayer):
            if not layer.tokens:
                bounds = self._bounds(self._prompt or key_states.shape[2])
                layer.begin(bounds[self._ranks.rank], bounds[self._ranks.rank + 1])
            shown = layer.update(key_states, value_states)
        else:
            shown = self.own.update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            for angles in self.own.angles.values():
                angles.forget()
        return shown

    def crop(self, tokens_to_remove: int) -> None:
        """Raise RunError: tokens are not taken back."""
        raise RunError(_ONE_WAY)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Raise RunError: sequences stay as they are."""
        raise RunError(_ONE_WAY)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raise RunError: sequences stay as they are."""
        raise RunError(_ONE_WAY)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Raise RunError: sequences stay as they are."""
        raise RunError(_ONE_WAY)

    def reset(self) -> None:
        """Forget everything."""
        self.own.reset()
        self._prompt = None
        for layer in self.layers:
            if isinstance(layer, SharedLayer):
                layer.reset()
