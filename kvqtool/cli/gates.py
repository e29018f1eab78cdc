"""Limits a result has to keep: printed after it, one line each, and exit code 1."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

import typer

from kvqtool.cli.failures import GATE_EXIT


@dataclass(frozen=True)
class Gate:
    """One limit.

    Args:
        name: the value's key in the result.
        value: what was measured.
        option: the option that set the limit, for the message.
        limit: the limit; None when it was not asked for.
        is_floor: whether the value must be at least the limit; at most, otherwise.
    """

    name: str
    value: float
    option: str
    limit: float | None
    is_floor: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the limit is kept; a value that is not a number keeps none."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.is_floor else self.value <= self.limit


def enforce(gates: Iterable[Gate]) -> None:
    """Say which gates are not met, on stderr; leave with code 1 if there are any."""
    failed = [gate for gate in gates if not gate.is_met]
    for gate in failed:
        side = "below" if gate.is_floor else "above"
        shown = f"{gate.name} {gate.value:.6g} is {side} {gate.option} {gate.limit:.6g}"
        print(f"gate not met: {shown}", file=sys.stderr, flush=True)
    if failed:
        raise typer.Exit(GATE_EXIT)
