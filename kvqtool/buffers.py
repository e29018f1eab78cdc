"""Storage that grows at its end and shrinks at both: rows in pages, and flat runs."""

from __future__ import annotations

import torch
from torch import Tensor

# Runs of outliers shorter than this are joined, so that appending tokens one by one leaves few of
# them.
_JOIN_BELOW = 4096


class PagedBuffer:
    """Rows in pages allocated whole; the room that is left in the last page is zero and counts as
    stored.
    """

    def __init__(self, page_rows: int) -> None:
        """Start empty, with `page_rows` rows to a page."""
        self.page_rows = page_rows
        self.rows = 0
        self._blocks: list[Tensor] = []

    def append(self, rows: Tensor) -> None:
        """Add rows at the end, (n, ...)."""
        if not self._blocks:
            self._none = rows[:0].clone()
        room = sum(len(block) for block in self._blocks[-1:]) - self._used_of_last()
        head, rest = rows[:room], rows[room:]
        if len(head):
            start = self._used_of_last()
            self._blocks[-1][start : start + len(head)] = head
        if len(rest):
            pages = -(-len(rest) // self.page_rows)
            block = rest.new_zeros(pages * self.page_rows, *rest.shape[1:])
            block[: len(rest)] = rest
            self._blocks.append(block)
        self.rows += len(rows)

    def read(self) -> Tensor:
        """Return all rows, without the spare room."""
        if not self._blocks:
            return self._none
        last = self._blocks[-1][: self._used_of_last()]
        return torch.cat([*self._blocks[:-1], last]) if len(self._blocks) > 1 else last

    def truncate(self, rows: int) -> None:
        """Keep the first `rows` rows."""
        kept = self.read()[:rows] if self._blocks else None
        self._blocks, self.rows = [], 0
        if kept is not None:
            self.append(kept)

    def drop(self, rows: int) -> None:
        """Free the first `rows` rows; stored ones stay where they are if these are whole pages."""
        if rows % self.page_rows:
            kept = self.read()[rows:].clone()
            self._blocks, self.rows = [], 0
            self.append(kept)
            return
        self.rows -= rows
        while rows:
            block = self._blocks[0]
            if len(block) > rows:
                self._blocks[0] = block[rows:].clone()
                return
            self._blocks.pop(0)
            rows -= len(block)

    @property
    def tensors(self) -> list[Tensor]:
        """The allocated blocks."""
        return self._blocks

    def _used_of_last(self) -> int:
        return self.rows - sum(len(block) for block in self._blocks[:-1]) if self._blocks else 0


class RunBuffer:
    """A flat sequence of exactly what was appended."""

    def __init__(self) -> None:
        """Start empty."""
        self._runs: list[Tensor] = []

    def append(self, run: Tensor) -> None:
        """Add a run, (n,)."""
        if self._runs and len(self._runs[-1]) < _JOIN_BELOW:
            run = torch.cat([self._runs.pop(), run])
        self._runs.append(run)

    def read(self) -> Tensor:
        """Return the whole sequence."""
        return torch.cat(self._runs) if len(self._runs) > 1 else self._runs[0]

    def truncate(self, length: int) -> None:
        """Keep the first `length` elements."""
        if self._runs:
            self._runs = [self.read()[:length].clone()]

    def drop(self, length: int) -> None:
        """Free the first `length` elements."""
        if length:
            self._runs = [self.read()[length:].clone()]

    @property
    def tensors(self) -> list[Tensor]:
        """The allocated runs."""
        return self._runs
