"""One layer of a compressed cache, as transformers' `Cache` calls it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvqtool.angles import AngleStore
from kvqtool.attention import Band, mark_band, mark_packed, mark_witness
from kvqtool.fused import PackedContext
from kvqtool.memory import packed_tokens
from kvqtool.paged import PagedStore
from kvqtool.read_path import ReadPath
from kvqtool.reader import PageReader
from kvqtool.store import LayerStore


class KvqLayer(CacheLayerMixin):
    """One layer of the cache: hands states to its store and the store's contents back to the model.

    A sliding layer stores what it is given too, drops whole pages no query sees any more, and shows
    each call what the stock sliding layer would.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        store: LayerStore,
        angles: AngleStore | None,
        prefill: str,
        path: ReadPath,
        reader: PageReader | None = None,
    ) -> None:
        """Wrap a store.

        Args:
            store: the layer's; a `PagedStore` where `reader` reads it from pages.
            angles: what it shares with other layers; None where keys are not rotated.
            prefill: `exact` or `decode-exact`.
            path: how it is read.
            reader: what reads pages, None where nothing does.
        """
        super().__init__()
        self.store = store
        self.angles = angles
        self.prefill = prefill
        self.path = path
        self.reader = reader
        self.sliding_window = store.sliding_window
        self.is_sliding = store.sliding_window is not None
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: a store starts with the first states."""

    def activate_past_recording(self) -> None:
        """Keep what a sliding layer would drop until the next `crop`, which may go back."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new states and return what the new tokens attend to.

        Args:
            key_states: (batch, num_kv_heads, tokens, key_dim) after RoPE.
            value_states: (batch, num_kv_heads, tokens, value_dim).
            *args: ignored; transformers passes none.
            **kwargs: likewise.

        Returns:
            Keys after RoPE and values of all tokens the new ones may see, in the model's dtype.
        """
        is_prompt, tokens = self.store.is_empty, key_states.shape[2]
        window = None if is_prompt else self.store.window
        seen_from = self.first_seen()
        hold = self.record_past and self.store.spec.has_window
        self.check_path()
        self.store.append(key_states, value_states, self.read_angles, hold=hold)
        self.is_initialized = True
        if is_prompt and self.prefill == "exact":
            keys, values = key_states, value_states
            self.path.count("exact")
        else:
            keys, values = self._read(seen_from, tokens)
            if self.store.spec.has_window and tokens > 1:
                self._mark_band((keys, seen_from), (key_states, value_states), window)
        if self.path.is_fused:
            mark_witness(keys, self.path.witness)
            self.path.is_offered = True
        if not self.record_past:
            self.store.drop_unseen()
        return keys, values

    def check_path(self) -> None:
        """Leave pages for good where something that comes up only now rules them out."""
        if not isinstance(self.store, PagedStore) or not self.store.uses_pages:
            return
        if self.path.is_fused and self.path.is_offered and not self.path.is_witnessed:
            self.path.refuse("the model's attention is not handed the cache's own keys")
        if self.path.is_fused and self.store.padding:
            self.path.refuse("left padding")
        if self.path.is_fused and self.angles is not None and self.angles.first is None:
            self.path.refuse("positions that do not go on by one, or have no formula")
        if not self.path.is_fused:
            self.store.leave_pages()

    def _read(self, seen_from: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return what `tokens` new tokens attend to: from pages, or decoded by torch."""
        if not self.path.is_fused:
            self.path.count("materialise")
            return self.store.read(self.read_angles, seen_from)
        packed = self.packed(seen_from)
        is_cut = self.is_sliding or self.store.spec.has_window
        if not self.path.is_witnessed or (tokens > 1 and is_cut):
            return packed.expand()
        geometry, window = self.store.geometry, self.store.window[0]
        shape = self.store.batch, geometry.num_kv_heads, self.store.tokens - seen_from
        placeholder = window.new_full((1,), math.nan).expand(*shape, geometry.key_dim)
        mark_packed(placeholder, packed)
        return placeholder, placeholder

    def packed(self, seen_from: int) -> PackedLayer:
        """Return the tokens from `seen_from` on as the kernel reads them, of a layer that it
        reads.
        """
        assert isinstance(self.store, PagedStore) and self.reader is not None
        position = None if self.angles is None else self.angles.first
        context = self.store.context(self.read_angles, position, seen_from)
        return PackedLayer(self.reader, context, self.path)

    def _mark_band(
        self,
        shown: tuple[Tensor, int],
        fresh: tuple[Tensor, Tensor],
        window: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Tell attention which of the keys each new query still sees exactly."""
        (keys, seen_from), tail, spec = shown, fresh, self.store.spec
        if window is not None:
            pairs = zip(window, fresh, strict=True)
            key, value = (
                torch.cat([old, new], dim=2)[:, :, -keys.shape[2] :] for old, new in pairs
            )
            tail = key, value
        before = self.store.tokens - fresh[0].shape[2]
        exact_from = [
            spec.sink_tokens + packed_tokens(spec, tokens - spec.sink_tokens) - seen_from
            for tokens in range(before + 1, self.store.tokens + 1)
        ]
        mark_band(keys, Band(*tail, torch.tensor(exact_from)))

    def first_seen(self) -> int:
        """Return the first token that the next query sees."""
        return max(self.store.tokens - self.sliding_window + 1, 0) if self.sliding_window else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a call of `query_length` queries will see, and the first's index."""
        first = self.first_seen()
        return self.store.tokens - first + query_length, first

    def get_seq_length(self) -> int:
        """Return the tokens seen so far."""
        return self.store.tokens

    def get_max_length(self) -> int:
        """Return the sliding window, or -1: the cache grows without bound."""
        return self.sliding_window or -1

    def get_max_cache_shape(self) -> int:
        """Return the same under the name transformers 5.17 asks for."""
        return self.get_max_length()

    def reset(self) -> None:
        """Forget everything."""
        self.store.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens: `tokens_to_remove` is minus their number (a positive value is the
        length to keep).
        """
        if not self.store.is_empty:
            change = int(tokens_to_remove)  # transformers 5.17 passes a tensor
            keep = change if change > 0 else self.store.tokens + change
            self.store.truncate(max(keep, 0))
            self.store.commit(self.read_angles)
            self.store.drop_unseen()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the batch into the order of the chosen beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if not self.store.is_empty:
            self.batch_select_indices(repeated(self.store.batch, repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`."""
        if not self.store.is_empty:
            self.store.select(indices.to(self.store.window[0].device))

    def read_angles(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) of stored tokens start..stop-1; see `AngleStore.read`."""
        assert self.angles is not None, "only rotated layers ask for angles"
        return self.angles.read(start, stop, self.store.window[0].device)


@dataclass(frozen=True)
class PackedLayer:
    """A layer's tokens as they were at one call, for attention to read."""

    reader: PageReader
    context: PackedContext
    path: ReadPath
    sees_all: bool = False

    def attend(
        self,
        query: Tensor,
        scaling: float,
        softcap: float | None,
        log_sums: Tensor | None = None,
    ) -> Tensor:
        """Return the output of one query a sequence, (batch, 1, num_heads, head_dim); `log_sums` as
        for `PageReader.attend`.
        """
        self.path.count("fused")
        return self.reader.attend(query, self.context, scaling, softcap, log_sums)

    def attend_share(self, query: Tensor, scaling: float, own: int) -> tuple[Tensor, Tensor]:
        """Return what several queries get of these tokens; see `PageReader.attend_share`."""
        self.path.count("dequantize")
        return self.reader.attend_share(query, self.context, scaling, own)

    def attend_causal(self, query: Tensor, scaling: float) -> Tensor:
        """Return the output of a sequence's last queries, (batch, queries, num_heads, head_dim),
        each of which sees the tokens before it and its own.
        """
        self.path.count("dequantize")
        return self.reader.attend_causal(query, self.context, scaling)

    def expand(self) -> tuple[Tensor, Tensor]:
        """Return the keys after RoPE and values, (batch, num_kv_heads, tokens, head_dim)."""
        self.path.count("dequantize")
        return self.reader.expand(self.context)


def repeated(batch: int, repeats: int) -> Tensor:
    """Return the sequence each of a repeated batch's comes from: 2, 3 -> [0, 0, 0, 1, 1, 1]."""
    return torch.arange(batch).repeat_interleave(repeats)
