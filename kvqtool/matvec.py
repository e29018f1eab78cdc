"""Products with packed keys or values alone, from codes, outliers or both: kernels/matvec.cu.

What attention consists of, to be looked at and timed apart; papers time these. The cache does not
call them. `score_keys_reference` and `mix_values_reference` say the same in torch, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from kvqtool.arguments import check_codes, check_tensors, expect_pages
from kvqtool.cuda import Argument, Kernel, Launcher, run_on_gpu
from kvqtool.errors import InputError
from kvqtool.fused import LayerTables, PackedContext, expect_state, expect_tables
from kvqtool.memory import PAGE_TOKENS
from kvqtool.reading import decode_pages
from kvqtool.variant import Variant

Part = Literal["codes", "outliers", "all"]
PARTS: Final[tuple[Part, ...]] = ("codes", "outliers", "all")


@dataclass(frozen=True)
class Product:
    """What a product reads, and how.

    Args:
        context: the layer's tokens; those that are stored exactly are left out.
        tables: what reading them needs; scale and cap are left out.
        variant: the attention kernel's variant.
        part: what of the states: codes alone, what outliers add alone, or both.
        blocks: blocks of a launch, one a multiprocessor.
    """

    context: PackedContext
    tables: LayerTables
    variant: Variant
    part: Part
    blocks: int = 1


def score_keys(query: Tensor, product: Product, run: Launcher = run_on_gpu) -> Tensor:
    """Multiply a query token of every sequence with its packed keys, rotated.

    Args:
        query: (batch, num_heads, head_dim) float16 or bfloat16 after RoPE, contiguous.
        product: what is read.
        run: what runs the kernel.

    Returns:
        (batch, num_heads, room for tokens) float32; zero where no token is seen.

    Raises:
        InputError: for pages of 16 bits, or a tensor that is not what it should be.
    """
    variant, context = product.variant, product.context
    wanted = len(context.state), None, variant.head_dim
    check_tensors([("query", query, variant.states, wanted)])
    scores = query.new_zeros(*query.shape[:2], _room(context), dtype=torch.float32)
    _launch("score_keys", product, query, scores, run)
    return scores


def mix_values(weights: Tensor, product: Product, run: Launcher = run_on_gpu) -> Tensor:
    """Add up packed values by weights.

    Args:
        weights: (batch, num_heads, room for tokens) float32, contiguous.
        product: what is read.
        run: what runs the kernel.

    Returns:
        (batch, num_heads, head_dim) float32, added up in any order.

    Raises:
        InputError: for pages of 16 bits, or a tensor that is not what it should be.
    """
    context = product.context
    wanted = len(context.state), None, _room(context)
    check_tensors([("weights", weights, torch.float32, wanted)])
    sums = weights.new_zeros(*weights.shape[:2], product.variant.head_dim)
    _launch("mix_values", product, weights, sums, run)
    return sums


def score_keys_reference(query: Tensor, product: Product) -> Tensor:
    """Return what `score_keys` does, in float32 by torch."""
    keys = _states(product)[0]
    grouped = query.float().view(len(query), keys.shape[1], -1, keys.shape[3])
    scores: Tensor = grouped @ keys.transpose(2, 3)
    return scores.flatten(1, 2) * _seen(product.context)


def mix_values_reference(weights: Tensor, product: Product) -> Tensor:
    """Return what `mix_values` does, in float32 by torch."""
    values = _states(product)[1]
    grouped = weights * _seen(product.context)
    sums: Tensor = grouped.view(len(weights), values.shape[1], -1, values.shape[2]) @ values
    return sums.flatten(1, 2)


def matvec_kernel(name: str, variant: Variant, part: Part) -> Kernel:
    """Return a function of kernels/matvec.cu for a variant and what it multiplies with."""
    if part not in PARTS:
        raise InputError(f"expected one of {', '.join(PARTS)}; received {part!r}")
    if part == "outliers" and not variant.outliers:
        raise InputError("expected pages with outliers: this variant has none to multiply with")
    dense, sparse = part != "outliers", part != "codes" and variant.outliers
    macros = (*variant.macros, ("DENSE", int(dense)), ("SPARSE", int(sparse)))
    return Kernel("matvec", name, macros)


def _launch(name: str, product: Product, given: Tensor, out: Tensor, run: Launcher) -> None:
    """Check what both products read, and run one of them."""
    context, tables, variant = product.context, product.tables, product.variant
    heads, batch, num_heads = context.pages.slabs.shape[1], len(context.state), given.shape[1]
    check_codes(variant)
    expected = expect_pages(context.pages, variant, heads, batch)
    check_tensors(expected, [expect_state(context.state, batch)])
    check_tensors(expect_tables(tables, variant, heads))
    if num_heads % heads:
        raise InputError(f"expected query heads in multiples of {heads}, received {num_heads}")
    arguments = [given, out, *_arguments(context, tables, num_heads // heads)]
    shape = product.blocks, 32 * variant.warps, variant.shared_bytes
    run(matvec_kernel(name, variant, product.part), shape, arguments)


def _arguments(context: PackedContext, tables: LayerTables, group_heads: int) -> list[Argument]:
    """Return the arguments of the kernels behind the first two."""
    pages = context.pages
    return [
        *(pages.slabs, pages.ranges, pages.outlier_index, pages.outlier_words, pages.page_table),
        *(context.state, tables.key_table, tables.levels, tables.angles, tables.frequencies),
        *(tables.coefficients, tables.order, len(context.state), group_heads, pages.slabs.shape[1]),
        pages.page_table.shape[1],
    ]


def _room(context: PackedContext) -> int:
    return context.pages.page_table.shape[1] * PAGE_TOKENS


def _seen(context: PackedContext) -> Tensor:
    """Return 1 where a packed token is seen, 0 elsewhere, (batch, 1, room) float32."""
    token = torch.arange(_room(context), device=context.state.device)
    seen = (token >= context.state[:, 4:5]) & (token < context.state[:, :1])
    return seen[:, None].float()


def _states(product: Product) -> tuple[Tensor, Tensor]:
    """Return the part of rotated keys and of values, (batch, num_kv_heads, room, head_dim)."""
    context, tables = product.context, product.tables
    plain = replace(product.variant, outliers=False)
    if product.part == "codes":
        return decode_pages(context, tables, plain)
    whole = decode_pages(context, tables, product.variant)
    if product.part == "all":
        return whole
    dense = decode_pages(context, tables, plain)
    return whole[0] - dense[0], whole[1] - dense[1]
