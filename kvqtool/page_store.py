"""The whole pages of one layer in their device form: they grow, give their rows back, and go.

Every 128 tokens that a layer has packed become a page of each sequence, and their canonical rows
are dropped: nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvqtool.kernel_scratch import GROWTH
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS
from kvqtool.page_memory import QUAD, SLABS
from kvqtool.pages import Pages, PageSide, build_pages
from kvqtool.recover import (
    Exceptions,
    build_rows,
    count_outliers,
    find_exceptions,
)

Rows = tuple[dict[str, Tensor], dict[str, Tensor]]


class Growing:
    """A tensor whose first axis grows, with a little room so that few appends copy it."""

    def __init__(self) -> None:
        """Start empty."""
        self.buffer: Tensor | None = None
        self.length = 0

    def append(self, rows: Tensor) -> None:
        """Add rows at the end, (n, ...)."""
        total = self.length + len(rows)
        if self.buffer is None or len(self.buffer) < total:
            grown = rows.new_zeros(total + self.length // GROWTH, *rows.shape[1:])
            if self.buffer is not None:
                grown[: self.length] = self.buffer[: self.length]
            self.buffer = grown
        self.buffer[self.length : total] = rows
        self.length = total

    def keep(self, first: int, last: int, head: int = 0) -> None:
        """Keep the first `head` rows and, counted behind them, rows first..last-1, in a tensor of
        their own: who reads the old one still may.
        """
        rows = self.read()
        self.buffer = torch.cat([rows[:head], rows[head + first : head + last]])
        self.length = len(self.buffer)

    def put_before(self, rows: Tensor, instead_of: int) -> None:
        """Put rows in place of the first few."""
        rest = [self.read()[instead_of:]] if self.buffer is not None else []
        self.buffer = torch.cat([rows, *rest])
        self.length = len(self.buffer)

    def read(self) -> Tensor:
        """Return the rows, contiguous."""
        assert self.buffer is not None, "nothing was appended yet"
        return self.buffer[: self.length]


class PageStore:
    """Whole pages of one layer. Its sides are templates: what reads rows, without rows."""

    def __init__(self, sides: tuple[PageSide, PageSide], batch: int) -> None:
        """Start empty for a batch; `sides` are the keys' and the values', their rows ignored."""
        self.sides = sides
        self.batch = batch
        self.clear()

    def clear(self) -> None:
        """Forget every page."""
        self.blocks = 0
        self._buffers = {name: Growing() for name in ("slabs", "ranges", "outlier_index")}
        self._counts, self._words = Growing(), Growing()
        self._table: Tensor | None = None
        self._exceptions: list[Exceptions] = []
        self.head_words = self._head = 0

    def reserve(self, pages: Pages) -> None:
        """Put a page of each sequence before all others, for its owner to write."""
        assert not self._head, "one page is reserved at most"
        further = (len(pages.outlier_words) - self.head_words) // QUAD
        if self.blocks:
            self._buffers["outlier_index"].read()[..., 0::2] += further
        for name, buffer in self._buffers.items():
            buffer.put_before(getattr(pages, name), 0)
        self._words.put_before(pages.outlier_words, self.head_words)
        self.head_words, self._head = len(pages.outlier_words), self.batch
        self._number_pages()

    def reserved(self, page_table: Tensor) -> Pages:
        """Return the reserved page where it lies now, under a page table of its own."""
        slabs, ranges, index = (b.read()[: self._head] for b in self._buffers.values())
        return Pages(slabs, ranges, index, self._words.read(), page_table)

    @property
    def has_pages(self) -> bool:
        """Whether there is any page, reserved ones too."""
        return self._table is not None

    @property
    def tokens(self) -> int:
        """Tokens of each sequence that lie in pages."""
        return self.blocks * PAGE_TOKENS

    @property
    def pages(self) -> Pages:
        """The pages as kernels read them, without spare room."""
        assert self._table is not None, "there is no page yet"
        slabs, ranges, index = (buffer.read() for buffer in self._buffers.values())
        return Pages(slabs, ranges, index, self._words.read(), self._table)

    def nothing(self, device: torch.device) -> Pages:
        """Return no pages, as kernels read them."""
        key, value = self.sides
        words = SLAB_TOKENS * key.head_dim * (key.spec.bits + value.spec.bits) // 32
        none = torch.zeros(0, key.num_heads, SLABS, words, dtype=torch.int32, device=device)
        return Pages(
            none,
            none.new_zeros(0, PAGE_TOKENS, 2, dtype=torch.float16),
            none.new_zeros(0, key.num_heads, SLABS, 4),
            none.new_zeros(QUAD),
            none.new_zeros(self.batch, 0),
        )

    def append(self, rows: Rows) -> None:
        """Add the canonical rows of whole pages."""
        sides = self._sides_of(rows)
        fresh, counts = build_pages(*sides, self.batch), count_outliers(sides, self.batch)
        self.add(fresh, counts, [find_exceptions(fresh, counts, s, self.batch) for s in sides])

    def add(
        self,
        fresh: Pages,
        counts: Tensor,
        found: Sequence[Exceptions],
        quads: int | None = None,
    ) -> None:
        """Add whole pages.

        Args:
            fresh: the pages; their index is changed.
            counts: what `recover.count_outliers` says of them.
            found: what `recover.find_exceptions` says, of keys and of values.
            quads: of words, where that is known; None to ask the index.
        """
        index = fresh.outlier_index
        if not self._words.length:
            self._words.append(fresh.outlier_words.new_zeros(QUAD))  # nobody's, never empty
            self.head_words = QUAD
        index[..., 0::2] += self._words.length // QUAD
        for buffer, tensor in zip(
            self._buffers.values(), (fresh.slabs, fresh.ranges, index), strict=True
        ):
            buffer.append(tensor)
        self._counts.append(counts)
        used = int(_quads(index).sum()) if quads is None else quads
        self._words.append(fresh.outlier_words[: used * QUAD])
        self._add_exceptions(found)
        self.blocks += len(counts) // self.batch
        self._number_pages()

    def rows(self, first: int) -> Rows:
        """Return the canonical rows of the pages from block `first` on."""
        start, shift = self._head + first * self.batch, first * PAGE_TOKENS * self.batch
        pages = self.pages
        index = pages.outlier_index[start:]
        part = replace(
            pages, slabs=pages.slabs[start:], ranges=pages.ranges[start:], outlier_index=index
        )
        counts = self._counts.read()[first * self.batch :]
        key, value = (
            build_rows(part, counts, side, self.batch, _since(found, shift * side.channels))
            for side, found in zip(self.sides, self._exceptions, strict=True)
        )
        return key, value

    def keep(self, first: int, last: int) -> None:
        """Keep blocks first..last-1."""
        if last <= first and not self._head:
            self.clear()
            return
        last = max(first, last)
        start, stop = first * self.batch, last * self.batch
        sizes = _quads(self._buffers["outlier_index"].read()[self._head :]).cumsum(0)
        begin, end = (int(sizes[at - 1]) if at else 0 for at in (start, stop))
        self._words.keep(begin * QUAD, end * QUAD, self.head_words)
        for buffer in self._buffers.values():
            buffer.keep(start, stop, self._head)
        if self.blocks:
            self._counts.keep(start, stop)
        self._buffers["outlier_index"].read()[self._head :, ..., 0::2] -= begin
        shift, rows = first * PAGE_TOKENS * self.batch, (last - first) * PAGE_TOKENS * self.batch
        kept = []
        for side, found in zip(self.sides, self._exceptions, strict=True):
            since = _since(found, shift * side.channels)
            within = since.place < rows * side.channels
            kept.append(Exceptions(since.place[within], since.value[within]))
        self._exceptions = kept
        self.blocks = last - first
        self._number_pages()

    @property
    def outliers(self) -> tuple[int, int]:
        """Outliers of keys and of values in all pages."""
        if not self.blocks:
            return 0, 0
        key, value = self._counts.read().sum((0, 1, 2)).tolist()
        return key, value

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """Every allocated tensor, by name."""
        if self._table is None:
            return {}
        grown = {**self._buffers, "outlier_counts": self._counts, "outlier_words": self._words}
        named = {name: [b.buffer] for name, b in grown.items() if b.buffer is not None}
        named["page_table"] = [self._table]
        named["exceptions"] = [t for found in self._exceptions for t in vars(found).values()]
        return named

    def _sides_of(self, rows: Rows) -> tuple[PageSide, PageSide]:
        key, value = (replace(side, rows=r) for side, r in zip(self.sides, rows, strict=True))
        return key, value

    def _add_exceptions(self, found: Sequence[Exceptions]) -> None:
        before = self.tokens * self.batch
        shifted = [
            Exceptions(fresh.place + before * side.channels, fresh.value)
            for side, fresh in zip(self.sides, found, strict=True)
        ]
        if not self._exceptions:
            self._exceptions = shifted
            return
        self._exceptions = [
            Exceptions(torch.cat([old.place, new.place]), torch.cat([old.value, new.value]))
            for old, new in zip(self._exceptions, shifted, strict=True)
        ]

    def _number_pages(self) -> None:
        device, count = self._words.read().device, self.blocks * self.batch
        pages = torch.arange(count + self._head, dtype=torch.int32, device=device).roll(-self._head)
        self._table = pages.view(-1, self.batch).T.contiguous()


def _quads(index: Tensor) -> Tensor:
    """Return how many quads of words each page has, (pages,) int64."""
    return (index[..., 1::2] & 0x7FFFFFFF).sum((1, 2, 3))


def _since(found: Exceptions, place: int) -> Exceptions:
    """Return the exceptions from a place on, counted from there."""
    kept = found.place >= place
    return Exceptions(found.place[kept] - place, found.value[kept])
