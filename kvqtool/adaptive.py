"""QAQ's bits per token as a value: which numbers share them, and by which formula they follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from kvqtool.errors import SpecError

LEVELS: Final = ("token", "layer", "head")
FORMULAS: Final = ("paper", "released")
# What a spec leaves out: about 3 effective bits of the built-in model; the paper's window.
KEY_BUDGET: Final = "0.01"
VALUE_BUDGET: Final = "3"
WINDOW: Final = "5"
# Words of a spec that are about bits by token; they hold for the whole cache.
WORDS: Final = ("k", "v", "w", "token", "head", "released", "shadow")


@dataclass(frozen=True)
class Adaptive:
    """How tokens come to their bits; the tolerances are each side's `error_budget`.

    Args:
        level: what shares bits: `token` is a token's numbers in all layers, `layer` those in one
            layer, `head` those in one KV head. Range and outliers are a layer's or a head's. Keys
            and values are apart either way.
        planned_bits: bits of a code, on average, that a plan counts where no text has been seen; no
            part of the scheme. The most by default.
        shadow: whether a host copy lets a value's bits rise when later queries attend to it more.
        formula: `paper`, or `released` for the arithmetic of the authors' code.
    """

    level: str = "layer"
    formula: str = "paper"
    shadow: bool = False
    planned_bits: float = field(default=8.0, compare=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("level", self.level, LEVELS),
            ("formula", self.formula, FORMULAS),
        ):
            if value not in known:
                raise SpecError(f"unknown {name} {value!r}; use one of: {', '.join(known)}")
        if self.shadow and self.level == "token":
            raise SpecError(
                "-shadow lets bits rise layer by layer, -token keeps them alike; keep one"
            )

    @property
    def is_stepwise(self) -> bool:
        """Whether a step has to be over before the next one's bits are known, so that calls of
        several tokens are exact prompts only.
        """
        return self.level == "token" or self.shadow

    def units(self, num_kv_heads: int) -> int:
        """Return how many widths a token has on a side of a layer."""
        return num_kv_heads if self.level == "head" else 1

    def words(self, budgets: tuple[float | None, float | None], window: int) -> list[str]:
        """Return the words of a spec: budgets of keys and values, the window, and what differs."""
        key, value = (f"{Decimal(str(each)).normalize():f}" for each in budgets)
        parts = [f"k{key}", f"v{value}", f"w{window}"]
        level = [self.level] if self.level != "layer" else []
        parts += level + ["released"] * (self.formula != "paper")
        return parts + ["shadow"] * self.shadow


def read_words(words: Mapping[str, str | None]) -> Adaptive:
    """Return the rule that words of a spec name; absent ones are None."""
    levels = [name for name in ("token", "head") if words[name] is not None]
    if len(levels) > 1:
        raise SpecError("-token and -head exclude each other; keep one")
    return Adaptive(
        levels[0] if levels else "layer",
        "paper" if words["released"] is None else "released",
        words["shadow"] is not None,
    )


def read_budget(words: Mapping[str, str | None], *, is_key: bool) -> float:
    """Return the error budget that words of a spec name, or the default."""
    name, default = ("k", KEY_BUDGET) if is_key else ("v", VALUE_BUDGET)
    return float(words[name] or default)
