"""Read pages in torch, on any device: what the kernels compute, in few words.

`decode_pages` is the reference of dequantizing, `attend_reference` of fused attention.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kvqtool.arguments import check_codes, check_tensors, expect_pages
from kvqtool.cuda import Kernel, Launcher, run_on_gpu
from kvqtool.errors import InputError
from kvqtool.fused import LayerTables, PackedContext, expect_state, expect_tables
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS
from kvqtool.page_memory import HEADER, QUAD, SLABS
from kvqtool.pages import Pages
from kvqtool.slabs import unpack_slabs
from kvqtool.variant import Variant


def decode_pages(
    context: PackedContext, tables: LayerTables, variant: Variant
) -> tuple[Tensor, Tensor]:
    """Return keys after RoPE and values of all pages, (batch, num_kv_heads, tokens, head_dim).

    Both are float32. Tokens past a sequence's end hold whatever their pages do.
    """
    pages, head_dim = _named(context.pages), variant.head_dim
    split = 2 * head_dim * variant.key_bits
    words = pages.slabs.flatten(0, 2)
    shape = (*pages.slabs.shape[:3], SLAB_TOKENS, head_dim)
    key = unpack_slabs(words[:, :split], variant.key_bits, head_dim, is_key=True).view(shape)
    value = unpack_slabs(words[:, split:], variant.value_bits, head_dim, is_key=False).view(shape)
    if variant.key_bits != 16:
        key = _decode_keys(key, tables, variant)
    if variant.value_bits != 16:
        scale, offset = pages.ranges.float().view(-1, 1, 2, SLAB_TOKENS, 2).unbind(-1)
        value = tables.levels[1].float()[value.long()] * scale[..., None] + offset[..., None]
    key, value = key.float(), value.float()
    if variant.outliers:
        for side, states in enumerate((key, value)):
            row, word = _outliers(pages, side)
            token, place = word >> 2 & 63, word >> 8 & 255
            delta = (word >> 16).to(torch.int16).view(torch.float16).float()
            at = (row * SLAB_TOKENS + token) * head_dim + place
            states.view(-1).index_add_(0, at.long(), delta)
    key, value = (_by_sequence(part, pages.page_table) for part in (key, value))
    if variant.rotated:
        key = _rotate(key, tables.frequencies, context.state[:, 3])
    ordered = torch.empty_like(key)
    ordered[..., tables.order.long()] = key
    return ordered, value


def _named(pages: Pages) -> Pages:
    """Return the pages that a page table names, in its order."""
    batch, blocks = pages.page_table.shape
    if blocks * batch == len(pages.slabs):
        return pages
    named = pages.page_table.T.flatten().long()
    table = torch.arange(len(named), device=named.device).view(blocks, batch).T
    picked = {n: getattr(pages, n)[named] for n in ("slabs", "ranges", "outlier_index")}
    return replace(pages, **picked, page_table=table.to(torch.int32).contiguous())


def dequantize(
    context: PackedContext,
    tables: LayerTables,
    variant: Variant,
    dtype: torch.dtype,
    run: Launcher = run_on_gpu,
) -> tuple[Tensor, Tensor]:
    """Return what `decode_pages` does, by kernels/dequantize.cu.

    Args:
        context: the layer's tokens.
        tables: what reading them needs.
        variant: the attention kernel's variant.
        dtype: float16 or bfloat16, of the result.
        run: what runs the kernel.

    Returns:
        Keys after RoPE and values, (batch, num_kv_heads, tokens, head_dim); room past a sequence's
        end is zero.

    Raises:
        InputError: for pages of 16 bits, another dtype, or a tensor that is not what it should be.
    """
    pages, heads = context.pages, context.pages.slabs.shape[1]
    batch, blocks = pages.page_table.shape
    check_codes(variant)
    check_tensors(
        expect_pages(pages, variant, heads, batch),
        [expect_state(context.state, batch)],
        expect_tables(tables, variant, heads),
    )
    shape = batch, heads, blocks * PAGE_TOKENS, variant.head_dim
    device = pages.slabs.device
    key, value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    grid = batch * heads * blocks * SLABS
    run(
        dequantize_kernel(variant, dtype),
        (grid, 32 * variant.steps, SLAB_TOKENS * (variant.head_dim + 4) * 4),
        [
            *(pages.slabs, pages.ranges, pages.outlier_index, pages.outlier_words),
            *(pages.page_table, context.state, tables.key_table, tables.levels),
            *(tables.frequencies, tables.order, key, value, heads, blocks, shape[2]),
        ],
    )
    return key, value


def dequantize_kernel(variant: Variant, dtype: torch.dtype) -> Kernel:
    """Return the function of kernels/dequantize.cu for a variant and the dtype of its result."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"expected float16 or bfloat16, received {dtype}")
    macros = (*variant.code_macros, ("BF16", int(dtype == torch.bfloat16)))
    return Kernel("dequantize", "dequantize", macros)


def attend_reference(
    query: Tensor,
    context: PackedContext,
    tables: LayerTables,
    variant: Variant,
    log_sums: Tensor | None = None,
) -> Tensor:
    """Return what `fused.attend` does, (batch, num_heads, head_dim) in the query's dtype, and write
    `log_sums`, (batch, num_heads) float32, if they are given.
    """
    keys, values = decode_pages(context, tables, variant)
    exact, heads = context.exact, keys.shape[1]
    out = torch.empty_like(query)
    for b, (packed, sinks, window, _, first, *_) in enumerate(context.state.tolist()):
        key = _joined(exact.sink_key[b, :, :sinks], keys[b, :, first:packed])
        key = _joined(key, exact.window_key[b, :, :window])
        value = _joined(exact.sink_value[b, :, :sinks], values[b, :, first:packed])
        value = _joined(value, exact.window_value[b, :, :window])
        grouped = query[b].float().view(heads, -1, variant.head_dim)
        score = grouped @ key.transpose(1, 2) * tables.scale
        if tables.softcap is not None:
            score = tables.softcap * (score / tables.softcap).tanh()
        if log_sums is not None:
            log_sums[b] = score.logsumexp(-1).flatten()
        out[b] = (score.softmax(-1) @ value).view(-1, variant.head_dim).to(query.dtype)
    return out


def _joined(left: Tensor, right: Tensor) -> Tensor:
    """Put the tokens of (H, T, D) states behind each other, in float32."""
    return torch.cat([left.float(), right.float()], dim=1)


def _decode_keys(codes: Tensor, tables: LayerTables, variant: Variant) -> Tensor:
    """Return keys by place before RoPE, rounded to fp16 as the kernel does."""
    heads, head_dim = codes.shape[1], variant.head_dim
    if variant.channel_levels:
        flat = torch.arange(heads * head_dim, device=codes.device).view(heads, 1, 1, head_dim)
        return tables.key_table.flatten()[(flat << variant.key_bits) + codes]
    # (H, step, column, partner, which, half) -> which, H, place
    affine = tables.key_table.permute(4, 0, 3, 1, 2, 5).reshape(2, heads, 1, 1, head_dim).double()
    return (tables.levels[0].double()[codes.long()] * affine[0] + affine[1]).half()


def _outliers(pages: Pages, side: int) -> tuple[Tensor, Tensor]:
    """Return (list, word) of every outlier of a side, padding included."""
    first, quads = pages.outlier_index.view(-1, 4)[:, 2 * side : 2 * side + 2].long().unbind(1)
    head = (quads < 0).long() * HEADER  # bit 31: in rounds, behind a header
    counts = (quads & 0x7FFFFFFF) * QUAD - head
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    within = torch.arange(len(row), device=counts.device) - (counts.cumsum(0) - counts)[row]
    return row, pages.outlier_words[first[row] * QUAD + head[row] + within]


def _by_sequence(states: Tensor, page_table: Tensor) -> Tensor:
    """(pages, H, 2, 64, D) -> (batch, H, tokens, D)."""
    picked = states[page_table.long()].transpose(1, 2)  # (B, H, blocks, 2, 64, D)
    return picked.flatten(2, 4)


def _rotate(key: Tensor, frequencies: Tensor, position: Tensor) -> Tensor:
    """Rotate keys (B, H, T, D) by place at positions that follow each sequence's first."""
    assert PAGE_TOKENS % SLAB_TOKENS == 0
    at = position[:, None].long() + torch.arange(key.shape[2], device=key.device)
    phase = (at[..., None] * frequencies).double() * (math.tau / 2**64)  # whole turns wrap away
    cos, sin = phase.cos().float()[:, None], phase.sin().float()[:, None]
    low, high = key.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
