"""One layer of a cache that processes share: what is stored here, and how results are merged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvqtool.attention import mark_packed, mark_witness
from kvqtool.cache import KvqCache
from kvqtool.errors import InputError, RunError
from kvqtool.layer import KvqLayer, PackedLayer
from kvqtool.paged import PagedStore
from kvqtool.ranks import Ranks
from kvqtool.rows import Pair, cut


class SharedLayer(CacheLayerMixin):
    """One layer of a `ContextParallelCache` of which this process keeps a share."""

    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: KvqCache, number: int, layer: KvqLayer, ranks: Ranks) -> None:
        """Share layer `number` of an empty cache.

        Raises:
            InputError: when kernels do not read it.
        """
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
        self.tokens = self._start = self._stop = 0
        self.is_initialized = False
        self._packed: PackedLayer | None = None

    def begin(self, start: int, stop: int) -> None:
        """Keep tokens start..stop-1 of what is to come."""
        self._start, self._stop = start, stop

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer starts with the prompt."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what falls to this process and return what is attended to; see
        `ContextParallelCache.update`.
        """
        before, fresh = self.tokens, key_states.shape[2]
        own = len(range(max(self._start, before), min(self._stop, before + fresh)))
        if before and own not in (0, fresh):
            raise RunError(
                f"a call of {fresh} tokens after {before} ends within two shares; cut the prompt "
                "by ContextParallelCache.calls"
            )
        self._cache.prepare(self._number, key_states, before)
        self._layer.check_path()
        if not self._layer.path.is_fused:
            raise RunError(f"layer {self._number} cannot be shared: {self._layer.path.reason}")
        self._store((key_states, value_states), own)
        self.tokens, self.is_initialized = before + fresh, True
        if not before:
            self._layer.path.count("exact")
            return self._offered(key_states), value_states
        shape = *key_states.shape[:2], self.tokens, key_states.shape[3]
        placeholder = key_states.new_full((1,), math.nan).expand(shape)
        mark_packed(placeholder, SharedKeys(self._attended(own), own, self._ranks))
        return self._offered(placeholder), placeholder

    def _offered(self, keys: Tensor) -> Tensor:
        """Ask to be told when attention is handed these very keys."""
        mark_witness(keys, self._layer.path.witness)
        self._layer.path.is_offered = True
        return keys

    def _store(self, states: Pair, own: int) -> None:
        """Store `own` tokens of a call, and the sinks in every process."""
        store, layer = self._layer.store, self._layer
        assert isinstance(store, PagedStore), "kernels read it"
        missing = max(store.spec.sink_tokens - self.tokens, 0) if self._start else 0
        if missing:
            store.append(*cut(states, 0, missing), layer.read_angles)
        if not own:
            return
        first = max(self._start - self.tokens, 0)
        if store.tokens < self._start:
            store.skip(self._start - store.tokens)
        store.append(*cut(states, first, first + own), layer.read_angles)
        self._packed = None

    def _attended(self, own: int) -> PackedLayer | None:
        """Return this process's tokens as kernels read them, None where there are none yet."""
        if not own and self.tokens <= self._start:
            return None
        if self._packed is None:
            self._packed = self._layer.packed(self._start)
        return self._packed

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
    """What attention reads of one layer: this process's tokens, and the other ones' results.

    Args:
        packed: this process's tokens; None while it has none.
        own: how many of the call's tokens are among them: all or none.
        ranks: the processes.
        sees_all: nothing is padded here.
    """

    packed: PackedLayer | None
    own: int
    ranks: Ranks
    sees_all: bool = True

    def attend(self, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Return the output of one query a sequence over all processes' tokens, (batch, 1,
        num_heads, head_dim): the same in each, bit for bit.
        """
        if self.packed is None:
            return self._merged(*_nothing(query), query)
        log_sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        out = self.packed.attend(query, scaling, softcap, log_sums)
        return self._merged(out.transpose(1, 2), log_sums[..., None], query)

    def attend_causal(self, query: Tensor, scaling: float) -> Tensor:
        """Return the output of the last queries over all processes' tokens, (batch, queries,
        num_heads, head_dim), each over those before it and its own.
        """
        if self.packed is None:
            return self._merged(*_nothing(query), query)
        return self._merged(*self.packed.attend_share(query, scaling, self.own), query)

    def expand(self) -> Pair:
        """Raise RunError: no process has all keys and values."""
        raise RunError(
            "several queries at once attend to a shared cache only in plain causal order and "
            "without a cap on scores; read the prompt in one call"
        )

    def _merged(self, out: Tensor, log_sums: Tensor, query: Tensor) -> Tensor:
        """Merge results (B, H, Q, D) of log-sums (B, H, Q)."""
        gathered = self.ranks.gather(torch.cat([out.float(), log_sums[..., None]], dim=-1))
        merged = merge(gathered[..., :-1], gathered[..., -1]).to(query.dtype)
        return merged.transpose(1, 2).contiguous()


def _nothing(query: Tensor) -> Pair:
    """Return the result of attention over no tokens."""
    out = torch.zeros_like(query, dtype=torch.float32)
    return out, torch.full_like(out[..., 0], -math.inf)


def merge(outs: Tensor, log_sums: Tensor) -> Tensor:
    """Return attention over all tokens from that over each share of them.

    Args:
        outs: (shares, ..., head_dim) float32, attention's output over each share.
        log_sums: (shares, ...) float32, the log of the sum of exp(score) over it; -inf where the
            share is empty.

    Returns:
        (..., head_dim) float32.

    Example: two shares of two heads of 64 -> outs (2, 2, 64), log_sums (2, 2), result (2, 64).
    """
    return (log_sums.softmax(0)[..., None] * outs).sum(0)
