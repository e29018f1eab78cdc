"""A layer's store whose packed body attention reads straight from pages.

Codes are those of `LayerStore`, bit for bit, and so is what is saved. Tokens that fill no page yet
are kept decoded as well: kernels read them, at most 127, beside the recent window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.fused import ExactTokens, PackedContext
from kvqtool.hadamard import rotate_heads
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS
from kvqtool.open_page import OpenPage
from kvqtool.packed import Body
from kvqtool.page_body import PageBody
from kvqtool.page_memory import SLABS
from kvqtool.pages import Pages, PageSide
from kvqtool.read_path import PageForm
from kvqtool.rows import Pair, Rows, join
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
        self._body: PageBody | None = None
        self._decoded: Pair | None = None
        self._angles: Angles | None = None
        if self._open is not None:
            self._open.close()

    def commit(self, angles: Angles, *, held: int = 0) -> None:
        """Encode what is past the recent window, but for the last `held` tokens of it."""
        self._angles = angles
        leaving, staying = self._split_window(held)
        body, opened, tokens = self._pages_of(), self._open, leaving[0].shape[2]
        if opened is None or not self.uses_pages or not opened.can_take(leaving[0]) or not tokens:
            super().commit(angles, held=held)
            return
        if tokens == 1 and not body.rest[0].tokens:
            self._append_open(leaving, angles)
            self._exact["window"] = staying[0].clone(), staying[1].clone()
            if opened.tokens == PAGE_TOKENS:
                self._settle()
                self._fill()
            return
        states = join(opened.states(), leaving) if opened.tokens else leaving
        self._settle()
        super().commit(angles, held=held)
        self._reopen(states)

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

    def context(self, angles: Angles, position: Tensor | None, start: int) -> PackedContext:
        """Return the tokens from `start` on as kernels read them.

        Args:
            angles: as in `append`.
            position: (batch,) of each sequence's first token; None where keys are not rotated.
            start: the first token that is seen.
        """
        body = self._pages_of()
        sink = tuple(self._kernel_form(self._exact["sink"], start))
        behind = max(start - self.sinks - self.dropped, 0)
        tail = self._tail(angles)
        packed = body.pages.tokens + self._waiting()
        window = tuple(self._kernel_form(tail, behind - packed))
        pages = body.pages.pages if body.pages.has_pages else self._no_pages()
        state = torch.zeros(self.batch, _STATE_COLUMNS, dtype=torch.int32, device=sink[0].device)
        state[:, 0], state[:, 1] = packed, sink[0].shape[2]
        state[:, 2] = window[0].shape[2]
        if position is not None:
            state[:, 3] = position + self.sinks + self.dropped
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
        return self._open is not None and self.uses_pages and self._open.can_take(self.window[0])

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
        self._angles = angles
        self.tokens += tokens
        self.open_page.tokens += tokens
        if self.open_page.tokens == PAGE_TOKENS:
            self._settle()
            self._fill()

    def _new_bodies(self, channels: tuple[int, int], batch: int) -> tuple[Body, Body]:
        head_dim = len(self.form.order)
        orders = self.form.order, None
        key, value = (
            PageSide({}, book, spec, width // head_dim, head_dim, order)
            for book, spec, width, order in zip(
                self._codebooks, (self.spec.key, self.spec.value), channels, orders, strict=True
            )
        )
        self._body = PageBody((key, value), batch, self._waiting, self._settle)
        return self._body.sides

    def _add(self, encoded: tuple[Rows, Rows], angles: Angles) -> None:
        """Put encoded tokens behind the body, and whole pages into their device form."""
        body = self._pages_of()
        before = body.rest[0].tokens
        super()._add(encoded, angles)
        if not self.uses_pages:
            return
        if self._fill() or (self._decoded is None and before):
            self._decoded = None
            return
        first = self.sinks + self.dropped + body.pages.tokens + before
        fresh = self._decode(encoded, first, angles)
        self._decoded = fresh if self._decoded is None else join(self._decoded, fresh)

    def _fill(self) -> bool:
        filled = self.uses_pages and self._pages_of().fill()
        if filled:
            self._decoded = None
        return filled

    def _tail(self, angles: Angles) -> Pair:
        """Return what follows the pages as attention sees it: keys after RoPE and values."""
        body, (leaving, window) = self._pages_of(), self._split_window()
        first, rest = self.sinks + self.dropped + body.pages.tokens, body.rest
        if not leaving[0].shape[2] and not rest[0].tokens:
            return window
        if self._decoded is None and rest[0].tokens:
            self._decoded = self._decode((rest[0].read(), rest[1].read()), first, angles)
        tail = window if self._decoded is None else join(self._decoded, window)
        if leaving[0].shape[2]:
            at = self.sinks + self.dropped + self.bodies[0].tokens
            held = self._decode(self._encode(leaving, angles), at, angles)
            tail = (
                join(held, window)
                if self._decoded is None
                else join(join(self._decoded, held), window)
            )
        return tail

    def _kernel_form(self, states: Pair, start: int) -> Pair:
        """Return exact states from `start` on in the form in which pages decode: keys unscaled,
        values rotated.
        """
        key, value = (part[:, :, max(start, 0) :] for part in states)
        if self.form.scaling != 1:
            key = (key.float() / self.form.scaling).to(key.dtype)
        if self.spec.value.rotated and value.numel():
            value = rotate_heads(value.float()).to(value.dtype)
        return key.contiguous(), value.contiguous()

    def _waiting(self) -> int:
        """Return the tokens of the open page."""
        return 0 if self._open is None else self._open.tokens

    def _append_open(self, states: Pair, angles: Angles) -> None:
        """Put one token, (batch, num_kv_heads, 1, head_dim), into the open page."""
        assert self._open is not None
        at = self.sinks + self.dropped + self.bodies[0].tokens
        turns = None if self.form.inv_freq is None else angles(at, at + 1)
        self._open.append(states, turns, self._pages_of().pages)

    def _settle(self) -> None:
        """Give the tokens of the open page their rows."""
        if not self._waiting():
            return
        assert self._open is not None and self._angles is not None
        body = self._pages_of()
        states = self._open.states()
        self._open.empty(body.pages)
        for rest, rows in zip(body.rest, self._encode(states, self._angles), strict=True):
            rest.append(rows)
        self._decoded = None

    def _reopen(self, states: Pair) -> None:
        """Put the tokens behind the pages into the open page, where their states are among these,
        the last ones stored.
        """
        body = self._pages_of()
        behind = body.rest[0].tokens
        if self._open is None or not 0 < behind <= states[0].shape[2]:
            return
        key, value = (
            replace(side, rows=rest.read())
            for side, rest in zip(body.pages.sides, body.rest, strict=True)
        )
        last = states[0][:, :, -behind:], states[1][:, :, -behind:]
        self._open.load((key, value), last, body.pages)
        for rest in body.rest:
            rest.clear(rest.batch)
        self._decoded = None

    def _no_pages(self) -> Pages:
        heads, head_dim = self.geometry.num_kv_heads, self.geometry.key_dim
        words = SLAB_TOKENS * head_dim * (self.spec.key.bits + self.spec.value.bits) // 32
        like = self.window[0]
        none = like.new_zeros(0, heads, SLABS, words, dtype=torch.int32)
        return Pages(
            none,
            like.new_zeros(0, SLABS * SLAB_TOKENS, 2, dtype=torch.float16),
            like.new_zeros(0, heads, SLABS, 4, dtype=torch.int32),
            like.new_zeros(4, dtype=torch.int32),
            like.new_zeros(self.batch, 0, dtype=torch.int32),
        )

    def _pages_of(self) -> PageBody:
        assert self._body is not None, "the layer has stored nothing yet"
        return self._body
