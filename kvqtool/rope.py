"""Rotary embedding as the cache needs it: undo it exactly, do it again, and remember each token's
angles in few bytes.

How a model rotates is not looked up by family: `candidate_rotations` lists what is possible for
given shapes, and the probe in `attach.py` keeps the one that takes real keys back to what they were
before the rotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from kvqtool.buffers import PagedBuffer
from kvqtool.memory import PAGE_TOKENS


@dataclass(frozen=True)
class Rotation:
    """How one layer rotates its keys.

    Args:
        layout: `half` pairs channel i with i + width / 2, `interleaved` pairs 2i with 2i + 1.
        width: rotated channels of a head; the rest pass through.
        offset: first rotated channel of a head.
        sign: -1 where the model turns the other way.
        table: how angles lie in the model's cos and sin, (..., width) or (..., width / 2): `halves`
            repeats the angles once more after themselves, `pairs` repeats each angle, `unique` has
            each once.
    """

    layout: str
    width: int
    offset: int
    sign: int
    table: str

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return each pair's own (cos, sin), (..., width / 2) float32, from the model's tables."""
        half = self.width // 2
        pick = {"halves": slice(0, half), "pairs": slice(0, None, 2), "unique": slice(None)}[
            self.table
        ]
        return cos[..., pick].float(), self.sign * sin[..., pick].float()

    def model_tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return tables as the model lays them out, (..., width) or (..., width / 2); the inverse
        of `angles`.
        """
        sin = self.sign * sin
        if self.table == "halves":
            return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        if self.table == "pairs":
            return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        return cos, sin

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate keys.

        Args:
            states: (..., head_dim) float32 before the rotary embedding.
            cos: (..., width / 2) float32 that broadcasts against it, from `angles`; scaling
                included.
            sin: likewise.
        """
        first, second = self._split(states)
        return self._join(states, first * cos - second * sin, second * cos + first * sin)

    def unrotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Undo `rotate` with the exact 2x2 inverse; low-precision tables are no unit rotations, nor
        scaled ones.
        """
        first, second = self._split(states)
        norm = cos * cos + sin * sin
        return self._join(
            states, (first * cos + second * sin) / norm, (second * cos - first * sin) / norm
        )

    def pull_back(self, gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the gradient before the rotation from the one after it: the transpose of
        `rotate`.
        """
        first, second = self._split(gradient)
        return self._join(gradient, first * cos + second * sin, second * cos - first * sin)

    def _split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        turned = states[..., self.offset : self.offset + self.width]
        if self.layout == "half":
            return turned[..., : self.width // 2], turned[..., self.width // 2 :]
        return turned[..., 0::2], turned[..., 1::2]

    def _join(self, states: Tensor, first: Tensor, second: Tensor) -> Tensor:
        pairs = (first, second)
        turned = (
            torch.cat(pairs, -1) if self.layout == "half" else torch.stack(pairs, -1).flatten(-2)
        )
        if self.width == states.shape[-1]:
            return turned
        before, after = states[..., : self.offset], states[..., self.offset + self.width :]
        return torch.cat([before, turned, after], -1)


def candidate_rotations(head_dim: int, table_width: int) -> Iterator[Rotation]:
    """List the rotations a head of `head_dim` channels can have under tables of `table_width`
    angles.
    """
    widths = [(table_width, ("halves", "pairs")), (2 * table_width, ("unique",))]
    for width, tables in widths:
        if width > head_dim or width % 2:
            continue
        offsets = sorted({0, head_dim - width})
        for layout, offset, sign, table in product(
            ("half", "interleaved"), offsets, (1, -1), tables
        ):
            yield Rotation(layout, width, offset, sign, table)


@dataclass(frozen=True)
class AngleFormula:
    """Angles as a function of position, the way transformers computes them.

    Args:
        inv_freq: (width / 2,) float32 radians a token.
        scaling: factor on cos and sin (YaRN's attention scaling).
        dtype: the dtype the model rounds its tables to.
    """

    inv_freq: Tensor
    scaling: float
    dtype: torch.dtype

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), (..., width / 2) in the model's dtype, for integer positions (...)."""
        phase = positions[..., None].float() * self.inv_freq.to(positions.device)
        return (phase.cos() * self.scaling).to(self.dtype), (phase.sin() * self.scaling).to(
            self.dtype
        )


class AngleStore:
    """Every stored token's angles: four bytes a token where a formula gives them, else the tables
    themselves.

    The formula is checked against the model's own tables each time tokens arrive, bit for bit; the
    first time it does not hold (dynamic NTK past its length, say) the store turns into a table, and
    `kind` says so.
    """

    def __init__(self, rotation: Rotation, formula: AngleFormula | None) -> None:
        """Start empty for keys rotated by `rotation`; `formula` is None where none is known."""
        self.rotation = rotation
        self.formula = formula
        self.tokens = 0
        # Position of each sequence's first token, (batch,), while every token is one further.
        self.first: Tensor | None = None
        self._rows: PagedBuffer | None = None
        self._memo: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    @property
    def kind(self) -> str:
        """`positions` or `table`."""
        return "positions" if self.formula else "table"

    def extend(self, cos: Tensor, sin: Tensor, positions: Tensor | None, batch: int) -> None:
        """Remember the angles of new tokens.

        Args:
            cos: the model's table for them, (batch or 1, tokens, table width).
            sin: likewise.
            positions: (batch or 1, tokens) integer positions, or None where the model gives none.
            batch: sequences in the cache.
        """
        self.forget()
        fresh = tuple(
            part.transpose(0, 1).expand(-1, batch, -1) for part in self.rotation.angles(cos, sin)
        )
        if self.formula is not None and not self._holds(fresh, positions):
            self._become_table()
        if self._rows is None:
            self._rows = PagedBuffer(PAGE_TOKENS)
        if self.formula is not None and positions is not None:
            rows = positions.transpose(0, 1).expand(-1, batch).to(torch.int32)
            self._follow(rows)
            self._rows.append(rows)
        else:
            self._rows.append(torch.stack(fresh, dim=-1))
        self.tokens += fresh[0].shape[0]

    def follow(self, tokens: int) -> None:
        """Remember tokens that go on from the last one, each a position further."""
        assert self.first is not None and self._rows is not None, "positions go on by one"
        self.forget()
        ahead = torch.arange(self.tokens, self.tokens + tokens, device=self.first.device)
        self._rows.append((self.first + ahead[:, None]).to(torch.int32))
        self.tokens += tokens

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) of tokens start..stop-1, each (tokens, batch, width / 2) float32."""
        if self._memo is not None and self._memo[0] == (start, stop):
            return self._memo[1]
        assert self._rows is not None, "angles are read after tokens arrived"
        rows = self._rows.read()[start:stop]
        if self.formula is not None:
            cos, sin = self.formula.tables(rows)
            angles = cos.float(), self.rotation.sign * sin.float()
        else:
            angles = rows[..., 0], rows[..., 1]
        self._memo = (start, stop), angles
        return angles

    def forget(self) -> None:
        """Drop the angles computed for the layers of this step."""
        self._memo = None

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        self.forget()
        self.tokens = min(tokens, self.tokens)
        if self._rows is not None:
            self._rows.truncate(self.tokens)

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences, (new_batch,) int64 indices."""
        self.forget()
        if self._rows is not None:
            chosen = sequences.to(self._rows.tensors[0].device)
            picked = self._rows.read()[:, chosen]
            self.first = None if self.first is None else self.first[chosen]
            self._rows = PagedBuffer(PAGE_TOKENS)
            self._rows.append(picked)

    def canonical(self) -> Tensor:
        """Return what is stored, without spare room: positions (tokens, batch) or (tokens, batch,
        width / 2, 2).
        """
        assert self._rows is not None, "nothing is stored yet"
        return self._rows.read()

    def restore(self, rows: Tensor, *, kind: str) -> None:
        """Fill an empty store with what `canonical` returned of one of that kind."""
        if kind == "table":
            self.formula = None
        else:
            self._follow(rows)
        self._rows = PagedBuffer(PAGE_TOKENS)
        self._rows.append(rows)
        self.tokens = len(rows)

    @property
    def tensors(self) -> list[Tensor]:
        """The allocated tensors."""
        return self._rows.tensors if self._rows is not None else []

    def _holds(self, fresh: tuple[Tensor, ...], positions: Tensor | None) -> bool:
        assert self.formula is not None
        if positions is None or positions.dim() != 2:
            return False
        cos, sin = self.formula.tables(positions.transpose(0, 1).to(torch.int32))
        return torch.equal(cos.float().expand_as(fresh[0]), fresh[0]) and torch.equal(
            self.rotation.sign * sin.float().expand_as(fresh[1]), fresh[1]
        )

    def _follow(self, rows: Tensor) -> None:
        """Note whether each sequence's positions, (tokens, batch) int32, go on by one a token."""
        if not self.tokens:
            self.first = rows[0].clone()
        if self.first is not None:
            ahead = torch.arange(self.tokens, self.tokens + len(rows), device=rows.device)
            if not torch.equal(rows, (self.first + ahead[:, None]).to(torch.int32)):
                self.first = None

    def _become_table(self) -> None:
        if self._rows is not None and self.tokens:
            table = torch.stack(self.read(0, self.tokens), dim=-1)
            self._rows = PagedBuffer(PAGE_TOKENS)
            self._rows.append(table)
        self.formula = self.first = None
        self.forget()
