"""How one side of the cache, its keys or its values, is stored: `QuantSpec` and its rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Final

from kvqtool.errors import SpecError

METHOD_BITS: Final[dict[str, tuple[int, ...]]] = {
    "nuq": (2, 3, 4, 8),
    "int": (2, 3, 4, 8),
    "nf": (2, 3, 4),
    "kivi": (2, 3, 4, 8),
    "had": (2, 3, 4, 8),
    "tq": (2, 3, 4),
    "qaq": (2, 3, 4, 8),
}
# What a token's codes can take where each token has its own width (`QuantSpec.error_budget`).
WIDTHS: Final = (0, 2, 3, 4, 8)
ADAPTIVE_METHODS: Final = ("qaq", "nuq")
EXACT: Final = "fp"
GROUPED: Final = "kivi"  # the method whose keys share ranges in groups of tokens
NORMED: Final = "tq"  # the method that keeps a norm where others keep scale and offset
ROTATING: Final = ("had", NORMED)  # methods that rotate the heads of keys and of values
ONLINE: Final = (GROUPED, *ROTATING)  # methods that find all they need as tokens come
GROUPING: Final = ("int", *ONLINE)  # methods with groups of channels
PER_TOKEN: Final = (EXACT, "qaq")  # methods that never have ranges per channel
WEIGHTINGS: Final = ("fisher-scale", "fisher", "none")


def rows_by_width(rows: int, bits: float) -> tuple[int, ...]:
    """Return rows of each of WIDTHS whose codes have `bits` on average, of the widths next to it.

    Example: 100 rows, 2.25 bits -> 75 of 2 and 25 of 3: (0, 75, 25, 0, 0).
    """
    above = next(i for i, width in enumerate(WIDTHS) if width >= bits)
    below = max(above - 1, 0)
    step = WIDTHS[above] - WIDTHS[below]
    wider = math.ceil(rows * (bits - WIDTHS[below]) / step) if step else rows
    counts = [0] * len(WIDTHS)
    counts[below] += rows - wider
    counts[above] += wider
    return tuple(counts)


@dataclass(frozen=True)
class QuantSpec:
    """How one side (keys or values) of the cache is stored.

    Args:
        method: `nuq`, `int`, `nf`, `kivi`, `had`, `tq`, `qaq`, or `fp` (exact, in the model's
            dtype).
        bits: stored bits per code; 16 stands for `fp`, 0 for tokens that have each their own.
        outlier_fraction: share of elements kept exactly, both tails together (0.01 is 1 %).
        group_size: channels of one token that share a scale and an offset, or a norm (`tq`);
            None for the side's default.
        outlier_cap: most outliers a token may keep on a side with offline thresholds; None for no
            limit.
        moment_match: KVQuant's Q-Norm; decoded levels are shifted so that mean and deviation are
            those of the data.
        pre_rope: keys are stored as they were before the rotary embedding.
        per_channel: a channel's range is fixed by calibration; otherwise each token brings its own
            range.
        weighting: what the codebook fit weighs an element with: Fisher times scale squared, Fisher
            alone, nothing.
        channel_levels: a codebook per key channel instead of one per layer.
        compensated: rounding is compensated: each channel makes up for the errors of those before.
        rotated: heads are stored rotated by a Hadamard matrix: values where asked for, keys and
            values by ROTATING methods.
        token_group: tokens of one key channel that share a scale and an offset (`kivi`).
        error_budget: QAQ's tolerance, from which each token's bits follow: the standard deviation
            that rounding may cause in an attention weight (keys) or in an output coordinate
            (values); None for fixed bits.
    """

    method: str
    bits: int
    outlier_fraction: float = 0.0
    group_size: int | None = None
    outlier_cap: int | None = None
    moment_match: bool = False
    pre_rope: bool = False
    per_channel: bool = False
    weighting: str = "fisher-scale"
    channel_levels: bool = False
    compensated: bool = False
    rotated: bool = False
    token_group: int | None = None
    error_budget: float | None = None

    def __post_init__(self) -> None:
        known = METHOD_BITS.get(self.method, (16,) if self.method == EXACT else ())
        if self.is_adaptive and self.method in ADAPTIVE_METHODS:
            known = WIDTHS
        if self.bits not in known:
            names = " ".join(f"{m}{b}" for m, widths in METHOD_BITS.items() for b in widths)
            raise SpecError(f"unknown method {self.method}{self.bits}; use fp or one of: {names}")
        if not 0 <= self.outlier_fraction < 0.5:
            raise SpecError(
                f"outlier share {self.outlier_fraction * 100:g}% is not in 0%..50%; use 1% or less"
            )
        if self.weighting not in WEIGHTINGS:
            raise SpecError(
                f"unknown weighting {self.weighting!r}; use one of: {', '.join(WEIGHTINGS)}"
            )
        self._check_groups()
        self._check_online()
        self._check_qaq()
        if self.method == EXACT and (
            self.outlier_fraction
            or self.moment_match
            or self.outlier_cap is not None
            or self.per_channel
            or self.compensated
            or self.rotated
        ):
            raise SpecError(
                "fp stores everything exactly; "
                "outliers, caps, ranges, qnorm, comp and vrot do not apply to it"
            )
        if self.method != "nuq" and (
            self.weighting != "fisher-scale" or self.channel_levels or self.moment_match
        ):
            raise SpecError(
                f"{self.method}{self.bits}: -fisher, -nofisher, "
                "-qnorm and -pc belong to nuq methods"
            )
        if self.outlier_cap is not None and (
            self.outlier_cap < 1 or not (self.per_channel and self.outlier_fraction)
        ):
            raise SpecError(
                f"-cap{self.outlier_cap} needs key outliers with thresholds per channel, "
                "as in nuq3-1%-cap4"
            )
        if self.channel_levels and not self.per_channel:
            raise SpecError(
                "-pc (a codebook per key channel) needs keys per channel; drop -pertoken"
            )

    def _check_groups(self) -> None:
        if self.group_size is not None and (self.method not in GROUPING or self.group_size < 8):
            raise SpecError(
                f"-g{self.group_size}: groups of 8 or more channels are for int, kivi, had and tq; "
                "drop -g or use int"
            )
        if self.group_size is not None and self.per_channel:
            raise SpecError(
                f"-g{self.group_size}: groups bring a range per token, channels have theirs; "
                "keep one"
            )
        if self.compensated and self.group_size is not None:
            raise SpecError(
                f"-g{self.group_size}: rounding is compensated within a head, "
                "whose channels must share a range; drop -g or -comp"
            )

    def _check_online(self) -> None:
        """Check the methods that find all they need in the states as they come."""
        name, size = f"{self.method}{self.bits}", self.token_group or self.group_size
        if self.method in ONLINE and (
            self.per_channel
            or self.outlier_fraction
            or self.compensated
            or self.rotated != (self.method in ROTATING)
        ):
            raise SpecError(
                f"{name} finds its ranges as tokens come; outliers, pertoken, comp and vrot do not "
                "apply to it"
            )
        if self.method == GROUPED and (size is None or 128 % size):
            raise SpecError(
                f"{name} shares ranges in groups that divide 128 tokens; name their size, as in "
                f"{name}-g32-r128"
            )
        if self.token_group is not None and self.method != GROUPED:
            raise SpecError(f"{name}: groups of tokens are for {GROUPED}")

    def _check_qaq(self) -> None:
        if self.method == "qaq" and (self.pre_rope or self.per_channel or self.compensated):
            raise SpecError(
                "qaq quantizes keys and values per token, keys after RoPE, by nearest mid-point; "
                "for channels, keys before RoPE or comp add nuq, as in qaq-nuq-comp"
            )
        if self.error_budget is not None and self.method not in ADAPTIVE_METHODS:
            raise SpecError(
                f"{self.method}{self.bits} has the same bits for every token; "
                "drop the error budget or use qaq"
            )
        if self.error_budget is not None and not 0 < self.error_budget < float("inf"):
            raise SpecError(f"error budget {self.error_budget:g} must be above 0; use 0.01")

    @property
    def is_adaptive(self) -> bool:
        """Whether each token has its own bits."""
        return self.error_budget is not None

    @property
    def fits_levels(self) -> bool:
        """Whether levels are fitted to data, by calibration."""
        return self.method == "nuq"

    @property
    def needs_calibration(self) -> bool:
        """Whether encoding needs numbers that only calibration on text can give."""
        return self.fits_levels or self.per_channel or self.compensated

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration has to run the backward pass (Fisher information)."""
        return self.compensated or (self.fits_levels and self.weighting != "none")


@cache
def exact_share(fraction: float) -> tuple[int, int]:
    """Return the numerator and denominator of a share as it is written: 1 and 100 of 0.01."""
    return Fraction(str(fraction)).as_integer_ratio()
