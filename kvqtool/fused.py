"""One query token's attention over pages: which kernel variant, with which arguments.

`attend` runs kernels/attend.cu; `attend_reference` is the same mathematics in torch, on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvqtool.arguments import Expected, check_room, check_tensors, expect_pages
from kvqtool.cuda import Argument, Kernel, Launcher, run_on_gpu
from kvqtool.errors import InputError
from kvqtool.pages import Pages
from kvqtool.variant import Variant

STATE: Final = ("packed", "sinks", "window", "position", "first_seen")


@dataclass(frozen=True)
class LayerTables:
    """What reading a layer's pages needs beside them.

    Args:
        key_table: `pages.key_table`.
        levels: `pages.level_table`.
        angles: `turning.angle_table`.
        frequencies: `turning.frequency_table`.
        coefficients: `turning.coefficient_table`.
        order: (head_dim,) int16, the channel at each place of a key.
        scale: factor on scores, with what the model's rotation scales keys by.
        softcap: cap of the scores, or None.
    """

    key_table: Tensor
    levels: Tensor
    angles: Tensor
    frequencies: Tensor
    coefficients: Tensor
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
        partials: float32.
        counters: int32 zeros, one for each segment; the kernel leaves zeros behind.
        log_sums: (batch, num_heads) float32, to hold the log of the sum of exp(score); empty, (0,),
            where nobody asks.
        blocks: blocks of the launch, one a multiprocessor.
    """

    partials: Tensor
    counters: Tensor
    log_sums: Tensor
    blocks: int


@dataclass(frozen=True)
class PackedContext:
    """A layer's tokens as the kernel reads them: pages, exact tokens, and `state` (batch, 8) int32,
    whose first columns are those of STATE.
    """

    pages: Pages
    exact: ExactTokens
    state: Tensor


def new_workspace(variant: Variant, query: Tensor, num_kv_heads: int, blocks: int) -> Workspace:
    """Allocate a workspace for queries of this shape."""
    floats, segments = _workspace_sizes(variant, query, num_kv_heads, blocks)
    return Workspace(
        torch.empty(floats, dtype=torch.float32, device=query.device),
        torch.zeros(segments, dtype=torch.int32, device=query.device),
        torch.empty(0, device=query.device),  # passed as a null pointer
        blocks,
    )


def _workspace_sizes(
    variant: Variant, query: Tensor, num_kv_heads: int, blocks: int
) -> tuple[int, int]:
    """Return the floats of partial results and the counters of a launch."""
    batch, num_heads, _ = query.shape
    segments = batch * num_kv_heads * -(-num_heads // num_kv_heads // variant.group)
    return (blocks + segments) * variant.group * (variant.head_dim + 2), segments


def attend_arguments(
    query: Tensor, out: Tensor, context: PackedContext, tables: LayerTables, workspace: Workspace
) -> list[Argument]:
    """Return the arguments of the kernel in its order."""
    pages, exact = context.pages, context.exact
    batch, num_heads, _ = query.shape
    heads = pages.slabs.shape[1]
    return [
        *(query, out, pages.slabs, pages.ranges, pages.outlier_index, pages.outlier_words),
        *(pages.page_table, context.state, tables.key_table, tables.levels, tables.angles),
        *(tables.frequencies, tables.coefficients, tables.order, exact.sink_key, exact.sink_value),
        *(exact.window_key, exact.window_value, workspace.partials, workspace.counters),
        workspace.log_sums,
        *(batch, num_heads // heads, heads, pages.page_table.shape[1]),
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
    _check(query, context, tables, variant, workspace)
    out = torch.empty_like(query)
    arguments = attend_arguments(query, out, context, tables, workspace)
    shape = workspace.blocks, 32 * variant.warps, variant.shared_bytes
    run(Kernel("attend", "attend", variant.macros), shape, arguments)
    return out


def expect_tables(tables: LayerTables, variant: Variant, heads: int) -> list[Expected]:
    """Return what kernels expect of a layer's tables."""
    steps, half = variant.steps, torch.float16
    shape: tuple[int, ...] = (heads, steps, 4, 2, 2, 2)
    if variant.channel_levels:
        shape = (heads, variant.head_dim, 1 << variant.key_bits)
    by_key: Expected = "key_table", tables.key_table, half, shape
    return [
        *([by_key] if variant.key_bits != 16 else []),
        ("levels", tables.levels, half, (2, variant.level_row)),
        ("angles", tables.angles, half, (8, steps, 32, 2, 2, 2)),
        ("frequencies", tables.frequencies, torch.int64, (variant.head_dim // 2,)),
        ("coefficients", tables.coefficients, half, (variant.head_dim // 4, 8, 2)),
        ("order", tables.order, torch.int16, (variant.head_dim,)),
    ]


def expect_state(state: Tensor, batch: int) -> Expected:
    """Return what kernels expect of the sequences' lengths."""
    return "state", state, torch.int32, (batch, 8)


def _check(
    query: Tensor,
    context: PackedContext,
    tables: LayerTables,
    variant: Variant,
    workspace: Workspace,
) -> None:
    heads, batch, exact = context.pages.slabs.shape[1], len(query), context.exact
    capacities, logs = (exact.sink_key.shape[2], exact.window_key.shape[2]), workspace.log_sums
    states = [
        (name, part, variant.states, (batch, heads, capacities[i // 2], variant.head_dim))
        for i, (name, part) in enumerate(vars(exact).items())
    ]
    check_tensors(
        [("query", query, variant.states, (batch, None, variant.head_dim))],
        expect_pages(context.pages, variant, heads, batch),
        [expect_state(context.state, batch)],
        expect_tables(tables, variant, heads),
        states,
        [
            ("partials", workspace.partials, torch.float32, (None,)),
            ("counters", workspace.counters, torch.int32, (None,)),
            ("log_sums", logs, torch.float32, tuple(query.shape[:2]) if logs.numel() else (0,)),
        ],
    )
    if query.shape[1] % heads or variant.softcap != (tables.softcap is not None):
        raise InputError(
            f"expected query heads in multiples of {heads} and {'a' if variant.softcap else 'no'} "
            f"softcap, received {query.shape[1]} and {tables.softcap}"
        )
    floats, segments = _workspace_sizes(variant, query, heads, workspace.blocks)
    check_room("partials", workspace.partials, floats)
    check_room("counters", workspace.counters, segments)
