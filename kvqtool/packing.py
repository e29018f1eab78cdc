"""Pack a prompt's states into pages on the GPU: kernels/pack.cu and what it needs around it.

The codes, ranges and outliers are those of `codec.encode` followed by `pages.build_pages`, bit for
bit; only the order of a list's outliers differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.codec import channel_affine
from kvqtool.cuda import Argument, Kernel, Launcher, run_on_gpu
from kvqtool.errors import InputError
from kvqtool.fused import LayerTables, Variant
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS, outliers_per_tail
from kvqtool.page_memory import QUAD, SLABS
from kvqtool.pages import Pages, folds_levels, list_sizes
from kvqtool.side import EXACT
from kvqtool.spec import KvSpec

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
        "states that are not codes": key.method != EXACT and value.method != EXACT,
        "codes of 8 bits": max(key.bits, value.bits) <= 4,
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
    """
    key, value = states
    batch, heads, tokens, _ = key.shape
    blocks = -(-tokens // PAGE_TOKENS)
    numbers = torch.arange(blocks * batch, dtype=torch.int32, device=key.device)
    table = numbers.view(blocks, batch).T.contiguous()
    ranges = torch.zeros(blocks * batch, PAGE_TOKENS, 2, dtype=torch.float16, device=key.device)
    cuts = torch.empty(batch, tokens, 4, dtype=torch.int16, device=key.device)
    kernels, grid = pack_kernels(variant), (batch * heads * -(-tokens // SLAB_TOKENS), variant)
    shape: list[Argument] = [heads, tokens, blocks]
    keys = [code.lower, code.upper, code.offset, code.inverse, code.key_middles]
    counts = torch.zeros(blocks * batch * heads * SLABS * 2, dtype=torch.int32, device=key.device)
    run(
        kernels["survey_values"],
        (-(-batch * tokens // _WARPS), 32 * _WARPS, _WARPS * (2 * value[0, :, 0].numel() + 4096)),
        [value, table, ranges, cuts, counts, batch, *shape, code.per_tail],
    )
    if variant.outliers:
        arguments = [key, table, *keys, tables.order, turns, counts, *shape]
        run(kernels["survey_keys"], _slab_grid(*grid), arguments)
    index, words = _lay_out(counts.view(blocks * batch, heads, SLABS, 2))
    width = 2 * variant.head_dim * (variant.key_bits + variant.value_bits)
    packed = torch.zeros(blocks * batch, heads, SLABS, width, dtype=torch.int32, device=key.device)
    rest = [tables.levels, tables.key_table, ranges, cuts, index, packed, words, *shape]
    arguments = [key, value, table, *keys, code.value_middles, tables.order, turns, *rest]
    run(kernels["pack_slabs"], _slab_grid(*grid), arguments)
    return Pages(packed, ranges, index, words, table)


def _lay_out(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index, words) with room for lists of so many outliers; waits for the GPU."""
    _, quads, is_sorted = list_sizes(counts.flatten())
    first = quads.cumsum(0) - quads
    sizes = quads - (is_sorted.long() << 31)  # bit 31 of an int32
    index = torch.stack([first, sizes], dim=1).to(torch.int32).view(*counts.shape[:3], 4)
    size = max(int(quads.sum()), 1) * QUAD
    return index, torch.zeros(size, dtype=torch.int32, device=counts.device)


def _slab_grid(blocks: int, variant: Variant) -> tuple[int, int, int]:
    """Return the shape of a launch with a block a slab: room for its keys, values and counts."""
    staged = SLAB_TOKENS * (variant.head_dim + 8) * 2
    return blocks, 32 * variant.steps, 2 * staged + 4 * (64 + variant.steps)


def pack_kernels(variant: Variant) -> dict[str, Kernel]:
    """Return the functions of kernels/pack.cu for a variant."""
    wanted = ("HEAD_DIM", "KEY_BITS", "VALUE_BITS", "CHANNEL_LEVELS", "ROTATED", "OUTLIERS", "BF16")
    macros = (*((k, v) for k, v in variant.macros if k in wanted), ("WARPS", _WARPS))
    names = ("survey_values", "survey_keys", "pack_slabs")
    return {name: Kernel("pack", name, macros) for name in names}
