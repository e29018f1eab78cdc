"""What kernels that write codes are told of a layer's codebooks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from kvqtool.arguments import Expected, check_codes
from kvqtool.codebook import Codebook
from kvqtool.codec import channel_affine
from kvqtool.cuda import Macros
from kvqtool.errors import InputError
from kvqtool.memory import outliers_per_tail
from kvqtool.side import EXACT, GROUPED, ROTATING
from kvqtool.spec import KvSpec
from kvqtool.variant import Variant

PLAIN: Final[Macros] = (("KEY_COMP", 0), ("VALUE_COMP", 0), ("VALUE_FLOAT", 0))


@dataclass(frozen=True)
class Rounding:
    """What compensated rounding of one side needs (`kvqtool/compensation.py`).

    Args:
        reads: (L,) or (C, L) float32, levels that are read back.
        feedback: (num_kv_heads, head_dim, head_dim) float32.
        turn: (num_kv_heads, head_dim) int16, the order a head's channels are rounded in.
    """

    reads: Tensor
    feedback: Tensor
    turn: Tensor


@dataclass(frozen=True)
class CodeTables:
    """What finding a layer's codes needs, float32, in the order of the layer's channels.

    Args:
        lower: (C,) least key that is no outlier; minus infinity where keys have none, for kernels
            know of outliers of either side or of neither.
        upper: (C,) greatest.
        offset: (C,) middle of a key channel's range.
        inverse: (C,) one over half its range, 0 where it has none.
        key_middles: (L - 1,) between neighbouring levels, or (C, L - 1).
        value_middles: (L - 1,).
        per_tail: outliers of a value token at either end.
        key_rounding: what compensated rounding of keys needs, None where there is none.
        value_rounding: likewise of values.
        turns_values: whether heads of values are rotated before they are encoded.
    """

    lower: Tensor
    upper: Tensor
    offset: Tensor
    inverse: Tensor
    key_middles: Tensor
    value_middles: Tensor
    per_tail: int
    key_rounding: Rounding | None = None
    value_rounding: Rounding | None = None
    turns_values: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor."""
        roundings = [part for part in (self.key_rounding, self.value_rounding) if part is not None]
        parts = [part for owner in (self, *roundings) for part in vars(owner).values()]
        return [part for part in parts if isinstance(part, Tensor)]

    @property
    def value_encoder(self) -> str | None:
        """The kernel that encodes values before `pack_values` does, or None."""
        if self.value_rounding is not None:
            return "compensate_values"
        return "code_floats" if self.turns_values else None

    @cached_property
    def macros(self) -> Macros:
        """What kernels that write codes are specialised for, beside the variant."""
        is_key, is_value = self.key_rounding is not None, self.value_rounding is not None
        named = {"KEY_COMP": is_key, "VALUE_COMP": is_value, "VALUE_FLOAT": self.turns_values}
        return tuple((name, int(value)) for name, value in named.items())


def code_tables(spec: KvSpec, books: tuple[Codebook, Codebook], value_channels: int) -> CodeTables:
    """Return the tables of a layer's codebooks.

    Raises:
        InputError: when the packing kernels do not know the scheme.
    """
    reason = unsupported(spec)
    if reason:
        raise InputError(f"{spec}: the CUDA kernels do not know {reason}; use the torch path")
    key = books[0]
    scale, offset = channel_affine(key)
    lower, upper = key.lower, key.upper
    assert lower is not None and upper is not None
    if not spec.key.outlier_fraction:
        lower, upper = torch.full_like(lower, -torch.inf), torch.full_like(upper, torch.inf)
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    middles = [(b.levels[..., 1:] + b.levels[..., :-1]) * 0.5 for b in books]
    tail = outliers_per_tail(spec.value, value_channels) if spec.value.outlier_fraction else 0
    key_middles = middles[0].contiguous()
    roundings = _rounding(books[0], key_middles), _rounding(books[1], middles[1])
    return CodeTables(
        *(lower, upper, offset, inverse, key_middles, middles[1], tail),
        *(*roundings, spec.value.rotated),
    )


def _rounding(book: Codebook, middles: Tensor) -> Rounding | None:
    """Return what compensated rounding of a side needs, its levels by channel where middles are."""
    if book.feedback is None:
        return None
    assert book.order is not None
    reads = book.decode_levels.expand(*middles.shape[:-1], -1).contiguous()
    return Rounding(reads, book.feedback.contiguous(), book.order.contiguous())


def unsupported(spec: KvSpec) -> str | None:
    """Return what of a scheme the packing kernels do not know, or None."""
    key, value = spec.key, spec.value
    known = {
        f"{key.method} codes": key.method not in (GROUPED, *ROTATING),
        f"{value.method} codes": value.method not in (GROUPED, *ROTATING),
        "states that are not codes": key.method != EXACT and value.method != EXACT,
        "8-bit codes that are compensated or of rotated values": not any(
            side.bits == 8 and (side.compensated or side.rotated) for side in (key, value)
        ),
        "codebooks per channel of 8-bit keys": not (key.channel_levels and key.bits == 8),
        "bits by token": spec.adaptive is None,
        "keys with a range per token": key.per_channel,
        "ranges per group of channels": value.group_size is None,
        "a cap on key outliers": key.outlier_cap is None,
    }
    return next((name for name, holds in known.items() if not holds), None)


def expect_code(code: CodeTables, variant: Variant, heads: int) -> list[Expected]:
    """Return what kernels that write codes expect of their tables.

    Raises:
        InputError: when the variant has no room for what the tables ask for.
    """
    check_codes(variant)
    if code.per_tail and not variant.outliers:
        raise InputError(
            f"expected a variant with lists of outliers: {code.per_tail} values at either end of a "
            "token are outliers and would be lost"
        )
    channels, real = (heads * variant.head_dim,), torch.float32
    middles = ((1 << variant.key_bits) - 1,), ((1 << variant.value_bits) - 1,)
    rows = channels if variant.channel_levels else ()
    counts = 1 << variant.key_bits, 1 << variant.value_bits
    roundings = (
        ("key", code.key_rounding, (*rows, counts[0])),
        ("value", code.value_rounding, counts[1:]),
    )
    return [
        ("lower", code.lower, real, channels),
        ("upper", code.upper, real, channels),
        ("offset", code.offset, real, channels),
        ("inverse", code.inverse, real, channels),
        ("key_middles", code.key_middles, real, rows + middles[0]),
        ("value_middles", code.value_middles, real, middles[1]),
        *(part for given in roundings for part in _expect_rounding(*given, variant, heads)),
    ]


def _expect_rounding(
    side: str, rounding: Rounding | None, reads: tuple[int, ...], variant: Variant, heads: int
) -> list[Expected]:
    if rounding is None:
        return []
    square = heads, variant.head_dim, variant.head_dim
    return [
        (f"{side} reads", rounding.reads, torch.float32, reads),
        (f"{side} feedback", rounding.feedback, torch.float32, square),
        (f"{side} turn", rounding.turn, torch.int16, square[:2]),
    ]
