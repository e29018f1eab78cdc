"""One sequence over several processes: each keeps a share of the tokens and attends to it, and the
results are merged.

Shares are contiguous runs of the prompt's pages; sinks go to the first process, what fills no page
and every new token to the last. All else of the model runs in every process. A layer's attention
over all tokens T is that over the shares T_p, weighted: with l_p = log sum exp(score) over T_p,
out = sum_p softmax(l)_p out_p. One gather of (out_p, l_p) a layer is all that processes exchange.

with attach(model, bundle, read_path="fused") as session:
    cache = ContextParallelCache(session.new_cache(bundle), ranks)
    model.generate(**inputs, past_key_values=cache)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvqtool.attention import mark_packed, packed_of
from kvqtool.cache import KvqCache
from kvqtool.errors import InputError, RunError
from kvqtool.layer import KvqLayer, PackedLayer
from kvqtool.memory import PAGE_TOKENS
from kvqtool.ranks import Ranks
from kvqtool.rows import Pair

_ONE_WAY: Final = "a cache shared by processes only grows; use one process to go back or reorder"


class ContextParallelCache(Cache):
    """A `KvqCache` that keeps this process's share of every layer that keeps all tokens.

    Every process makes one and feeds it the same calls: the whole prompt in one, then a token of
    each sequence at a time. Sliding layers, and those kvqtool does not pack, are kept whole.
    """

    def __init__(self, cache: KvqCache, ranks: Ranks) -> None:
        """Share a cache that is still empty.

        Args:
            cache: this process's; `nbytes` and reports are its own.
            ranks: this process among all, which have met (`ranks.join_ranks`).

        Raises:
            InputError: when the cache holds tokens, or kernels do not read a layer to be shared.
        """
        if cache.get_seq_length():
            raise InputError("the cache holds tokens; share an empty one and read the prompt then")
        self.own = cache
        layers = [
            SharedLayer(cache, number, layer, ranks)
            if isinstance(layer, KvqLayer) and not layer.is_sliding
            else layer
            for number, layer in enumerate(cache.layers)
        ]
        super().__init__(layers=layers)

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
            RunError: when a prompt goes on, or the layer cannot be read from pages after all.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, SharedLayer):
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
        for layer in self.layers:
            if isinstance(layer, SharedLayer):
                layer.reset()


class SharedLayer(CacheLayerMixin):
    """One layer of a `ContextParallelCache` of which this process keeps a share."""

    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: KvqCache, number: int, layer: KvqLayer, ranks: Ranks) -> None:
        """Share layer `number` of an empty cache."""
        super().__init__()
        if not layer.path.is_fused:
            raise InputError(
                f"layer {number} cannot be shared: it is read through torch ({layer.path.reason}); "
                'attach with read_path="fused"'
            )
        self._cache = cache
        self._number = number
        self._layer = layer
        self._ranks = ranks
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.tokens = 0
        self.is_initialized = False
        self._packed: PackedLayer | None = None  # where no new token ever comes

    @property
    def takes_tokens(self) -> bool:
        """Whether new tokens come to this process."""
        return self._ranks.rank == self._ranks.world_size - 1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer starts with the prompt."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the prompt's share, or a token where tokens come to, and return what is attended
        to; see `ContextParallelCache.update`.
        """
        fresh = key_states.shape[2]
        if not self.tokens:
            shown = self._cache.update(key_states, value_states, self._number)
            self._layer.keep(*self._share())
            self.tokens, self.is_initialized = fresh, True
            return shown
        if fresh > 1:
            raise RunError(
                f"a cache shared by processes takes a token a call after the prompt, not {fresh}; "
                "read the prompt in one call"
            )
        self.tokens += 1
        packed = self._attended(key_states, value_states)
        shape = *key_states.shape[:2], self.tokens, key_states.shape[3]
        placeholder = key_states.new_full((1,), math.nan).expand(shape)
        mark_packed(placeholder, SharedKeys(packed, self._ranks))
        return placeholder, placeholder

    def _attended(self, key_states: Tensor, value_states: Tensor) -> PackedLayer:
        """Return this process's tokens, the new one among them where it comes here."""
        if self.takes_tokens:
            keys, _ = self._cache.update(key_states, value_states, self._number)
            packed = packed_of(keys)
            if not isinstance(packed, PackedLayer):
                raise RunError(f"layer {self._number} cannot be shared: {self._layer.path.reason}")
            return packed
        if self._packed is None:
            self._layer.check_path()
            if not self._layer.path.is_fused:
                raise RunError(f"layer {self._number} cannot be shared: {self._layer.path.reason}")
            self._packed = self._layer.packed(self._layer.first_seen())
        return self._packed

    def _share(self) -> tuple[int, int]:
        """Return the first of the tokens that stay here, and the first behind them.

        Raises:
            InputError: when there is not a page for each process.
        """
        store, (rank, processes) = self._layer.store, (self._ranks.rank, self._ranks.world_size)
        pages = store.bodies[0].tokens // PAGE_TOKENS
        if pages < processes:
            raise InputError(
                f"a prompt of {store.tokens} tokens has {pages} whole pages of {PAGE_TOKENS}, too "
                f"few for {processes} processes; start fewer, or read a longer prompt"
            )
        bounds = [store.sinks + pages * n // processes * PAGE_TOKENS for n in (rank, rank + 1)]
        return bounds[0] if rank else 0, store.tokens if self.takes_tokens else bounds[1]

    def get_seq_length(self) -> int:
        """Return the tokens that all processes hold together."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a call of `query_length` queries will see, and the first's index."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: without bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return the same under the name transformers 5.17 asks for."""
        return -1


@dataclass(frozen=True)
class SharedKeys:
    """What attention reads of one layer: its own tokens, and the other processes' results."""

    packed: PackedLayer
    ranks: Ranks
    sees_all: bool = True

    def attend(self, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Return the output of one query a sequence over all processes' tokens, (batch, 1,
        num_heads, head_dim): the same in each, bit for bit.
        """
        log_sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        out = self.packed.attend(query, scaling, softcap, log_sums)[:, 0]
        gathered = self.ranks.gather(torch.cat([out.float(), log_sums[..., None]], dim=-1))
        return merge(gathered[..., :-1], gathered[..., -1]).to(query.dtype)[:, None]

    def attend_causal(self, query: Tensor, scaling: float) -> Tensor:
        """Return the output of several queries a sequence; a token comes at a time."""
        raise AssertionError("shared layers take a token a call after the prompt")

    def expand(self) -> Pair:
        """Return the keys and values themselves; no process has them all."""
        raise AssertionError("shared layers are read by the kernel only")


def merge(outs: Tensor, log_sums: Tensor) -> Tensor:
    """Return attention over all tokens from that over each share of them.

    Args:
        outs: (shares, ..., head_dim) float32, attention's output over each share.
        log_sums: (shares, ...) float32, the log of the sum of exp(score) over it.

    Returns:
        (..., head_dim) float32.

    Example: two shares of two heads of 64 -> outs (2, 2, 64), log_sums (2, 2), result (2, 64).
    """
    return (log_sums.softmax(0)[..., None] * outs).sum(0)
