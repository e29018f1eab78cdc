"""What a quantization scheme is, as a value: `KvSpec`, a `QuantSpec` for keys and one for values.

The short string is the scheme's name everywhere: command line, bundle, reports. Its grammar:

    fp | METHOD BITS [-F%] [-gN] [-capN] [-sinkN] [-rN] [-qnorm] [-postrope] [-pertoken]
    [-nofisher|-fisher] [-pc] [-comp] [-vrot]
    qaq [-nuq] [-kE] [-vE] [-wN] [-token | -head] [-released] [-shadow] [the rest]

`METHOD BITS` is one of nuq2 nuq3 nuq4 nuq8 (KVQuant codebooks), int2 int3 int4 int8, nf2 nf3 nf4,
kivi2 kivi3 kivi4 kivi8, had2 had3 had4 had8 (rotated heads), tq2 tq3 tq4 (TurboQuant),
qaq2 qaq3 qaq4 qaq8 (QAQ's mid-points per token, keys after RoPE). `qaq` without bits decides them
token by token: to error budgets E of keys and values, when a token leaves the last N.
Two strings joined by `/` give keys and values their own scheme (`nuq4-1%/nuq3-1%`). `@mixed` at
the end lets calibration spend the scheme's bytes unevenly: every layer's keys and values get the
width and outlier share that the loss asks for; `@2.75` spends that many bits a number instead.
`kvq4`, `kvq3` and `kvq2` are short for PRESETS; `kvq3-r3` keeps the newest 3 tokens exact beside
them. Printing a spec and parsing it gives the same spec.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Final

from kvqtool.adaptive import WINDOW, WORDS, Adaptive, read_budget, read_words
from kvqtool.errors import SpecError
from kvqtool.side import EXACT, GROUPED, ONLINE, PER_TOKEN, ROTATING, QuantSpec
from kvqtool.words import agree, side_words

# The best recipe measured at each width (docs/quality.md).
PRESETS: Final[dict[str, str]] = {
    f"kvq{bits}": f"nuq{bits}-1%-sink1-pc-comp/nuq{bits}-1%-sink1-comp@mixed" for bits in (4, 3, 2)
}
DEFAULT_SPEC: Final = "kvq3"
SIDES: Final = ("key", "value")
_NO_CHANNELS: Final = (*PER_TOKEN, *ONLINE)  # methods without ranges by calibration
_PRESET: Final = re.compile(r"(kvq[0-9])(-r[0-9]{1,9})?(@.*)?")
_MIXED: Final = re.compile(r"@(mixed|[0-9]{1,2}(?:\.[0-9]{1,6})?)$")


@dataclass(frozen=True)
class KvSpec:
    """A scheme for a whole cache: keys, values, and the tokens that stay exact.

    Args:
        key: how packed keys are stored.
        value: how packed values are stored.
        sink_tokens: first tokens of a sequence kept exact (attention sinks).
        residual_length: most recent tokens kept exact, the newest included.
        mixed: calibration chooses widths and outlier shares layer by layer.
        target_bits: effective bits a number that it may spend; None for those that the scheme would
            take as it stands.
        adaptive: how tokens come to bits of their own; None where bits are fixed.
    """

    key: QuantSpec
    value: QuantSpec
    sink_tokens: int = 0
    residual_length: int = 0
    mixed: bool = False
    target_bits: float | None = None
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        if self.value.per_channel or self.value.pre_rope or self.value.channel_levels:
            raise SpecError(
                "values are quantized per token; -pc, per-channel and pre-RoPE storage are for keys"
            )
        if self.key.rotated and self.key.method not in ROTATING:
            raise SpecError("-vrot rotates values; keys are rotated by position already")
        if self.sink_tokens < 0 or self.residual_length < 0:
            raise SpecError(
                f"sink{self.sink_tokens} and r{self.residual_length} must not be negative"
            )
        if (self.key.method == EXACT) != (self.value.method == EXACT):
            raise SpecError("fp is for both sides at once; quantize keys and values, or neither")
        self._check_adaptive()
        if self.mixed and not all(
            side.fits_levels and side.needs_gradients for side in (self.key, self.value)
        ):
            raise SpecError(
                "@mixed spends bytes by Fisher information, on nuq keys and values; "
                "use nuq without -nofisher, or drop @mixed"
            )

    def _check_adaptive(self) -> None:
        sides = {self.key.is_adaptive, self.value.is_adaptive}
        if sides != {self.adaptive is not None}:
            raise SpecError("bits per token are for keys and values both; write qaq for each")
        if self.adaptive is None:
            return
        if self.residual_length < 1:
            raise SpecError("-w0: a token needs a query that has seen it; use -w1 or more")
        if self.adaptive.level == "head" and {self.key.method, self.value.method} != {"qaq"}:
            raise SpecError("-head is for qaq; nuq codebooks hold for a layer, drop -head or nuq")
        if self.mixed:
            raise SpecError("@mixed fixes bits by layer, qaq decides them by token; keep one")

    def __str__(self) -> str:
        key, value = self._print(self.key, is_key=True), self._print(self.value, is_key=False)
        turned = self.value.rotated and self.value.method not in ROTATING
        one = key + "-vrot" * turned if self._is_one() else f"{key}/{value}"
        if not self.mixed:
            return one
        return f"{one}@mixed" if self.target_bits is None else f"{one}@{self.target_bits:.10g}"

    def _is_one(self) -> bool:
        """Whether values are stored as a spec for both sides would say."""
        if self.key.method != self.value.method:
            return False
        alone = replace(
            self.key,
            pre_rope=False,
            per_channel=False,
            channel_levels=False,
            outlier_cap=None,
            compensated=False,
            rotated=self.value.rotated,
            group_size=self.key.group_size or self.key.token_group,
            token_group=None,
            error_budget=self.value.error_budget,
        )
        return alone == self.value

    def side(self, side: str) -> QuantSpec:
        """Return how "key" or "value" is stored."""
        return self.key if side == "key" else self.value

    def with_side(self, side: str, quant: QuantSpec) -> KvSpec:
        """Return the scheme with another form of "key" or "value"."""
        return replace(self, key=quant) if side == "key" else replace(self, value=quant)

    @property
    def has_window(self) -> bool:
        """Whether the most recent tokens stay exact: a window, or groups that are not yet whole."""
        return bool(self.residual_length or self.key.token_group)

    @property
    def name(self) -> str:
        """The short name of a preset and of its recent window, or the spec string."""
        recipe = str(replace(self, residual_length=0)) if self.adaptive is None else ""
        window = f"-r{self.residual_length}" if self.residual_length else ""
        for name, known in PRESETS.items():
            if recipe == known:
                return name + window
        return str(self)

    def _print(self, spec: QuantSpec, *, is_key: bool) -> str:
        parts = [spec.method if spec.method == EXACT else f"{spec.method}{spec.bits}"]
        if self.adaptive is not None:
            budgets = self.key.error_budget, self.value.error_budget
            head = ["qaq", "nuq"] if spec.method == "nuq" else ["qaq"]
            parts = head + self.adaptive.words(budgets, self.residual_length)
        if spec.outlier_fraction:
            parts.append(f"{(Decimal(str(spec.outlier_fraction)) * 100).normalize():f}%")
        if spec.group_size or spec.token_group:
            parts.append(f"g{spec.group_size or spec.token_group}")
        if spec.outlier_cap is not None:
            parts.append(f"cap{spec.outlier_cap}")
        if self.sink_tokens:
            parts.append(f"sink{self.sink_tokens}")
        if self.residual_length and self.adaptive is None:
            parts.append(f"r{self.residual_length}")
        parts += ["qnorm"] * spec.moment_match
        if is_key and spec.method != "qaq":
            parts += ["postrope"] * (not spec.pre_rope)
            parts += ["pertoken"] * (
                not spec.per_channel and spec.group_size is None and spec.method not in _NO_CHANNELS
            )
        parts += {"fisher-scale": [], "fisher": ["fisher"], "none": ["nofisher"]}[spec.weighting]
        parts += ["pc"] * spec.channel_levels
        parts += ["comp"] * spec.compensated
        parts += ["vrot"] * (spec.rotated and spec.method not in ROTATING)
        return "-".join(parts)

    @property
    def needs_calibration(self) -> bool:
        """Whether a bundle made by calibration is needed to use this scheme."""
        return any((self.key.needs_calibration, self.value.needs_calibration, self.needs_queries))

    @property
    def needs_queries(self) -> bool:
        """Whether calibration has to measure the model's queries."""
        return self.adaptive is not None and self.adaptive.formula == "paper"

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration has to run the backward pass."""
        return self.key.needs_gradients or self.value.needs_gradients


_KEY_ONLY: Final = ("postrope", "pertoken", "pc", "cap")


def parse_spec(text: str) -> KvSpec:
    """Parse a spec string.

    Args:
        text: one scheme (`nuq3-1%-sink1`) or two joined by `/` for keys and values, or a preset.
            `sink` and `r` hold for the whole cache and may be written on one side or on both.

    Raises:
        SpecError: when the string is not in the grammar; the message names the part and the remedy.
    """
    written = text.strip()
    short = _PRESET.fullmatch(written)
    if short and short[1] in PRESETS:
        keys, values = PRESETS[short[1]].removesuffix("@mixed").split("/")
        written = f"{keys}{short[2] or ''}/{values}{short[3] or '@mixed'}"
    mixed = _MIXED.search(written)
    sides = (written[: mixed.start()] if mixed else written).split("/")
    if len(sides) > 2:
        raise SpecError(
            f"spec {text!r} has {len(sides)} parts; write KEYS/VALUES, as in nuq4-1%/nuq3-1%"
        )
    words = [side_words(side, text) for side in sides]
    shared = {name: agree(name, words, text) for name in ("sink", "r", *WORDS)}
    is_adaptive = any(not side["bits"] for side in words)
    key, value = words[0], words[-1]
    misplaced = [w for w in _KEY_ONLY if w in value] if len(words) == 2 else []
    if misplaced:
        raise SpecError(f"spec {text!r}: {misplaced[0]} is for keys; write it before the /")
    if len(words) == 2 and "vrot" in key:
        raise SpecError(f"spec {text!r}: vrot is for values; write it after the /")
    return KvSpec(
        key=_quant_spec(key, shared, is_key=True),
        value=_quant_spec(value if len(words) == 2 else _of_values(value), shared, is_key=False),
        sink_tokens=int(shared["sink"] or 0),
        residual_length=int(shared["w"] or WINDOW) if is_adaptive else int(shared["r"] or 0),
        mixed=mixed is not None,
        target_bits=float(mixed[1]) if mixed and mixed[1] != "mixed" else None,
        adaptive=read_words(shared) if is_adaptive else None,
    )


def _quant_spec(words: dict[str, str], shared: dict[str, str | None], *, is_key: bool) -> QuantSpec:
    method, size = words["method"], int(words["g"]) if "g" in words else None
    per_channel = is_key and method not in _NO_CHANNELS and not words.keys() & {"pertoken", "g"}
    if method in ONLINE and words.keys() & {"pertoken", "vrot"}:
        raise SpecError(
            f"{method}{words['bits']} finds its ranges as tokens come; drop -pertoken and -vrot"
        )
    by_tokens = is_key and method == GROUPED
    if is_key and "g" in words and "pertoken" in words:
        raise SpecError(
            "-g groups the channels of each token; -pertoken beside it says nothing more, drop it"
        )
    return QuantSpec(
        method=method,
        bits=int(words["bits"] or 0),
        outlier_fraction=float(Fraction(words.get("percent", "0")) / 100),
        group_size=None if by_tokens else size,
        token_group=size if by_tokens else None,
        outlier_cap=int(words["cap"]) if is_key and "cap" in words else None,
        moment_match="qnorm" in words,
        pre_rope=is_key and "postrope" not in words and method != "qaq",
        per_channel=per_channel,
        weighting="fisher"
        if "fisher" in words
        else "none"
        if "nofisher" in words
        else "fisher-scale",
        channel_levels=is_key and "pc" in words,
        compensated="comp" in words,
        rotated=method in ROTATING or (not is_key and "vrot" in words),
        error_budget=read_budget(shared, is_key=is_key) if not words["bits"] else None,
    )


def _of_values(words: dict[str, str]) -> dict[str, str]:
    """Return what one scheme for both sides says of values: compensation is for its keys."""
    return {name: value for name, value in words.items() if name != "comp"}
