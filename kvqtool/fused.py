"""One query token's attention over pages: which kernel variant, with which arguments.

`attend` runs kernels/attend.cu; `attend_reference` is the same mathematics in torch, on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvqtool.cuda import Argument, Kernel, Launcher, Macros, run_on_gpu
from kvqtool.errors import InputError
from kvqtool.memory import SLAB_TOKENS
from kvqtool.pages import Pages

SHARED_LIMIT: Final = 232_448  # what a block may have on compute capability 9.0
STATE: Final = ("packed", "sinks", "window", "position", "first_seen")


@dataclass(frozen=True)
class Variant:
    """What the kernel is specialised for; the macros of kernels/attend.cu.

    Args:
        head_dim: 64, 96, 128 or 256.
        key_bits: 2, 3, 4, or 16 for fp16 pages.
        value_bits: likewise.
        channel_levels: a codebook per key channel.
        rotated: keys lie before RoPE.
        outliers: slabs have lists of outliers.
        group: query heads a warp takes at once: 1, 2, 4 or 8.
        softcap: scores are capped.
        bfloat16: query, output and exact tokens are bfloat16, not float16.
        most_warps: warps of a block where shared memory has room for them.
        lut_keys: 3-bit keys are looked up in shared memory, in pairs, not picked from registers.
        lut_values: 3-bit values in pairs, 2-bit values four at once, likewise.
        unrolled: a slab's keys are straight code, not a loop.
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
    most_warps: int = 16
    lut_keys: bool = False
    lut_values: bool = False
    unrolled: bool = False

    def __post_init__(self) -> None:
        if self.head_dim not in (64, 96, 128, 256):
            raise InputError(
                f"fused attention knows head sizes 64, 96, 128, 256; not {self.head_dim}"
            )
        for bits in (self.key_bits, self.value_bits):
            if bits not in (2, 3, 4, 16):
                raise InputError(f"fused attention knows 2, 3 and 4 bits; not {bits}")

    @property
    def steps(self) -> int:
        """Tensor-core steps of a head."""
        return self.head_dim // 16

    @property
    def depth(self) -> int:
        """Chunks in a warp's ring, a divisor of a slab's chunks."""
        return next(depth for depth in (4, 3, 2) if sum(self._chunks) % depth == 0)

    @property
    def warps(self) -> int:
        """Warps of a block: as many as shared memory has room for."""
        room = SHARED_LIMIT - self._common_bytes - 64
        by_registers = 12 if self.head_dim == 256 else 16
        return min(self.most_warps, by_registers, room // self._corner_bytes)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self._common_bytes + 64 + self.warps * self._corner_bytes

    @property
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
            ("LUT_KEYS", int(self.lut_keys)),
            ("LUT_VALUES", int(self.lut_values)),
            ("UNROLLED", int(self.unrolled)),
        )

    @property
    def _chunks(self) -> tuple[int, int]:
        """Chunks of a slab's keys and of its values."""
        key, value = (self.steps // (1 if b == 16 else 2) for b in (self.key_bits, self.value_bits))
        return key, value

    @property
    def _tables(self) -> tuple[tuple[int, bool], tuple[int, bool]]:
        """Bits of keys and values that shared tables may serve, and whether they shall."""
        key_bits = 0 if self.channel_levels else self.key_bits
        return (key_bits, self.lut_keys), (self.value_bits, self.lut_values)

    @property
    def _common_bytes(self) -> int:
        pairs = [b == 4 or (b == 3 and lut) for b, lut in self._tables]
        rows = 256 if 4 in (self.key_bits, self.value_bits) else 128
        stride = 128 if self.channel_levels and self.key_bits == 4 else 256
        lut = rows * stride if any(pairs) else 0
        lut += 65_536 if self.value_bits == 2 and self.lut_values else 0
        angles = 4096 * self.steps if self.rotated else 0
        per_channel = {2: 8, 3: 128, 4: 512, 16: 0}[self.key_bits]
        head = self.head_dim * per_channel if self.channel_levels else 64 * self.steps
        query = self.group * self.head_dim * 4
        order = 6 * self.head_dim  # and frequencies
        return lut + angles + head + query + self.most_warps * self.group * 12 + order

    @property
    def _corner_bytes(self) -> int:
        slot = max(128 * b * (1 if b == 16 else 2) for b in (self.key_bits, self.value_bits))
        side = 256 + (896 if self.outliers else 0)
        mix = self.head_dim * self.group * (2 + 4)
        if self.outliers:
            mix += 256 if self.group == 1 else 272 * self.group
        sides = 1 if self.depth - 1 <= self._chunks[1] else 2
        return self.depth * slot + sides * side + mix


@dataclass(frozen=True)
class LayerTables:
    """What reading a layer's pages needs beside them.

    Args:
        key_table: `pages.key_table`.
        levels: `pages.level_table`.
        angles: `slabs.angle_table`.
        frequencies: `slabs.frequency_table`.
        order: (head_dim,) int16, the channel at each place of a key.
        scale: factor on scores, with what the model's rotation scales keys by.
        softcap: cap of the scores, or None.
    """

    key_table: Tensor
    levels: Tensor
    angles: Tensor
    frequencies: Tensor
    order: Tensor
    scale: float
    softcap: float | None = None


@dataclass(frozen=True)
class ExactTokens:
    """Sinks and recent window, each (batch, num_kv_heads, capacity, head_dim) after RoPE."""

    sink_key: Tensor
    sink_value: Tensor
    window_key: Tensor
    window_value: Tensor


@dataclass(frozen=True)
class Workspace:
    """What a launch writes beside its result; belongs to one stream at a time.

    Args:
        partials: float32, enough for `workspace_floats`.
        counters: int32 zeros, one for each segment; the kernel leaves zeros behind.
        blocks: blocks of the launch, one a multiprocessor.
    """

    partials: Tensor
    counters: Tensor
    blocks: int


@dataclass(frozen=True)
class PackedContext:
    """A layer's tokens as the kernel reads them: pages, exact tokens, and `state` (batch, 8) int32,
    whose first columns are those of STATE.
    """

    pages: Pages
    exact: ExactTokens
    state: Tensor


def groups_of(num_heads: int, num_kv_heads: int) -> int:
    """Return the query heads that a warp takes at once: the least of 1, 2, 4, 8 that holds a KV
    head's, or 8.
    """
    share = num_heads // num_kv_heads
    return next((size for size in (1, 2, 4) if share <= size), 8)


def new_workspace(variant: Variant, query: Tensor, num_kv_heads: int, blocks: int) -> Workspace:
    """Allocate a workspace for queries of this shape."""
    batch, num_heads, _ = query.shape
    segments = batch * num_kv_heads * -(-num_heads // num_kv_heads // variant.group)
    floats = (blocks + segments) * variant.group * (variant.head_dim + 2)
    return Workspace(
        torch.empty(floats, dtype=torch.float32, device=query.device),
        torch.zeros(segments, dtype=torch.int32, device=query.device),
        blocks,
    )


def attend_arguments(
    query: Tensor, out: Tensor, context: PackedContext, tables: LayerTables, workspace: Workspace
) -> list[Argument]:
    """Return the arguments of the kernel in its order."""
    pages, exact = context.pages, context.exact
    batch, num_heads, _ = query.shape
    return [
        *(query, out, pages.slabs, pages.ranges, pages.outlier_index, pages.outlier_words),
        *(pages.page_table, context.state, tables.key_table, tables.levels, tables.angles),
        *(tables.frequencies, tables.order, exact.sink_key, exact.sink_value),
        *(exact.window_key, exact.window_value, workspace.partials, workspace.counters),
        *(batch, num_heads, pages.slabs.shape[1], pages.page_table.shape[1]),
        *(exact.sink_key.shape[2], exact.window_key.shape[2]),
        tables.scale * math.log2(math.e),
        (tables.softcap or 0.0) * math.log2(math.e),
    ]


def attend(
    query: Tensor,
    context: PackedContext,
    tables: LayerTables,
    variant: Variant,
    workspace: Workspace,
    run: Launcher = run_on_gpu,
) -> Tensor:
    """Attend with one query token a sequence.

    Args:
        query: (batch, num_heads, head_dim) after RoPE, contiguous.
        context: the layer's tokens.
        tables: what reading them needs.
        variant: the kernel.
        workspace: from `new_workspace`.
        run: what runs the kernel.

    Returns:
        (batch, num_heads, head_dim) in the query's dtype.
    """
    _check(query, context, variant)
    out = torch.empty_like(query)
    arguments = attend_arguments(query, out, context, tables, workspace)
    shape = workspace.blocks, 32 * variant.warps, variant.shared_bytes
    run(Kernel("attend", "attend", variant.macros), shape, arguments)
    return out


def _check(query: Tensor, context: PackedContext, variant: Variant) -> None:
    wanted = torch.bfloat16 if variant.bfloat16 else torch.float16
    if query.dtype != wanted or query.shape[-1] != variant.head_dim or not query.is_contiguous():
        raise InputError(
            f"expected a contiguous {wanted} query of {variant.head_dim} channels, "
            f"received {query.dtype} {tuple(query.shape)}"
        )
    pages = context.pages
    words = 2 * variant.head_dim * (variant.key_bits + variant.value_bits)
    if pages.slabs.shape[2:] != (128 // SLAB_TOKENS, words):
        raise InputError(f"expected slabs of {words} words, received {tuple(pages.slabs.shape)}")
    if len(context.state) != len(query) or context.state.dtype != torch.int32:
        raise InputError(
            f"expected an int32 state row for each of {len(query)} sequences, "
            f"received {context.state.dtype} {tuple(context.state.shape)}"
        )
