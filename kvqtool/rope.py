"""Rotary embedding as the cache needs it: undo it exactly and do it again.

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

from kvqtool.codebook import send


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
        is_fixed: whether the frequencies stay what they are at any length.
    """

    inv_freq: Tensor
    scaling: float
    dtype: torch.dtype
    is_fixed: bool = True

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), (..., width / 2) in the model's dtype, for integer positions (...)."""
        phase = positions[..., None].float() * send(self.inv_freq, positions.device)
        return (phase.cos() * self.scaling).to(self.dtype), (phase.sin() * self.scaling).to(
            self.dtype
        )
