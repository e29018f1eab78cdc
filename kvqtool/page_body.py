"""The packed body of a layer that attention reads from pages: whole pages of both sides in their
device form, and canonical rows of the tokens that fill no page yet.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvqtool.memory import PAGE_TOKENS
from kvqtool.packed import PackedBody
from kvqtool.page_store import PageStore
from kvqtool.pages import PageSide


class PageBody:
    """What both sides share: the pages, and each side's rows behind them."""

    def __init__(
        self,
        sides: tuple[PageSide, PageSide],
        batch: int,
        waiting: Callable[[], int],
        settle: Callable[[], None],
    ) -> None:
        """Start empty.

        Args:
            sides: templates, as in `PageStore`.
            batch: sequences.
            waiting: tells the tokens behind all others that have no rows yet.
            settle: gives them rows.
        """
        self.waiting = waiting
        self.settle = settle
        self.pages = PageStore(sides, batch)
        self.rest = tuple(PackedBody(side.spec, side.channels, batch) for side in sides)
        self.sides = PageBodySide(self, 0), PageBodySide(self, 1)

    def fill(self) -> bool:
        """Turn the rows of whole pages into pages; return whether there were any."""
        tokens = self.rest[0].tokens // PAGE_TOKENS * PAGE_TOKENS
        if not tokens:
            return False
        heads = []
        for rest in self.rest:
            rows = rest.read()
            rest.drop(tokens)
            kept = rest.read()
            heads.append(
                {n: t[: len(t) - (len(kept[n]) if n in kept else 0)] for n, t in rows.items()}
            )
        self.pages.append((heads[0], heads[1]))
        return True

    def unload(self, first: int = 0) -> None:
        """Turn the pages from block `first` on into rows again."""
        if first >= self.pages.blocks:
            return
        for rest, rows in zip(self.rest, self.pages.rows(first), strict=True):
            behind = rest.read()
            rest.clear(rest.batch)
            rest.append(rows)
            if behind:
                rest.append(behind)
        self.pages.keep(0, first)

    def drop(self, tokens: int) -> None:
        """Free the first tokens of every sequence, whole pages of them."""
        if self.pages.blocks:
            self.pages.keep(tokens // PAGE_TOKENS, self.pages.blocks)
        else:
            for rest in self.rest:
                rest.drop(tokens)

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences; pages become rows."""
        self.settle()
        self.unload()
        for rest in self.rest:
            rest.select(sequences)
        self.pages = PageStore(self.pages.sides, len(sequences))


class PageBodySide:
    """One side of a `PageBody`; what the sides share changes when the keys' side is asked to."""

    def __init__(self, body: PageBody, number: int) -> None:
        """Be the keys (0) or the values (1) of a body."""
        self._body = body
        self._number = number

    @property
    def channels(self) -> int:
        """C, channels of a row."""
        return self._rest.channels

    @property
    def tokens(self) -> int:
        """Tokens of each sequence, in pages and behind them."""
        return self._body.pages.tokens + self._rest.tokens + self._body.waiting()

    @property
    def outliers(self) -> int:
        """Outliers stored, in pages and behind them."""
        self._body.settle()
        return self._body.pages.outliers[self._number] + self._rest.outliers

    @property
    def widths(self) -> tuple[int, ...]:
        """Nothing: all rows of pages have the spec's bits."""
        return ()

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """Every allocated tensor by buffer; the pages' go with the keys."""
        pages = {} if self._number else self._body.pages.tensors
        return self._rest.tensors | {f"pages.{name}": tensors for name, tensors in pages.items()}

    def append(self, rows: dict[str, Tensor]) -> None:
        """Add encoded rows, whole tokens of the batch."""
        self._rest.append(rows)

    def read(self) -> dict[str, Tensor]:
        """Return the canonical rows of all tokens, {} while empty."""
        self._body.settle()
        if not self._body.pages.blocks:
            return self._rest.read()
        whole = PackedBody(self._rest.spec, self.channels, self._rest.batch)
        for rows in (self._body.pages.rows(0)[self._number], self._rest.read()):
            if rows:
                whole.append(rows)
        return whole.read()

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens; a page that is cut becomes rows again."""
        self._body.settle()
        self._body.unload(tokens // PAGE_TOKENS)
        self._rest.truncate(tokens - self._body.pages.tokens)

    def drop(self, tokens: int) -> None:
        """Free the first `tokens` tokens, on both sides."""
        if self._number == 0:
            self._body.drop(tokens)

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences, on both sides."""
        if self._number == 0:
            self._body.select(sequences)

    @property
    def _rest(self) -> PackedBody:
        return self._body.rest[self._number]
