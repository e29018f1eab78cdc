"""A layer's store whose packed body attention reads straight from pages.

Codes are those of `LayerStore`, bit for bit, and so is what is saved. Tokens that fill no page yet
are kept decoded as well: kernels read them, at most 127, beside the recent window.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.fused import ExactTokens, PackedContext
from kvqtool.memory import PAGE_TOKENS
from kvqtool.open_page import OpenPage
from kvqtool.packed import Body
from kvqtool.packing import Packed
from kvqtool.page_body import PageBody
from kvqtool.page_writer import PageWriter
from kvqtool.pages import PageSide
from kvqtool.read_path import PageForm
from kvqtool.rows import Pair, Rows, check_finite, cut, extremes, join, own
from kvqtool.scratch import pages_at_once
from kvqtool.seam import LayerSeam
from kvqtool.spec import KvSpec
from kvqtool.store import Angles, LayerStore

_STATE_COLUMNS: Final = 8


class PagedStore(LayerStore):
    """A store that keeps whole pages in their device form while `uses_pages`."""

    def __init__(
        self,
        spec: KvSpec,
        codebooks: tuple[Codebook, Codebook],
        seam: LayerSeam,
        form: PageForm,
        open_page: OpenPage | None = None,
    ) -> None:
        """Start empty; the arguments are those of `LayerStore`, how keys lie in pages, and what
        takes tokens that fill no page yet (None to keep their rows).
        """
        self.form = form
        self.uses_pages = True
        self._open = open_page
        super().__init__(spec, codebooks, seam)

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self._is_borrowed = False
        self._body: PageBody | None = None
        self._decoded: Pair | None = None
        self._angles: Angles | None = None
        if self._open is not None:
            self._open.close()

    def commit(self, angles: Angles, *, held: int = 0) -> None:
        """Encode what is past the recent window, but for the last `held` tokens of it."""
        self._angles = angles
        leaving, staying = self._split_window(held)
        body, tokens = self._pages_of(), leaving[0].shape[2]
        if not self.uses_pages:
            super().commit(angles, held=held)
        elif tokens == 1 and not body.rest[0].tokens and self._writer_of(leaving[0]):
            self._append_open(leaving, angles)
            self._close_full(angles)
        elif tokens:
            states = join(self._take_open(), leaving) if self._waiting() else leaving
            self._add_pages(states, angles)
        if tokens or self._is_borrowed:
            self._exact["window"], self._is_borrowed = own(staying), False

    def leave_pages(self) -> None:
        """Keep canonical rows only, from now on."""
        self.uses_pages = False
        self._decoded = None
        if self._body is not None:
            self._settle()
            self._body.unload()

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        super().truncate(tokens)
        self._decoded = None

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences."""
        super().select(sequences)
        self._decoded = None
        if self._open is not None:
            self._open.close()
        self._fill()

    def restore(self, exact: dict[str, Pair], rows: tuple[Rows, Rows], tokens: int) -> None:
        """Fill an empty store with what a store of `tokens` tokens held."""
        super().restore(exact, rows, tokens)
        self._fill()

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """Every allocated tensor; `decoded` are those of the tokens that fill no page."""
        named = super().tensors
        if self._decoded:
            named["decoded"] = list(self._decoded)
        if self._open is not None and self._open.tensors:
            named["open"] = self._open.tensors
        return named

    def skip(self, tokens: int) -> None:
        """Count tokens that are kept elsewhere: those to come follow them."""
        self.tokens += tokens
        self.dropped += tokens

    def context(self, angles: Angles, position: Tensor | None, start: int) -> PackedContext:
        """Return the tokens from `start` on as kernels read them.

        Args:
            angles: as in `append`.
            position: (batch,) of each sequence's first token; None where keys are not rotated.
            start: the first token that is seen.
        """
        body = self._pages_of()
        sink = self._kernel_form(self._exact["sink"], start)
        behind = max(start - self.sinks - self.dropped, 0)
        tail = self._tail(angles)
        packed = body.pages.tokens + self._waiting()
        window = self._kernel_form(tail, behind - packed)
        pages = body.pages.pages if body.pages.has_pages else body.pages.nothing(sink[0].device)
        state = torch.zeros(self.batch, _STATE_COLUMNS, dtype=torch.int32, device=sink[0].device)
        state[:, 0], state[:, 1] = packed, sink[0].shape[2]
        state[:, 2] = window[0].shape[2]
        if position is not None:
            state[:, 3] = position.to(state.device) + self.sinks + self.dropped
        state[:, 4] = min(behind, packed)
        return PackedContext(pages, ExactTokens(*sink, *window), state)

    @property
    def open_page(self) -> OpenPage:
        """The page that takes new tokens."""
        assert self._open is not None, "the layer keeps rows"
        return self._open

    @property
    def can_lend(self) -> bool:
        """Whether new tokens can go into the open page at all."""
        return self.uses_pages and self._writer_of(self.window[0]) is not None

    @property
    def is_steady(self) -> bool:
        """Whether the next token goes into the open page and nowhere else."""
        is_whole = not self.is_empty and self.sinks == self.spec.sink_tokens
        return is_whole and self.can_lend and not self._pages_of().rest[0].tokens

    def lend(self, angles: Angles, position: Tensor | None, start: int) -> PackedContext:
        """Return `context` with the open page among the pages, for `write_open` to write to."""
        self.open_page.prepare(self.window[0], self._pages_of().pages)
        return self.context(angles, position, start)

    def write_open(self, states: Pair, turns: Tensor, at: Tensor) -> None:
        """Write one token of every sequence; see `OpenPage.write`. The store does not know of it
        before `settle_open`.
        """
        self.open_page.write(states, turns, self._pages_of().pages, at)

    def settle_open(self, tokens: int, angles: Angles) -> None:
        """Take note of tokens that were written to the open page."""
        self._angles, self.tokens = angles, self.tokens + tokens
        self.open_page.tokens += tokens
        self._close_full(angles)

    def _close_full(self, angles: Angles) -> None:
        if self.open_page.tokens == PAGE_TOKENS:
            self._add_pages(self._take_open(), angles)

    def _new_bodies(self, channels: tuple[int, int], batch: int) -> tuple[Body, Body]:
        head_dim, specs = len(self.form.order), (self.spec.key, self.spec.value)
        orders = self.form.order, None
        key, value = (
            PageSide({}, book, spec, width // head_dim, head_dim, order)
            for book, spec, width, order in zip(
                self._codebooks, specs, channels, orders, strict=True
            )
        )
        if self._open is not None:
            self._open.writer.books = self._codebooks
        self._body = PageBody((key, value), batch, self._waiting, self._settle)
        return self._body.sides

    def _add(self, encoded: tuple[Rows, Rows], angles: Angles) -> None:
        """Put encoded tokens behind the body, and whole pages into their device form."""
        body = self._pages_of()
        before = body.rest[0].tokens
        super()._add(encoded, angles)
        if not self.uses_pages or self._fill() or (self._decoded is None and before):
            return
        first = self.sinks + self.dropped + body.pages.tokens + before
        fresh = self._decode(encoded, first, angles)
        self._decoded = fresh if self._decoded is None else join(self._decoded, fresh)

    def _behind_window(self, states: Pair) -> Pair:
        if self.window[0].shape[2]:
            return join(self.window, states)
        self._is_borrowed = True  # until they are committed, so that a prompt is not copied
        return states

    def _add_pages(self, states: Pair, angles: Angles) -> None:
        """Encode tokens behind the body some at a time, by kernels where they can."""
        tokens, ends, writer = states[0].shape[2], extremes(states), self._writer_of(states[0])
        size = pages_at_once(self.batch, self.geometry.key_channels)
        first = min(-self._pages_of().rest[0].tokens % PAGE_TOKENS, tokens)
        bounds = sorted({0, *range(first, tokens, size), tokens})
        if writer is not None and (tokens - first) % PAGE_TOKENS:  # before a GPU is waited for
            self.open_page.prepare(states[0], self._pages_of().pages)
        for start, stop in pairwise(bounds):
            part, at = cut(states, start, stop), self.sinks + self.dropped + self.bodies[0].tokens
            if writer is None or start < first:
                check_finite(ends, self.layer)
                self._add(self._encode(part, angles), angles)
                continue
            turns = None if self.form.inv_freq is None else angles(at, at + stop - start)
            packed = writer.pack(part, turns)
            check_finite(ends, self.layer)  # now that the GPU is waited for anyway
            self._add_packed(part, packed)

    def _writer_of(self, states: Tensor) -> PageWriter | None:
        opened = self._open
        return opened.writer if opened is not None and opened.writer.can_take(states) else None

    def _add_packed(self, states: Pair, packed: Packed) -> None:
        """Put packed tokens behind the pages; those that fill no page go into the open one."""
        pages, tokens = self._pages_of().pages, states[0].shape[2]
        whole = tokens // PAGE_TOKENS * PAGE_TOKENS
        if whole < tokens:
            elements = whole * self.batch * pages.sides[0].channels
            packed, last = packed.split(whole // PAGE_TOKENS * self.batch, elements)
            self.open_page.load(cut(states, whole), last, pages)
        if whole:
            pages.add(packed.pages, packed.counts, packed.exceptions, packed.quads)
        self._decoded = None

    def _fill(self) -> bool:
        filled = self.uses_pages and self._pages_of().fill()
        self._decoded = None if filled else self._decoded
        return filled

    def _tail(self, angles: Angles) -> Pair:
        """Return what follows the pages as attention sees it: keys after RoPE and values."""
        body, (leaving, window) = self._pages_of(), self._split_window()
        first, rest = self.sinks + self.dropped + body.pages.tokens, body.rest
        if not leaving[0].shape[2] and not rest[0].tokens:
            return window
        if self._decoded is None and rest[0].tokens:
            self._decoded = self._decode((rest[0].read(), rest[1].read()), first, angles)
        parts = [] if self._decoded is None else [self._decoded]
        if leaving[0].shape[2]:
            at = self.sinks + self.dropped + self.bodies[0].tokens
            parts.append(self._decode(self._encode(leaving, angles), at, angles))
        return reduce(join, [*parts, window])

    def _kernel_form(self, states: Pair, start: int) -> Pair:
        """Return exact states from `start` on in the form in which pages decode."""
        seen = cut(states, max(start, 0))
        return self.form.as_stored(seen, has_turned_values=self.spec.value.rotated)

    def _waiting(self) -> int:
        """Return the tokens of the open page."""
        return 0 if self._open is None else self._open.tokens

    def _append_open(self, states: Pair, angles: Angles) -> None:
        """Put one token, (batch, num_kv_heads, 1, head_dim), into the open page."""
        at = self.sinks + self.dropped + self.bodies[0].tokens
        turns = None if self.form.inv_freq is None else angles(at, at + 1)
        self.open_page.append(states, turns, self._pages_of().pages)

    def _settle(self) -> None:
        """Give the tokens of the open page their rows."""
        if not self._waiting():
            return
        assert self._angles is not None
        rows = self._encode(self._take_open(), self._angles)
        for rest, fresh in zip(self._pages_of().rest, rows, strict=True):
            rest.append(fresh)
        self._decoded = None

    def _take_open(self) -> Pair:
        """Return the states of the open page's tokens and forget them there."""
        states = self.open_page.states()
        self.open_page.empty(self._pages_of().pages)
        return states

    def _pages_of(self) -> PageBody:
        assert self._body is not None, "the layer has stored nothing yet"
        return self._body
