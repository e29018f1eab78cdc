"""Packed storage that grows: the body of one side, made of pages of rows and runs of outliers.

A row is one token of one sequence; rows run token by token, sequences inside (row = token * batch +
sequence), so that a new token of a batch is a run at the end. Nothing stored is touched again when
a token is appended.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvqtool.buffers import PagedBuffer, RunBuffer
from kvqtool.memory import PAGE_TOKENS, TILE_ROWS, Outliers, body_buffers, outliers_per_tail
from kvqtool.outliers import row_of_outlier
from kvqtool.side import WIDTHS, QuantSpec

SPARSE = ("outlier_values", "outlier_channels")
# Buffers that hold the codes of rows of one width, where rows have widths of their own.
TILED = {f"words{bits}": bits for bits in WIDTHS[1:]}
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
    def widths(self) -> tuple[int, ...]:
        """Rows of each of WIDTHS; empty where all have the spec's bits."""

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


class PackedBody:
    """The packed rows of one side of one layer; encoding and decoding are the codec's, this keeps
    the bytes.

    Where groups of tokens share ranges, a group's rows of one sequence lie together: row = (group *
    batch + sequence) * group size + token of the group.
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
            name: RunBuffer() if name in SPARSE else PagedBuffer(self._page_rows(name))
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
        size = self.spec.token_group or 1
        group = torch.arange(self.tokens // size, device=sequences.device)[:, None] * self.batch
        groups = (group + sequences).flatten()
        ranges = {name: stored.pop(name)[groups] for name in (GROUPS,) if name in stored}
        together = torch.arange(size * self.units, device=groups.device)
        rows = (groups[:, None] * len(together) + together).flatten()
        per_row = 2 * outliers_per_tail(self.spec, self.channels)
        picked = gather_rows(stored, rows, per_row) | ranges
        self.clear(len(sequences))
        self.append(picked)

    def replace(self, index: Tensor, rows: dict[str, Tensor]) -> None:
        """Put other encoded rows in the place of those at `index`, (n,) int64."""
        stored = self.read()
        joined = {name: torch.cat([stored[name], rows[name]]) for name in stored}
        order = torch.arange(len(stored["widths"]), device=index.device)
        order[index] = len(order) + torch.arange(len(index), device=index.device)
        picked = gather_rows(joined, order, 2 * outliers_per_tail(self.spec, self.channels))
        self.clear(self.batch)
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

    def _page_rows(self, name: str) -> int:
        """Return the rows of a buffer that are allocated at once."""
        if name in TILED:
            return TILE_ROWS
        return PAGE_TOKENS * self.rows_per_token // self._tokens_of(name)

    def _tokens_of(self, name: str) -> int:
        """Return the tokens of a sequence that a row of a buffer is for."""
        return (self.spec.token_group or 1) if name == GROUPS else 1

    def _share(self, name: str, stored: dict[str, Tensor], rows: int) -> int:
        """Count what the first `rows` rows own of a buffer."""
        if name in TILED:
            return int((stored["widths"][:rows] == TILED[name]).sum())
        if name not in SPARSE:
            return rows // self._tokens_of(name)
        if "outlier_counts" in stored:
            return int(stored["outlier_counts"][:rows].long().sum())
        return rows * 2 * outliers_per_tail(self.spec, self.channels)


def found_in(bodies: tuple[Body, Body]) -> Outliers:
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
