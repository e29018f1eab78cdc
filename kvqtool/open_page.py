"""The tokens of a layer that fill no page yet, where the append kernel knows the scheme.

Their codes lie in a page of their own that attention reads with the others, and their states are
kept until it is full.

The states are packed when the page is full and encoded when rows are asked for: nothing that is
kept or saved depends on this kernel.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvqtool.appending import GrowingPages, append, new_pages
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS, outliers_per_tail
from kvqtool.packing import Packed
from kvqtool.page_memory import QUAD
from kvqtool.page_store import PageStore
from kvqtool.page_writer import PageWriter
from kvqtool.pages import Pages
from kvqtool.recover import listed_words
from kvqtool.rows import Pair


class OpenPage:
    """One layer's open page, at the head of its `PageStore`."""

    def __init__(self, writer: PageWriter) -> None:
        """Start without memory; `writer` writes the layer's whole pages."""
        self.writer = writer
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        self.tokens = 0
        self._growing: GrowingPages | None = None
        self._states: Pair | None = None
        self._at: Tensor | None = None

    def append(self, states: Pair, turns: Pair | None, pages: PageStore) -> None:
        """Add one token of every sequence.

        Args:
            states: keys after RoPE and values, (batch, num_kv_heads, 1, head_dim).
            turns: cosine and sine of each pair, (1, batch, width / 2) float32; None where keys are
                not rotated.
            pages: the store this page stands at the head of.
        """
        self.prepare(states[0], pages)
        assert self._at is not None
        self._at[:, 0] = self.tokens
        self.write(states, self.fixed_turns(turns, states[0]), pages, self._at)
        self.tokens += 1

    def prepare(self, states: Tensor, pages: PageStore) -> None:
        """Allocate what is missing, for states (batch, num_kv_heads, any, head_dim)."""
        if self._growing is None:
            self._open(states, pages)

    def write(self, states: Pair, turns: Tensor, pages: PageStore, at: Tensor) -> None:
        """Write one token of every sequence where `at` says, and nothing the host knows: `tokens`
        stays as it is.

        Args:
            states: as for `append`.
            turns: from `fixed_turns`.
            pages: the store this page stands at the head of, as it was when `prepare` ran.
            at: (batch, 8) int32, the tokens that are in the page in its first column.
        """
        assert self._growing is not None and self._states is not None
        place = at[:1, 0].long()
        for kept, fresh in zip(self._states, states, strict=True):
            kept.index_copy_(2, place, fresh)
        key, value = (part[:, :, 0].contiguous() for part in states)
        growing = replace(self._growing, pages=self._place(pages))
        variant = self.writer.reader.variant(key.shape[1], key)
        tables, code = self.writer.reader.tables_on(key.device), self.writer.code_for(key)
        append((key, value, turns, at), growing, code, tables, variant, self.writer.run)

    def load(self, states: Pair, packed: Packed, pages: PageStore) -> None:
        """Hold these tokens, fewer than a page has room for, and no others.

        Args:
            states: keys after RoPE and values, (batch, num_kv_heads, tokens, head_dim).
            packed: the page that `writer` made of them.
            pages: the store this page stands at the head of, prepared.
        """
        assert self._states is not None, "the page was not prepared"
        place = self._place(pages)
        self.tokens = states[0].shape[2]
        place.slabs.copy_(packed.pages.slabs)
        place.ranges.copy_(packed.pages.ranges)
        for kept, given in zip(self._states, states, strict=True):
            kept[:, :, : self.tokens] = given
        for side in (0, 1):
            self._write_lists(place, packed, side)

    def _write_lists(self, place: Pages, packed: Packed, side: int) -> None:
        """Write one side's outliers into the room of lists."""
        assert self._growing is not None
        index, counts = place.outlier_index.view(-1, 4), packed.counts[..., side].flatten()
        total = int(packed.known[..., side].sum())
        owner, word = listed_words(packed.pages, packed.counts, side, total)
        within = torch.arange(total, device=owner.device) - (counts.cumsum(0) - counts)[owner]
        place.outlier_words[index[owner, 2 * side].long() * QUAD + within] = word
        index[:, 2 * side + 1] = (counts + QUAD - 1) // QUAD
        self._growing.counts.view(-1, 2)[:, side] = counts

    def states(self) -> Pair:
        """Return the tokens' states, (batch, num_kv_heads, tokens, head_dim)."""
        assert self._states is not None, "the page holds nothing"
        key, value = (part[:, :, : self.tokens] for part in self._states)
        return key, value

    def empty(self, pages: PageStore) -> None:
        """Forget the tokens."""
        if self.tokens:
            assert self._growing is not None
            place = self._place(pages)
            place.outlier_index[..., 1::2] = 0
            place.outlier_words[: pages.head_words] = 0
            self._growing.counts.zero_()
        self.tokens = 0

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor allocated beside the page itself."""
        if self._growing is None:
            return self.writer.tensors
        assert self._states is not None and self._at is not None
        beside = [self._growing.counts, self._growing.dropped, self._at]
        return [*self._states, *beside, *self.writer.tensors]

    def _open(self, states: Tensor, pages: PageStore) -> None:
        batch, heads, _, head_dim = states.shape
        spec, device, channels = self.writer.spec, states.device, heads * head_dim
        # Room for every element of a slab: nothing is ever dropped.
        most, per_tail = SLAB_TOKENS * head_dim, outliers_per_tail(spec.value, channels)
        room = most if spec.key.outlier_fraction else 0, min(2 * per_tail * SLAB_TOKENS, most)
        variant = self.writer.reader.variant(heads, states)
        self._growing = new_pages(variant, batch, heads, 1, room, device)
        pages.reserve(self._growing.pages)
        self.writer.code_for(states)  # a graph that writes finds its tables there
        shape = batch, heads, PAGE_TOKENS, head_dim
        key, value = (states.new_zeros(shape) for _ in range(2))
        self._states = key, value
        self._at = torch.zeros(batch, 8, dtype=torch.int32, device=device)

    def _place(self, pages: PageStore) -> Pages:
        """Return the page where it lies now, as the kernel that writes it takes it."""
        assert self._growing is not None
        return pages.reserved(self._growing.pages.page_table)

    def fixed_turns(self, turns: Pair | None, states: Tensor) -> Tensor:
        """Return cosines and sines by place, (batch, head_dim / 2, 2) float32, for states (batch,
        num_kv_heads, any, head_dim); `turns` as for `append`.
        """
        return self.writer.turns(turns, states, 1)[:, 0]
