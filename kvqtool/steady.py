"""The steps of decoding in which the host decides nothing: those between two page boundaries.

Every layer writes its new token into its open page and attends to its pages; where the token goes
and how many there are stands in tensors on the device. So a CUDA graph can hold one such step and
replay it, and the `KvqCache` is told afterwards what was added (`settle`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvqtool.attention import mark_packed
from kvqtool.cache import KvqCache
from kvqtool.fused import PackedContext
from kvqtool.layer import KvqLayer
from kvqtool.memory import PAGE_TOKENS
from kvqtool.paged import PagedStore
from kvqtool.reader import PageReader
from kvqtool.rows import Pair

_PACKED: Final = 0  # columns of `fused.STATE`
_FIRST_SEEN: Final = 4
_SPARE_PAGES: Final = 64  # columns of the page table beyond what is there, at least


def unsteady(cache: KvqCache) -> str | None:
    """Return why a cache's steps need the host, in one sentence, or None where they do not."""
    for layer in cache.layers:
        if not isinstance(layer, KvqLayer):
            return "a layer keeps its stock cache"
        if not layer.path.is_fused:
            return f"layer {layer.store.layer} is read through torch: {layer.path.reason}"
        if layer.store.spec.has_window:
            return "a recent window moves along with every token"
        assert isinstance(layer.store, PagedStore)
        if not layer.store.is_empty and not layer.store.can_lend:
            return f"layer {layer.store.layer}: the append kernel does not know {layer.store.spec}"
    return None


class SteadyCache(Cache):
    """The next steps of a `KvqCache`, as transformers' cache: one token of every sequence a call.

    cache, steps = SteadyCache(kvq), steady.begin()
    ... at most `steps` forwards, each followed by advance() ...
    steady.settle(how many there were)
    """

    def __init__(self, cache: KvqCache) -> None:
        """Stand for a cache of which `unsteady` says None."""
        self._cache = cache
        self._turns: dict[int, Tensor] = {}
        self._numbers: Tensor | None = None
        self.steady = [SteadyLayer(layer) for layer in cache.layers if isinstance(layer, KvqLayer)]
        super().__init__(layers=list(self.steady))

    def begin(self) -> int:
        """Take the layers as they are now; return how many steps may follow: 0 where the next one
        needs the `KvqCache` itself.
        """
        if not all(layer.is_ready for layer in self.steady):
            return 0
        first, batch = self.steady[0].store, self.steady[0].store.batch
        if self._numbers is None or self._numbers.shape[2] != batch:
            shape = 3, len(self.steady), batch, 8
            self._numbers = torch.zeros(shape, dtype=torch.int32, device=first.window[0].device)
        # State of the open pages and of the layers, and what a step adds to either.
        at, state, further = self._numbers.unbind(0)
        steps = []
        for number, layer in enumerate(self.steady):
            steps.append(layer.begin(at[number], state[number], further[number]))
        return min(steps)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where everything lies that a step reads and writes: a graph holds while this stays."""
        return tuple(a for layer in self.steady for a in layer.addresses)

    def advance(self) -> None:
        """Make the device's numbers those of the next step; part of the step."""
        assert self._numbers is not None, "begin() comes first"
        self._numbers[:2] += self._numbers[2]
        self.forget()

    def forget(self) -> None:
        """Drop the angles of the step."""
        self._turns.clear()

    def settle(self, steps: int) -> None:
        """Tell the cache what `steps` steps have added."""
        if not steps:
            return
        for angles in self._cache.angles.values():
            angles.follow(steps)
        for layer in self.steady:
            layer.settle(steps)

    def announce(self, layer_idx: int, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
        """Take note of the angles of a layer's next token; see `KvqCache.announce`."""
        layer = self.steady[layer_idx]
        seam = next(s for s in self._cache.seam.packed if s.index == layer.store.layer)
        if seam.group not in self._turns and layer.is_turned:
            assert seam.rotation is not None
            turns = seam.rotation.angles(cos[:, 0], sin[:, 0])
            self._turns[seam.group] = layer.fixed_turns(turns)
        layer.turns = self._turns.get(seam.group)

    def announce_mask(self, mask: Tensor | None) -> None:
        """Nothing is padded here."""


class SteadyLayer(CacheLayerMixin):
    """One layer of a `SteadyCache`."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, layer: KvqLayer) -> None:
        """Stand for a layer that is read from pages."""
        super().__init__()
        assert isinstance(layer.store, PagedStore) and layer.reader is not None
        self._layer = layer
        self.store: PagedStore = layer.store
        self.turns: Tensor | None = None
        self.is_sliding = layer.is_sliding
        self.is_initialized = True
        self._keys: SteadyKeys | None = None
        self._at: Tensor | None = None
        self._table: Tensor | None = None
        self._nothing: Tensor | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the next token can go into the open page."""
        return self.store.is_steady and self._layer.path.is_witnessed

    @property
    def is_turned(self) -> bool:
        """Whether keys are stored before RoPE."""
        return self.store.form.inv_freq is not None

    def fixed_turns(self, turns: Pair) -> Tensor:
        """Return a token's angles as `OpenPage.write` takes them, from (batch or 1, width / 2)."""
        key, open_page = self.store.window[0], self.store.open_page
        return open_page.fixed_turns((turns[0][None], turns[1][None]), key)

    def begin(self, at: Tensor, state: Tensor, further: Tensor) -> int:
        """Take the layer as it is.

        Args:
            at: (batch, 8) int32, to hold where the open page's next token goes.
            state: (batch, 8) int32, to hold `PackedContext.state` of the next query.
            further: (batch, 8) int32, to hold what a step adds to either.

        Returns:
            How many steps may follow.
        """
        store, layer = self.store, self._layer
        seen_from = layer.first_seen()
        position = None if layer.angles is None else layer.angles.first
        context = store.lend(layer.read_angles, position, seen_from)
        steps = PAGE_TOKENS - store.open_page.tokens
        at.zero_()
        at[:, 0] = store.open_page.tokens
        state.copy_(context.state)
        state[:, _PACKED] += 1
        further.zero_()
        further[:, _PACKED] = 1
        if layer.sliding_window:
            if seen_from >= max(store.sinks + store.dropped, 1):
                further[:, _FIRST_SEEN] = 1
            else:  # until the window leaves the first tokens behind, a step at a time
                steps = min(steps, max(layer.sliding_window - 1 - store.tokens + 1, 1))
        # `at` shares `further` and has no first token seen: that column is nothing there.
        pages = replace(context.pages, page_table=self._roomy(context.pages.page_table))
        self._at = at
        assert layer.reader is not None
        self._keys = SteadyKeys(layer.reader, PackedContext(pages, context.exact, state))
        if self._nothing is None or len(self._nothing) != store.batch:
            geometry = store.geometry
            shape = store.batch, geometry.num_kv_heads, 1, geometry.key_dim
            self._nothing = store.window[0].new_full((1,), math.nan).expand(shape)
        if not self.is_turned:
            self.turns = store.open_page.fixed_turns(None, store.window[0])
        return steps

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token of every sequence, (batch, num_kv_heads, 1, head_dim), and return what
        carries the pages to attention.
        """
        assert self._keys is not None and self._at is not None and self.turns is not None
        self.store.write_open((key_states, value_states), self.turns, self._at)
        assert self._nothing is not None
        shown = self._nothing.view_as(self._nothing)
        mark_packed(shown, self._keys)
        return shown, shown

    @property
    def addresses(self) -> tuple[int, ...]:
        """See `SteadyCache.addresses`."""
        assert self._keys is not None and self._at is not None
        context = self._keys.context
        parts = [*vars(context.pages).values(), *vars(context.exact).values(), context.state]
        parts += [self._at, *self.store.open_page.tensors]
        sizes = [context.exact.sink_key.shape[2], context.exact.window_key.shape[2]]
        sizes += [context.pages.page_table.shape[1]]
        return (*(part.data_ptr() for part in parts), *sizes)

    def settle(self, steps: int) -> None:
        """Tell the layer what was added, and let go of its pages: they may be copied to grow, and
        all layers' old ones would stay until `begin`.
        """
        self._keys = None
        self._layer.path.calls["fused"] += steps
        self.store.settle_open(steps, self._layer.read_angles)
        self.store.drop_unseen()

    def _roomy(self, table: Tensor) -> Tensor:
        """Return the page table in a tensor that stays while pages are added."""
        batch, blocks = table.shape
        if self._table is None or len(self._table) != batch or self._table.shape[1] < blocks:
            self._table = table.new_zeros(batch, blocks + max(_SPARE_PAGES, blocks // 8))
        self._table[:, :blocks] = table
        return self._table

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there are states already."""

    def get_seq_length(self) -> int:
        """Return the tokens the cache knew of at `begin`."""
        return self.store.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return a mask of one token: what a query sees stands on the device."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Return -1: without bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return the same under the name transformers 5.17 asks for."""
        return -1


@dataclass(frozen=True)
class SteadyKeys:
    """What attention reads of one layer."""

    reader: PageReader
    context: PackedContext
    sees_all: bool = True

    def attend(self, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Return the output of one query a sequence, (batch, 1, num_heads, head_dim)."""
        return self.reader.attend(query, self.context, scaling, softcap)

    def attend_causal(self, query: Tensor, scaling: float) -> Tensor:
        """Attend with several queries, which a steady step never has."""
        raise AssertionError("steady steps have one query")

    def expand(self) -> Pair:
        """Return the keys and values themselves; the host would have to wait for their number."""
        raise AssertionError("steady steps are read by the kernel only")
