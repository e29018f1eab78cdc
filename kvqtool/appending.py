"""Add one token to pages in place: kernels/append.cu and the pages it writes to.

Pages that still grow are allocated with room in every list of outliers, so that nothing is
allocated while a graph replays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvqtool.arguments import check_room, check_tensors, expect_pages
from kvqtool.code_tables import PLAIN, CodeTables, expect_code
from kvqtool.cuda import Argument, Kernel, Launcher, Macros, run_on_gpu
from kvqtool.fused import LayerTables, expect_state, expect_tables
from kvqtool.memory import PAGE_TOKENS
from kvqtool.page_memory import QUAD, SLABS
from kvqtool.pages import Pages
from kvqtool.variant import Variant

_WARPS: Final = 8  # of a block
_STAGED_DIM: Final = 128  # head sizes whose feedback has room in shared memory


@dataclass(frozen=True)
class GrowingPages:
    """Pages with room for tokens to come.

    Args:
        pages: the pages; empty lists have their place already.
        counts: (pages, num_kv_heads, 2, 2) int32, words of each list.
        dropped: (1,) int32, outliers that found no room.
        room: words that a list of keys and one of values has room for.
    """

    pages: Pages
    counts: Tensor
    dropped: Tensor
    room: tuple[int, int]


def new_pages(
    variant: Variant, batch: int, num_kv_heads: int, blocks: int, room: tuple[int, int],
    device: torch.device,
) -> GrowingPages:  # fmt: skip
    """Allocate empty pages.

    Args:
        variant: the attention kernel's variant.
        batch: sequences.
        num_kv_heads: KV heads.
        blocks: pages of each sequence.
        room: words in each list of keys and of values, multiples of 4.
        device: the GPU.
    """
    count, width = blocks * batch, 2 * variant.head_dim * (variant.key_bits + variant.value_bits)
    shape = count, num_kv_heads, SLABS
    lists = torch.arange(count * num_kv_heads * SLABS, dtype=torch.int32, device=device)
    each = sum(room) // QUAD
    index = torch.zeros(*shape, 4, dtype=torch.int32, device=device)
    index[..., 0] = (lists * each).view(shape)
    index[..., 2] = (lists * each + room[0] // QUAD).view(shape)
    table = torch.arange(count, dtype=torch.int32, device=device).view(blocks, batch).T.contiguous()
    pages = Pages(
        torch.zeros(*shape, width, dtype=torch.int32, device=device),
        torch.zeros(count, PAGE_TOKENS, 2, dtype=torch.float16, device=device),
        index,
        torch.zeros(max(len(lists) * sum(room), QUAD), dtype=torch.int32, device=device),
        table,
    )
    counts = torch.zeros(*shape, 2, dtype=torch.int32, device=device)
    return GrowingPages(pages, counts, torch.zeros(1, dtype=torch.int32, device=device), room)


def append(
    token: tuple[Tensor, Tensor, Tensor, Tensor],
    growing: GrowingPages,
    code: CodeTables,
    tables: LayerTables,
    variant: Variant,
    run: Launcher = run_on_gpu,
) -> None:
    """Write one token of every sequence, where `state` says the sequence ends.

    Every sequence must end before its pages do: `state[:, 0]` less than 128 times the page table's
    columns. Lengths lie on the device, so that a graph can hold this; nothing checks them, and a
    token past the end is written to memory of something else.

    Args:
        token: keys after RoPE and values, (batch, num_kv_heads, head_dim) float16 or bfloat16;
            (batch, head_dim / 2, 2) float32 cosine and sine by place; `state`, (batch, 8) int32.
        growing: the pages, changed in place.
        code: `packing.code_tables`.
        tables: the layer's tables.
        variant: the attention kernel's variant.
        run: what runs the kernel.

    Raises:
        InputError: when the variant cannot hold the codes, or a tensor is not what it should be.
    """
    key, value, turns, state = token
    pages = growing.pages
    batch, heads, head_dim = key.shape
    _check(token, growing, code, tables, variant)
    roundings = [code.key_rounding, code.value_rounding]
    compensating: list[Argument] = []
    for rounding in roundings:
        parts = vars(rounding).values() if rounding else (code.offset, code.offset, tables.order)
        compensating += parts  # unread where rounding is plain
    # What a block of values takes, which is more than one of keys does.
    searched, item = (2056, 4) if code.turns_values else (776, 2)
    shared = searched * 4 + variant.middles * 6 + item * head_dim * (1 + heads)
    shared += _bench_bytes(head_dim) if any(roundings) else 0
    run(
        append_kernel(variant, code.macros),
        (2 * batch * heads, 32 * _WARPS, shared),
        [
            *(key, value, pages.page_table, state, code.lower, code.upper, code.offset),
            *(code.inverse, code.key_middles, code.value_middles, tables.order, turns),
            *(tables.levels, tables.key_table, pages.ranges, growing.counts, pages.outlier_index),
            *(pages.slabs, pages.outlier_words, growing.dropped, *compensating),
            *(heads, pages.page_table.shape[1], code.per_tail, *growing.room),
        ],
    )


def append_kernel(variant: Variant, code: Macros = PLAIN) -> Kernel:
    """Return the function of kernels/append.cu for a variant and `CodeTables.macros`."""
    macros = (*variant.code_macros, ("BF16", int(variant.bfloat16)), ("WARPS", _WARPS), *code)
    return Kernel("append", "append", macros)


def _bench_bytes(head_dim: int) -> int:
    """Return the shared memory that compensated rounding of a side works on, a block's."""
    return 11 * head_dim + (4 * head_dim * head_dim if head_dim <= _STAGED_DIM else 0)


def _check(
    token: tuple[Tensor, Tensor, Tensor, Tensor],
    growing: GrowingPages,
    code: CodeTables,
    tables: LayerTables,
    variant: Variant,
) -> None:
    key, value, turns, state = token
    batch, heads, _ = key.shape
    wanted = batch, heads, variant.head_dim
    lists = len(growing.pages.ranges), heads, SLABS
    check_tensors(
        [("keys", key, variant.states, wanted), ("values", value, variant.states, wanted)],
        [("turns", turns, torch.float32, (batch, variant.head_dim // 2, 2))],
        [expect_state(state, batch)],
        expect_pages(growing.pages, variant, heads, batch),
        [("counts", growing.counts, torch.int32, (*lists, 2))],
        [("dropped", growing.dropped, torch.int32, (1,))],
        expect_code(code, variant, heads),
        expect_tables(tables, variant, heads),
    )
    words = math.prod(lists) * sum(growing.room)
    check_room("outlier_words", growing.pages.outlier_words, words)
