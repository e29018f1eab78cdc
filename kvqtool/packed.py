"""Packed storage that grows: pages of rows, runs of outliers, and the body of one side made of
both.

A row is one token of one sequence; rows run token by token, sequences inside (row = token * batch +
sequence), so that a new token of a batch is a run at the end. Nothing stored is touched again when
a token is appended.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvqtool.memory import PAGE_TOKENS, TILE_ROWS, Outliers, body_buffers, outliers_per_tail
from kvqtool.outliers import row_of_outlier
from kvqtool.side import WIDTHS, QuantSpec

# Runs of outliers shorter than this are joined, so that appending tokens one by one leaves few of
# them.
_JOIN_BELOW = 4096
SPARSE = ("outlier_values", "outlier_channels")
# Buffers that hold the codes of rows of one width, where rows have widths of their own.
TILED = {f"words{bits}": bits for bits in WIDTHS[1:]}


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


class PackedBody:
    """The packed rows of one side of one layer; encoding and decoding are the codec's, this keeps
    the bytes.
    """

    def __init__(self, spec: QuantSpec, channels: int, batch: int, units: int = 1) -> None:
        """Start empty for `batch` sequences whose tokens take `units` rows of `channels`."""
        self.spec = spec
        self.channels = channels
        self.units = units
        self.clear(batch)

    def clear(self, batch: int) -> None:
        """Drop everything and start again for `batch` sequences."""
        self.batch = batch
        self.tokens = 0
        names = body_buffers(self.spec, self.channels, 0, 0, "float32")
        self._buffers: dict[str, PagedBuffer | RunBuffer] = {
            name: RunBuffer()
            if name in SPARSE
            else PagedBuffer(TILE_ROWS if name in TILED else PAGE_TOKENS * self.rows_per_token)
            for name in names
        }

    @property
    def rows_per_token(self) -> int:
        """Rows that a token of the whole batch takes."""
        return self.batch * self.units

    def append(self, rows: dict[str, Tensor]) -> None:
        """Add encoded rows, whole tokens of the batch: what `Method.quantize` returned."""
        for name, buffer in self._buffers.items():
            buffer.append(rows[name])
        self.tokens += len(next(iter(rows.values()))) // self.rows_per_token

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
        stored, rows = self.read(), tokens * self.rows_per_token
        for name, buffer in self._buffers.items():
            buffer.truncate(self._share(name, stored, rows))
        self.tokens = tokens

    def drop(self, tokens: int) -> None:
        """Free the first `tokens` tokens of every sequence, a whole number of pages."""
        stored, rows = self.read(), tokens * self.rows_per_token
        for name, buffer in self._buffers.items():
            buffer.drop(self._share(name, stored, rows))
        self.tokens -= tokens

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences: the new batch is `sequences`, (new_batch,) int64
        indices.
        """
        if not self.tokens:
            self.clear(len(sequences))
            return
        stored = self.read()
        units = torch.arange(self.units, device=sequences.device)
        token = torch.arange(self.tokens, device=sequences.device)[:, None] * self.rows_per_token
        rows = (token + (sequences[:, None] * self.units + units).flatten()).flatten()
        picked = gather_rows(stored, rows, 2 * outliers_per_tail(self.spec, self.channels))
        self.clear(len(sequences))
        self.append(picked)

    @property
    def outliers(self) -> int:
        """Outliers stored in all rows."""
        runs = self._buffers.get("outlier_values")
        return sum(len(run) for run in runs.tensors) if runs else 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of each of WIDTHS; empty where all have the spec's bits."""
        if not self.spec.is_adaptive:
            return ()
        tiled = [buffer for name, buffer in self._buffers.items() if name in TILED]
        counts = [buffer.rows for buffer in tiled if isinstance(buffer, PagedBuffer)]
        return self.tokens * self.rows_per_token - sum(counts), *counts

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """Every allocated tensor, by buffer."""
        return {name: buffer.tensors for name, buffer in self._buffers.items()}

    def _share(self, name: str, stored: dict[str, Tensor], rows: int) -> int:
        """Count what the first `rows` rows own of a buffer."""
        if name in TILED:
            return int((stored["widths"][:rows] == TILED[name]).sum())
        if name not in SPARSE:
            return rows
        if "outlier_counts" in stored:
            return int(stored["outlier_counts"][:rows].long().sum())
        return rows * 2 * outliers_per_tail(self.spec, self.channels)


def found_in(bodies: tuple[PackedBody, PackedBody]) -> Outliers:
    """Return what packed keys and values hold beside what their specs fix."""
    key, value = bodies
    return Outliers(key.outliers, value.outliers, key.widths, value.widths)


def gather_rows(stored: dict[str, Tensor], rows: Tensor, per_row: int) -> dict[str, Tensor]:
    """Return the encoded rows at indices `rows` (n,) int64, in that order, each with its
    outliers.
    """
    picked = {}
    for name, tensor in stored.items():
        if name in TILED:
            is_its = stored["widths"] == TILED[name]
            rank = is_its.cumsum(0) - 1
            picked[name] = tensor[rank[rows[is_its[rows]]]]
        elif name not in SPARSE:
            picked[name] = tensor[rows]
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
