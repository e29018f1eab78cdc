"""Pack a prompt's states into pages on the GPU: kernels/pack.cu and what it needs around it.

The codes, ranges and outliers are those of `codec.encode` followed by `pages.build_pages`, bit for
bit; only the order of a list's outliers differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvqtool.arguments import Expected, check_codes, check_tensors
from kvqtool.codebook import Codebook
from kvqtool.codec import channel_affine
from kvqtool.cuda import Argument, Kernel, Launcher, run_on_gpu
from kvqtool.errors import InputError
from kvqtool.fused import LayerTables, expect_tables
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS, outliers_per_tail
from kvqtool.page_memory import QUAD, SLABS
from kvqtool.pages import Pages, folds_levels, list_sizes
from kvqtool.side import EXACT, GROUPED, ROTATING
from kvqtool.spec import KvSpec
from kvqtool.variant import Variant

_WARPS = 4  # of a block of `survey_values`


@dataclass(frozen=True)
class CodeTables:
    """What finding a layer's codes needs, float32, in the order of the layer's channels.

    Args:
        lower: (C,) least key that is no outlier.
        upper: (C,) greatest.
        offset: (C,) middle of a key channel's range.
        inverse: (C,) one over half its range, 0 where it has none.
        key_middles: (L - 1,) between neighbouring levels, or (C, L - 1).
        value_middles: (L - 1,).
        per_tail: outliers of a value token at either end.
    """

    lower: Tensor
    upper: Tensor
    offset: Tensor
    inverse: Tensor
    key_middles: Tensor
    value_middles: Tensor
    per_tail: int


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
    assert key.lower is not None and key.upper is not None
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    middles = [(b.levels[..., 1:] + b.levels[..., :-1]) * 0.5 for b in books]
    if folds_levels(spec.key):
        middles[0] = middles[0].expand(len(offset), -1)
    tail = outliers_per_tail(spec.value, value_channels) if spec.value.outlier_fraction else 0
    return CodeTables(
        key.lower, key.upper, offset, inverse, middles[0].contiguous(), middles[1], tail
    )


def unsupported(spec: KvSpec) -> str | None:
    """Return what of a scheme the packing kernels do not know, or None."""
    key, value = spec.key, spec.value
    known = {
        f"{key.method} codes": key.method not in (GROUPED, *ROTATING),
        f"{value.method} codes": value.method not in (GROUPED, *ROTATING),
        "states that are not codes": key.method != EXACT and value.method != EXACT,
        "codes of 8 bits": max(key.bits, value.bits) <= 4,
        "bits by token": spec.adaptive is None,
        "keys with a range per token": key.per_channel,
        "ranges per group of channels": value.group_size is None,
        "a cap on key outliers": key.outlier_cap is None,
        "compensated rounding": not (key.compensated or value.compensated),
        "rotated values": not value.rotated,
    }
    return next((name for name, holds in known.items() if not holds), None)


def pack(
    states: tuple[Tensor, Tensor],
    turns: Tensor,
    code: CodeTables,
    tables: LayerTables,
    variant: Variant,
    run: Launcher = run_on_gpu,
) -> Pages:
    """Pack the tokens of a prompt.

    Args:
        states: keys after RoPE and values, (batch, num_kv_heads, tokens, head_dim) float16 or
            bfloat16, contiguous.
        turns: (tokens, head_dim / 2, 2) float32, the model's cosine and sine by place.
        code: `code_tables`.
        tables: the layer's tables.
        variant: the attention kernel's variant.
        run: what runs the kernels.

    Returns:
        Pages; a page's room past the last token is zero.

    Raises:
        InputError: when the variant cannot hold the codes, or a tensor is not what it should be.
    """
    (key, value), (batch, heads, tokens, _) = states, states[0].shape
    check_tensors(
        [*_expect_prompt(states, turns, variant), *expect_code(code, variant, heads)],
        expect_tables(tables, variant, heads),
    )
    blocks, device = -(-tokens // PAGE_TOKENS), key.device
    table = torch.arange(blocks * batch, dtype=torch.int32, device=device)
    table = table.view(blocks, batch).T.contiguous()
    ranges = torch.zeros(blocks * batch, PAGE_TOKENS, 2, dtype=torch.float16, device=device)
    cuts = torch.empty(batch, tokens, 2, dtype=torch.int32, device=device)
    flags = torch.empty(0, dtype=torch.int32, device=device)
    counts = torch.zeros(blocks * batch, heads, SLABS, 2, dtype=torch.int32, device=device)
    kernels, grids = pack_kernels(variant), _grids(key.shape, variant)
    shape: list[Argument] = [heads, tokens, blocks]
    keys = [code.lower, code.upper, code.offset, code.inverse, code.key_middles]
    rest: list[Argument] = [ranges, cuts, counts, batch, *shape, code.per_tail]
    run(kernels["survey_values"], grids["survey_values"], [value, table, *rest])
    packed = counts.new_empty(blocks * batch, heads, SLABS, variant.slab_words)
    packed[-batch:] = 0  # a slab past the last token is not written
    if variant.outliers:
        flags = counts.new_empty(blocks * batch, heads, SLABS, 2, 32 * variant.steps)
    given = [key, value, table, *keys, code.value_middles, tables.order, turns]
    rest = [ranges, cuts, counts, flags, packed, *shape]
    run(kernels["pack_slabs"], grids["pack_slabs"], [*given, *rest])
    index, words = _lay_out(counts)
    if variant.outliers:
        rest = [tables.levels, tables.key_table, ranges, flags, index, words, *shape]
        run(kernels["write_lists"], grids["write_lists"], [*given, *rest])
    return Pages(packed, ranges, index, words, table)


def _expect_prompt(
    states: tuple[Tensor, Tensor], turns: Tensor, variant: Variant
) -> list[Expected]:
    batch, heads, tokens, _ = states[0].shape
    shape = (batch, heads, tokens, variant.head_dim)
    return [
        ("keys", states[0], variant.states, shape),
        ("values", states[1], variant.states, shape),
        ("turns", turns, torch.float32, (tokens, variant.head_dim // 2, 2)),
    ]


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
    return [
        ("lower", code.lower, real, channels),
        ("upper", code.upper, real, channels),
        ("offset", code.offset, real, channels),
        ("inverse", code.inverse, real, channels),
        ("key_middles", code.key_middles, real, rows + middles[0]),
        ("value_middles", code.value_middles, real, middles[1]),
    ]


def _lay_out(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index, words) with room for lists of so many outliers; waits for the GPU."""
    _, quads, in_rounds = list_sizes(counts.flatten())
    first = quads.cumsum(0) - quads
    sizes = quads - (in_rounds.long() << 31)  # bit 31 of an int32
    index = torch.stack([first, sizes], dim=1).to(torch.int32).view(*counts.shape[:3], 4)
    size = max(int(quads.sum()), 1) * QUAD
    return index, torch.zeros(size, dtype=torch.int32, device=counts.device)


def _grids(shape: torch.Size, variant: Variant) -> dict[str, tuple[int, int, int]]:
    """Return launch shapes: a warp a token of all heads; a block a slab, with room for its keys,
    values and what its tokens have; a block a slab, with room for counts.
    """
    batch, heads, tokens, head_dim = shape
    rows = 2 * SLAB_TOKENS * (head_dim + 8) * 2 + SLAB_TOKENS * 16  # states, what a token has
    slabs = batch * heads * -(-tokens // SLAB_TOKENS)
    values = -(-batch * tokens // _WARPS), 32 * _WARPS, _WARPS * (2 * heads * head_dim + 4096)
    return {
        "survey_values": values,
        "pack_slabs": (slabs, 32 * variant.steps, rows + 4 * 32),
        "write_lists": (slabs, 32 * variant.steps, 4 * (head_dim + variant.steps + 4)),
    }


def pack_kernels(variant: Variant) -> dict[str, Kernel]:
    """Return the functions of kernels/pack.cu for a variant."""
    macros = (*variant.code_macros, ("BF16", int(variant.bfloat16)), ("WARPS", _WARPS))
    names = ("survey_values", "pack_slabs", "write_lists")
    return {name: Kernel("pack", name, macros) for name in names}
