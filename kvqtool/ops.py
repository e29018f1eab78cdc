"""`torch.ops.kvqtool.attend`: fused attention as one operation of torch, which compile keeps whole.

On CUDA tensors it runs the kernel, on CPU tensors the torch reference. Importing this file makes
the operation known to torch.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kvqtool.fused import (
    ExactTokens,
    LayerTables,
    PackedContext,
    Workspace,
    attend,
)
from kvqtool.pages import Pages
from kvqtool.reading import attend_reference
from kvqtool.variant import Variant

# Written out, for torch 2.6 cannot infer it from `list[Tensor]`.
_SCHEMA: Final = (
    "(Tensor query, Tensor[] read, Tensor(a!)[] written, int[] numbers, float[] reals) -> Tensor"
)


def call_attend(
    query: Tensor,
    context: PackedContext,
    tables: LayerTables,
    variant: Variant,
    workspace: Workspace,
) -> Tensor:
    """Call the operation; arguments and result are those of `fused.attend`."""
    # Field by field, for torch 2.6 traces neither vars() nor astuple() of a dataclass.
    pages, exact = context.pages, context.exact
    read = [pages.slabs, pages.ranges, pages.outlier_index, pages.outlier_words, pages.page_table]
    read += [exact.sink_key, exact.sink_value, exact.window_key, exact.window_value, context.state]
    read += [tables.key_table, tables.levels, tables.angles, tables.frequencies]
    read += [tables.coefficients, tables.order]
    flags = variant.channel_levels, variant.rotated, variant.outliers
    numbers = [variant.head_dim, variant.key_bits, variant.value_bits, *(int(f) for f in flags)]
    numbers += [variant.group, int(variant.softcap), int(variant.bfloat16)]
    numbers += [variant.most_warps, int(variant.value_table), variant.ahead, variant.most_chunks]
    numbers += [variant.chunk_steps, variant.turned, workspace.blocks]
    reals = [tables.scale] + ([] if tables.softcap is None else [tables.softcap])
    written = [workspace.partials, workspace.counters, workspace.log_sums]
    out: Tensor = torch.ops.kvqtool.attend(query, read, written, numbers, reals)
    return out


@torch.library.custom_op(
    "kvqtool::attend", mutates_args=("written",), device_types="cuda", schema=_SCHEMA
)
def _attend_cuda(
    query: Tensor,
    read: list[Tensor],
    written: list[Tensor],
    numbers: list[int],
    reals: list[float],
) -> Tensor:
    context, tables, variant = _arguments(read, numbers, reals)
    partials, counters, log_sums = written
    workspace = Workspace(partials, counters, log_sums, numbers[-1])
    return attend(query, context, tables, variant, workspace)


@_attend_cuda.register_kernel("cpu")
def _attend_cpu(
    query: Tensor,
    read: list[Tensor],
    written: list[Tensor],
    numbers: list[int],
    reals: list[float],
) -> Tensor:
    log_sums = written[2] if written[2].numel() else None
    return attend_reference(query, *_arguments(read, numbers, reals), log_sums)


@_attend_cuda.register_fake
def _attend_shape(
    query: Tensor,
    read: list[Tensor],
    written: list[Tensor],
    numbers: list[int],
    reals: list[float],
) -> Tensor:
    return torch.empty_like(query)


def _arguments(
    read: list[Tensor], numbers: list[int], reals: list[float]
) -> tuple[PackedContext, LayerTables, Variant]:
    """Put the flat arguments of the operation together again."""
    context = PackedContext(Pages(*read[:5]), ExactTokens(*read[5:9]), read[9])
    cap = reals[1] if len(reals) > 1 else None
    keys, books, turns, frequencies, factors, order = read[10:16]
    tables = LayerTables(keys, books, turns, frequencies, factors, order, reals[0], cap)
    head_dim, key_bits, value_bits, levels, rotated, outliers, group, softcap, bf16 = numbers[:9]
    flags = bool(levels), bool(rotated), bool(outliers)
    most_warps, value_table = numbers[9], numbers[10] > 0
    return (
        context,
        tables,
        Variant(
            *(head_dim, key_bits, value_bits),
            *flags,
            group,
            *(softcap > 0, bf16 > 0),
            most_warps,
            value_table,
            *numbers[11:15],
        ),
    )
