"""Every stored token's angles, in few bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from kvqtool.buffers import PagedBuffer
from kvqtool.errors import RunError
from kvqtool.memory import PAGE_TOKENS
from kvqtool.rope import AngleFormula, Rotation


class AngleStore:
    """Every stored token's angles: four bytes a token where a formula gives them, else the tables
    themselves.

    The formula is checked against the model's own tables each time tokens arrive, bit for bit; the
    first time it does not hold (dynamic NTK past its length, say) the store turns into a table, and
    `kind` says so. On a GPU a single token whose formula is fixed is checked without waiting for
    it: whether one was wrong is looked at once a page.
    """

    def __init__(self, rotation: Rotation, formula: AngleFormula | None) -> None:
        """Start empty for keys rotated by `rotation`; `formula` is None where none is known."""
        self.rotation = rotation
        self.formula = formula
        self.tokens = 0
        # Position of each sequence's first token, (batch,), while every token is one further.
        self.first: Tensor | None = None
        self._rows: PagedBuffer | None = None
        # Angles computed for the layers of this step, by the device those lie on.
        self._memo: dict[torch.device, tuple[tuple[int, int], tuple[Tensor, Tensor]]] = {}
        self._doubt: Tensor | None = None  # bool: whether a token was not what it was taken for

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
        if self._rows is None:
            self._rows = PagedBuffer(PAGE_TOKENS)
        if self._is_expected(fresh, positions):
            assert positions is not None
            self._rows.append(self._doubtful(fresh, positions, batch))
            self.tokens += 1
            return
        self.resolve()
        if self.formula is not None and not self._holds(fresh, positions):
            self._become_table()
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
        self.resolve()
        self.forget()
        ahead = torch.arange(self.tokens, self.tokens + tokens, device=self.first.device)
        self._rows.append((self.first + ahead[:, None]).to(torch.int32))
        self.tokens += tokens

    def read(
        self, start: int, stop: int, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) of tokens start..stop-1, each (tokens, batch, width / 2) float32.

        Args:
            start: the first token.
            stop: the first that is not asked for.
            device: of the layer that asks, which in a spread model need not be that of the layer
                that brought them; None for the latter.
        """
        assert self._rows is not None, "angles are read after tokens arrived"
        device = device or self._rows.tensors[0].device
        span, known = self._memo.get(device, (None, None))
        if known is not None and span == (start, stop):
            return known
        rows = self._rows.read()[start:stop].to(device)
        if self.formula is not None:
            cos, sin = self.formula.tables(rows)
            angles = cos.float(), self.rotation.sign * sin.float()
        else:
            angles = rows[..., 0], rows[..., 1]
        self._memo[device] = (start, stop), angles
        return angles

    def forget(self) -> None:
        """Drop the angles computed for the layers of this step."""
        self._memo.clear()

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        self.resolve()
        self.forget()
        self.tokens = min(tokens, self.tokens)
        if self._rows is not None:
            self._rows.truncate(self.tokens)

    def select(self, sequences: Tensor) -> None:
        """Keep, repeat or reorder sequences, (new_batch,) int64 indices."""
        self.resolve()
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
        self.resolve()
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

    def resolve(self) -> None:
        """Look whether every token was what it was taken for.

        Raises:
            RunError: when one was not.
        """
        if self._doubt is None:
            return
        is_wrong, self._doubt = bool(self._doubt), None
        if is_wrong:
            raise RunError(
                f"of the last tokens before {self.tokens}, some were rotated by other angles or "
                "stood at other positions than those before them; run on a CPU"
            )

    def _is_expected(self, fresh: tuple[Tensor, ...], positions: Tensor | None) -> bool:
        """Whether a token can be taken for the one after the last without looking at it."""
        if positions is None or positions.dim() != 2 or not _is_waited_for(fresh[0]):
            return False
        is_next = fresh[0].shape[0] == 1 and self.tokens > 0 and self.tokens % PAGE_TOKENS != 0
        is_known = self.formula is not None and self.formula.is_fixed and self.first is not None
        return is_next and is_known

    def _doubtful(self, fresh: tuple[Tensor, ...], positions: Tensor, batch: int) -> Tensor:
        """Return a token's row, (1, batch) int32; note on the device whether it is as expected."""
        assert self.formula is not None and self.first is not None
        rows = positions.transpose(0, 1).expand(-1, batch).to(torch.int32)
        cos, sin = self.formula.tables(rows)
        wrong = (rows != self.first + self.tokens).any()
        wrong |= (cos.float() != fresh[0]).any()
        wrong |= (self.rotation.sign * sin.float() != fresh[1]).any()
        self._doubt = wrong if self._doubt is None else self._doubt | wrong
        return rows

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


def _is_waited_for(states: Tensor) -> bool:
    """Whether the host waits for a device that holds states when it looks at them."""
    return states.is_cuda
