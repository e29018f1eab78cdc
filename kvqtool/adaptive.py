"""QAQ's bits per token as a value: which numbers share them, and by which formula they follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvqtool.errors import SpecError

LEVELS: Final = ("layer", "head")
FORMULAS: Final = ("paper", "released")


@dataclass(frozen=True)
class Adaptive:
    """How tokens come to their bits; the tolerances are each side's `error_budget`.

    Args:
        level: what shares bits, range and outliers: `layer` is a token's numbers in all KV heads of
            a layer, `head` those in one. Keys and values are apart either way.
        formula: `paper`, or `released` for the arithmetic of the authors' code.
    """

    level: str = "layer"
    formula: str = "paper"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("level", self.level, LEVELS),
            ("formula", self.formula, FORMULAS),
        ):
            if value not in known:
                raise SpecError(f"unknown {name} {value!r}; use one of: {', '.join(known)}")

    def units(self, num_kv_heads: int) -> int:
        """Return how many widths a token has on a side of a layer."""
        return num_kv_heads if self.level == "head" else 1
