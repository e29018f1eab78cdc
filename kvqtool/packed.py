"""Packed storage that grows: pages of rows, runs of outliers, and the body of one side made of
both.

A row is one token of one sequence; rows run token by token, sequences inside (row = token * batch +
sequence), so that a new token of a batch is a run at the end. Nothing stored is touched again when
a token is appended.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvqtool.memory import PAGE_TOKENS, body_buffers, outliers_per_tail
from kvqtool.outliers import row_of_outlier
from kvqtool.side import QuantSpec

# Runs of outliers shorter than this are joined, so that appending tokens one by one leaves few of
# them.
_JOIN_BELOW = 4096
SPARSE = ("outlier_values", "outlier_channels")
GROUPS = "group_ranges"  # a row for every group of tokens of a sequence


class Body(Protocol):
    """One side's packed rows, wherever they lie."""

    @property
    def channels(self) -> int:
        """C, channels of a row."""

    @property
    def tokens(self) -> int:
        """Tokens of each sequence."""

    @property
    def outliers(self) -> int:
        """Outliers in all rows."""

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """Every allocated tensor, by buffer."""

    def append(self, rows: dict[str, Tensor]) -> None:
        """Add encoded rows."""

    def read(self) -> dict[str, Tensor]:
        """Return all rows in the canonical layout; {} while empty."""

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""

    def drop(self, tokens: int) -> None:
        """Free the first `tokens` tokens, whole pages."""

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences."""


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
        last = self._blocks[-1][: self._used_of_last()]
        return torch.cat([*self._blocks[:-1], last]) if len(self._blocks) > 1 else last

    def truncate(self, rows: int) -> None:
        """Keep the first `rows` rows."""
        kept = self.read()[:rows] if self._blocks else None
        self._blocks, self.rows = [], 0
        if kept is not None:
            self.append(kept)

    def drop(self, rows: int) -> None:
        """Free the first `rows` rows, a whole number of pages."""
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


class PackedBody:
    """The packed rows of one side of one layer; encoding and decoding are the codec's, this keeps
    the bytes.

    Where groups of tokens share ranges, a group's rows of one sequence lie together: row = (group *
    batch + sequence) * group size + token of the group.
    """

    def __init__(self, spec: QuantSpec, channels: int, batch: int) -> None:
        """Start empty for `batch` sequences of `channels` channels a token."""
        self.spec = spec
        self.channels = channels
        self.clear(batch)

    def clear(self, batch: int) -> None:
        """Drop everything and start again for `batch` sequences."""
        self.batch = batch
        self.tokens = 0
        names = body_buffers(self.spec, self.channels, 0, 0, "float32")
        self._buffers: dict[str, PagedBuffer | RunBuffer] = {
            name: RunBuffer()
            if name in SPARSE
            else PagedBuffer(PAGE_TOKENS * batch // self._tokens_of(name))
            for name in names
        }

    def append(self, rows: dict[str, Tensor]) -> None:
        """Add encoded rows, whole tokens of the batch: what `Method.quantize` returned."""
        for name, buffer in self._buffers.items():
            buffer.append(rows[name])
        self.tokens += len(next(iter(rows.values()))) // self.batch

    def read(self) -> dict[str, Tensor]:
        """Return the buffers of all stored rows in the canonical layout, spare room left out; {}
        while empty.
        """
        return (
            {name: buffer.read() for name, buffer in self._buffers.items()} if self.tokens else {}
        )

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens of every sequence."""
        if tokens >= self.tokens:
            return
        rows = tokens * self.batch
        kept = self._outliers_of(self.read(), rows)
        for name, buffer in self._buffers.items():
            buffer.truncate(kept if name in SPARSE else rows // self._tokens_of(name))
        self.tokens = tokens

    def drop(self, tokens: int) -> None:
        """Free the first `tokens` tokens of every sequence, a whole number of pages."""
        rows = tokens * self.batch
        freed = self._outliers_of(self.read(), rows)
        for name, buffer in self._buffers.items():
            buffer.drop(freed if name in SPARSE else rows // self._tokens_of(name))
        self.tokens -= tokens

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences: the new batch is `sequences`, (new_batch,) int64
        indices.
        """
        if not self.tokens:
            self.clear(len(sequences))
            return
        stored = self.read()
        size = self.spec.token_group or 1
        group = torch.arange(self.tokens // size, device=sequences.device)[:, None] * self.batch
        groups = (group + sequences).flatten()
        ranges = {name: stored.pop(name)[groups] for name in (GROUPS,) if name in stored}
        rows = (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
        per_row = 2 * outliers_per_tail(self.spec, self.channels)
        picked = gather_rows(stored, rows, per_row) | ranges
        self.clear(len(sequences))
        self.append(picked)

    @property
    def outliers(self) -> int:
        """Outliers stored in all rows."""
        runs = self._buffers.get("outlier_values")
        return sum(len(run) for run in runs.tensors) if runs else 0

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """Every allocated tensor, by buffer."""
        return {name: buffer.tensors for name, buffer in self._buffers.items()}

    def _tokens_of(self, name: str) -> int:
        """Return the tokens of a sequence that a row of a buffer is for."""
        return (self.spec.token_group or 1) if name == GROUPS else 1

    def _outliers_of(self, stored: dict[str, Tensor], rows: int) -> int:
        """Count the outliers of the first `rows` rows."""
        if "outlier_counts" in stored:
            return int(stored["outlier_counts"][:rows].long().sum())
        return rows * 2 * outliers_per_tail(self.spec, self.channels)


def gather_rows(stored: dict[str, Tensor], rows: Tensor, per_row: int) -> dict[str, Tensor]:
    """Return the encoded rows at indices `rows` (n,) int64, in that order, each with its
    outliers.
    """
    picked = {name: tensor[rows] for name, tensor in stored.items() if name not in SPARSE}
    if "outlier_values" in stored:
        owner = row_of_outlier(stored, len(next(iter(stored.values()))), per_row)
        counts = torch.bincount(owner, minlength=len(next(iter(stored.values()))))
        first = counts.cumsum(0) - counts
        lengths = counts[rows]
        within = torch.arange(int(lengths.sum()), device=rows.device)
        within -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        index = first[rows].repeat_interleave(lengths) + within
        picked |= {name: stored[name][index] for name in SPARSE}
    return picked
