"""Which variant of the kernels a scheme takes: what kernels/*.cu are specialised for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from kvqtool.cuda import Macros
from kvqtool.errors import InputError
from kvqtool.memory import SLAB_TOKENS
from kvqtool.spec import KvSpec
from kvqtool.turning import turned_steps

SHARED_LIMIT: Final = 232_448  # what a block may have on compute capability 9.0
# With up to 12 warps a thread has 168 registers, with up to 16 it has 128.
FEW_WARPS: Final = 12
MOST_WARPS: Final = 16


@dataclass(frozen=True)
class Variant:
    """What the kernel is specialised for; the macros of kernels/attend.cu.

    Args:
        head_dim: 64, 96, 128 or 256.
        key_bits: 2, 3, 4, 8, or 16 for fp16 pages.
        value_bits: likewise.
        channel_levels: a codebook per key channel.
        rotated: keys lie before RoPE.
        outliers: slabs have lists of outliers.
        group: query heads a warp takes at once: 1, 2, 4 or 8.
        softcap: scores are capped.
        bfloat16: query, output and exact tokens are bfloat16, not float16.
        most_warps: warps of a block where shared memory has room for them.
        value_table: values of 2 and 3 bits are looked up in shared memory, not in registers.
        ahead: steps that a warp reads codes ahead into registers: 1, 2 or 4; 0 where it reads them
            through a ring in shared memory.
        most_chunks: chunks in that ring at most: 2, 3 or 4.
        chunk_steps: tensor-core steps of codes below 8 bits in a chunk, 2, 4 or 8.
        turned: tensor-core steps whose keys are turned token by token; -1 for all, 0 where nothing
            turns (`turning.turned_steps`).
    """

    head_dim: int
    key_bits: int
    value_bits: int
    channel_levels: bool
    rotated: bool
    outliers: bool
    group: int
    softcap: bool = False
    bfloat16: bool = False
    most_warps: int = MOST_WARPS
    value_table: bool = True
    ahead: int = 0
    most_chunks: int = 4
    chunk_steps: int = 2
    turned: int = -1

    def __post_init__(self) -> None:
        if self.head_dim not in (64, 96, 128, 256):
            raise InputError(
                f"fused attention knows head sizes 64, 96, 128, 256; not {self.head_dim}"
            )
        for bits in (self.key_bits, self.value_bits):
            if bits not in (2, 3, 4, 8, 16):
                raise InputError(f"fused attention knows 2, 3, 4 and 8 bits; not {bits}")
        if self.channel_levels and self.key_bits == 8:
            raise InputError("fused attention knows no codebooks per channel of 8-bit keys")
        if self.group not in (1, 2, 4, 8):
            raise InputError(f"a warp takes 1, 2, 4 or 8 query heads at once; not {self.group}")
        if self.warps < 1:
            raise InputError(
                f"{self.key_bits}-bit keys and {self.value_bits}-bit values of {self.head_dim} "
                f"channels leave no shared memory for a warp; use the torch path"
            )

    @property
    def steps(self) -> int:
        """Tensor-core steps of a head."""
        return self.head_dim // 16

    @property
    def states(self) -> torch.dtype:
        """Dtype of queries, outputs and exact tokens."""
        return torch.bfloat16 if self.bfloat16 else torch.float16

    @property
    def level_row(self) -> int:
        """Levels that `pages.level_table` has room for on each side."""
        return 256 if 8 in (self.key_bits, self.value_bits) else 16

    @property
    def middles(self) -> int:
        """Floats that kernels which write codes keep of both sides' middles."""
        return sum(256 if bits == 8 else 16 for bits in (self.key_bits, self.value_bits))

    @property
    def slab_words(self) -> int:
        """Words of a slab, its keys and its values."""
        return SLAB_TOKENS * self.head_dim * (self.key_bits + self.value_bits) // 32

    @cached_property
    def depth(self) -> int:
        """Chunks in a warp's ring, a divisor of a slab's chunks."""
        return next(
            depth
            for depth in (4, 3, 2)
            if depth <= self.most_chunks and sum(self._chunks) % depth == 0
        )

    @cached_property
    def warps(self) -> int:
        """Warps of a block: as many as shared memory has room for."""
        room = SHARED_LIMIT - self._common_bytes
        by_registers = FEW_WARPS if self.head_dim == 256 else MOST_WARPS
        return min(self.most_warps, by_registers, room // self._corner_bytes)

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self._common_bytes + self.warps * self._corner_bytes

    @cached_property
    def macros(self) -> Macros:
        """The macros, in a fixed order."""
        return (
            ("HEAD_DIM", self.head_dim),
            ("KEY_BITS", self.key_bits),
            ("VALUE_BITS", self.value_bits),
            ("CHANNEL_LEVELS", int(self.channel_levels)),
            ("ROTATED", int(self.rotated)),
            ("OUTLIERS", int(self.outliers)),
            ("GROUP", self.group),
            ("SOFTCAP", int(self.softcap)),
            ("BF16", int(self.bfloat16)),
            ("WARPS", self.warps),
            ("DEPTH", self.depth),
            ("SHARED_BYTES", self.shared_bytes),
            ("VALUE_TABLE", int(self.value_table)),
            ("AHEAD", self.ahead),
            ("CHUNK_STEPS", self.chunk_steps),
            ("TURNED", self._turned),
        )

    @cached_property
    def code_macros(self) -> Macros:
        """The macros that say what a code is, without the dtype of states."""
        wanted = ("HEAD_DIM", "KEY_BITS", "VALUE_BITS", "CHANNEL_LEVELS", "ROTATED", "OUTLIERS")
        return tuple((k, v) for k, v in self.macros if k in wanted)

    @property
    def _chunks(self) -> tuple[int, int]:
        """Chunks of a slab's keys and of its values."""
        key, value = (self.steps // self._steps_of(b) for b in (self.key_bits, self.value_bits))
        return key, value

    def _steps_of(self, bits: int) -> int:
        """Steps of a chunk of codes."""
        return 1 if bits >= 8 else self.chunk_steps

    @property
    def _turned(self) -> int:
        return self.steps if self.turned < 0 else self.turned

    @property
    def _slow_steps(self) -> int:
        """Steps whose keys are not turned."""
        return self.steps - self._turned

    @property
    def _common_bytes(self) -> int:
        has_rows = self.value_bits in (4, 8) or (self.value_bits == 3 and self.value_table)
        has_rows |= self.key_bits in (4, 8) and not self.channel_levels
        rows = 256 if {4, 8} & {self.key_bits, self.value_bits} else 128
        stride = 128 if self.channel_levels and self.key_bits == 4 else 256
        lut = rows * stride if has_rows else 0
        lut += 65_536 if self.value_bits == 2 and self.value_table else 0
        angles = 4096 * self._turned if self.rotated else 0
        head = 64 * self.steps
        if self.channel_levels:
            head = self.head_dim * {2: 8, 3: 256, 4: 512}[self.key_bits]
        query = self.group * self.head_dim * 4
        order = 6 * self.head_dim  # and frequencies
        terms = 128 * self._slow_steps if self.rotated else 0
        places = 4096 if self._slow_steps and self.group < 4 else 0
        join = self.most_warps * self.group * 12 + 16 + 48  # and what a block keeps
        return _in_rows(lut + angles + head + query + join + order + terms + places)

    @property
    def _corner_bytes(self) -> int:
        slot = max(128 * b * self._steps_of(b) for b in (self.key_bits, self.value_bits))
        side = 256 + (1024 if self.outliers else 0)
        mix = self.head_dim * self.group * (2 + 4)
        if self.outliers:
            mix += 4 * self.group * {1: 64, 8: 68}.get(self.group, 72)  # sparse scores
        mix += 256 * self._slow_steps + (128 * self.group if self.group < 4 else 0)
        mix += 32  # what offsets add
        sides = 1 if self.depth - 1 <= self._chunks[1] else 2
        return _in_rows(side + mix if self.ahead else self.depth * slot + sides * side + mix)


def _in_rows(size: int) -> int:
    """Return bytes of whole rows of the 32 banks of shared memory."""
    return -(-size // 128) * 128


def variant_of(
    spec: KvSpec,
    head_dim: int,
    group: int,
    inv_freq: Tensor | None = None,
    *,
    softcap: bool = False,
    bfloat16: bool = False,
) -> Variant:
    """Return the variant of a scheme, with the settings that were fastest where they were tried
    (docs/kernels.md): tables for values where they cost no warp, and registers rather than a few
    warps more.

    Args:
        spec: the scheme.
        head_dim: 64, 96, 128 or 256.
        group: query heads that a warp takes at once.
        inv_freq: radians a token that keys turn by, (head_dim / 2,); None where they lie turned.
        softcap: whether scores are capped.
        bfloat16: whether states are bfloat16, not float16.
    """
    single = spec.key.channel_levels and spec.key.bits == 4  # codes are looked up one by one
    chunk_steps, most_chunks = _ring(spec, head_dim // 16, group)
    variant = Variant(
        head_dim,
        spec.key.bits,
        spec.value.bits,
        spec.key.channel_levels,
        inv_freq is not None,
        bool(spec.key.outlier_fraction or spec.value.outlier_fraction),
        group,
        softcap,
        bfloat16,
        ahead=4 if single and group > 1 else 0,
        most_chunks=most_chunks,
        chunk_steps=chunk_steps,
        turned=0 if inv_freq is None else turned_steps(inv_freq, group, spec.key.bits),
    )
    plain = replace(variant, value_table=False)
    chosen = variant if variant.warps == plain.warps else plain
    few = chosen.warps < MOST_WARPS or chosen.ahead
    return replace(chosen, most_warps=FEW_WARPS) if few else chosen


def _ring(spec: KvSpec, steps: int, group: int) -> tuple[int, int]:
    """Return the steps of a chunk and the chunks of a ring that were fastest: few large ones, for
    at each of them a warp's pipelines run empty.
    """
    if max(spec.key.bits, spec.value.bits) > 4 or steps % 4:
        return 2, 4
    if spec.key.channel_levels and spec.key.bits == 4:
        return 2, 2  # their tables leave no room for more
    if spec.key.bits == spec.value.bits == 2 and group == 1:
        return min(8, steps), 2
    return 4, 2


def groups_of(num_heads: int, num_kv_heads: int) -> int:
    """Return the query heads that a warp takes at once: the least of 1, 2, 4, 8 that holds a KV
    head's, or 8.
    """
    share = num_heads // num_kv_heads
    return next((size for size in (1, 2, 4) if share <= size), 8)
