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
from kvqtool.recover import Exceptions
from kvqtool.side import EXACT, GROUPED, ROTATING
from kvqtool.spec import KvSpec
from kvqtool.variant import Variant

_WARPS = 4  # of a block of `survey_values`


@dataclass(frozen=True)
class Packed:
    """Pages, and what gives their canonical rows back (`kvqtool/recover.py`).

    Args:
        pages: the pages.
        counts: (pages, num_kv_heads, 2 slabs, 2 sides) int32, outliers of each list.
        exceptions: of keys and of values, counted from the first token.
    """

    pages: Pages
    counts: Tensor
    exceptions: tuple[Exceptions, Exceptions]


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
) -> Packed:
    """Pack the tokens of a prompt; waits for the GPU, to learn how long its lists are.

    Args:
        states: keys after RoPE and values, (batch, num_kv_heads, tokens, head_dim) float16 or
            bfloat16, contiguous.
        turns: (batch, tokens, head_dim / 2, 2) float32, the model's cosine and sine by place.
        code: `code_tables`.
        tables: the layer's tables.
        variant: the attention kernel's variant.
        run: what runs the kernels.

    Returns:
        The pages; a page's room past the last token is zero.

    Raises:
        InputError: when the variant cannot hold the codes, or a tensor is not what it should be.
    """
    heads = states[0].shape[1]
    check_tensors(
        [*_expect_prompt(states, turns, variant), *expect_code(code, variant, heads)],
        expect_tables(tables, variant, heads),
    )
    return _Prompt(states, turns, code, tables, variant, run).packed()


@dataclass(frozen=True)
class _Prompt:
    """The arguments of `pack`, and the kernels' launches."""

    states: tuple[Tensor, Tensor]
    turns: Tensor
    code: CodeTables
    tables: LayerTables
    variant: Variant
    run: Launcher

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, KV heads, tokens, pages of a sequence."""
        batch, heads, tokens, _ = self.states[0].shape
        return batch, heads, tokens, -(-tokens // PAGE_TOKENS)

    def packed(self) -> Packed:
        batch, heads, tokens, blocks = self.shape
        device = self.states[0].device
        table = torch.arange(blocks * batch, dtype=torch.int32, device=device)
        table = table.view(blocks, batch).T.contiguous()
        ranges = torch.zeros(blocks * batch, PAGE_TOKENS, 2, dtype=torch.float16, device=device)
        cuts = torch.empty(batch, tokens, 2, dtype=torch.int32, device=device)
        counts = torch.zeros(blocks * batch, heads, SLABS, 2, dtype=torch.int32, device=device)
        self._survey(table, ranges, cuts, counts)
        index, words = _lay_out(counts)
        slabs = counts.new_zeros(blocks * batch, heads, SLABS, self.variant.slab_words)
        pages = Pages(slabs, ranges, index, words, table)
        return Packed(pages, counts, self._write(pages, cuts))

    def _survey(self, table: Tensor, ranges: Tensor, cuts: Tensor, counts: Tensor) -> None:
        """Find each token's range of values and count outliers."""
        (key, value), (batch, *shape) = self.states, self.shape
        found: list[Argument] = [ranges, cuts, counts, batch, *shape, self.code.per_tail]
        self._launch("survey_values", [value, table, *found])
        if self.variant.outliers:
            found = [self.tables.order, self.turns, counts, *shape]
            self._launch("survey_keys", [key, table, *self._keys, *found])

    def _write(self, pages: Pages, cuts: Tensor) -> tuple[Exceptions, Exceptions]:
        """Write codes and lists of outliers."""
        tables, room = self.tables, len(pages.outlier_words)
        spills = cuts.new_zeros(2)
        spilled = torch.empty(2, room, dtype=torch.int64, device=cuts.device)
        given = [*self.states, pages.page_table, *self._keys, self.code.value_middles, tables.order]
        read = [self.turns, tables.levels, tables.key_table, pages.ranges, cuts]
        written = [pages.outlier_index, pages.slabs, pages.outlier_words, spills, spilled]
        self._launch("pack_slabs", [*given, *read, *written, room, *self.shape])
        return _exceptions(spills, spilled)

    @property
    def _keys(self) -> list[Tensor]:
        code = self.code
        return [code.lower, code.upper, code.offset, code.inverse, code.key_middles]

    def _launch(self, name: str, arguments: list[Argument]) -> None:
        grids = _grids(self.states[0].shape, self.variant)
        shape = grids["survey_values" if name == "survey_values" else "slabs"]
        self.run(pack_kernels(self.variant)[name], shape, arguments)


def _exceptions(spills: Tensor, spilled: Tensor) -> tuple[Exceptions, Exceptions]:
    """Return what the kernel left beside the lists; waits for the GPU."""
    ordered = [row[:count].sort()[0] for row, count in zip(spilled, spills.tolist(), strict=True)]
    key, value = (
        Exceptions(found >> 16, found.to(torch.int16).view(torch.float16)) for found in ordered
    )
    return key, value


def _expect_prompt(
    states: tuple[Tensor, Tensor], turns: Tensor, variant: Variant
) -> list[Expected]:
    batch, heads, tokens, _ = states[0].shape
    shape = (batch, heads, tokens, variant.head_dim)
    return [
        ("keys", states[0], variant.states, shape),
        ("values", states[1], variant.states, shape),
        ("turns", turns, torch.float32, (batch, tokens, variant.head_dim // 2, 2)),
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
    _, quads, is_sorted = list_sizes(counts.flatten())
    first = quads.cumsum(0) - quads
    sizes = quads - (is_sorted.long() << 31)  # bit 31 of an int32
    index = torch.stack([first, sizes], dim=1).to(torch.int32).view(*counts.shape[:3], 4)
    size = max(int(quads.sum()), 1) * QUAD
    return index, torch.zeros(size, dtype=torch.int32, device=counts.device)


def _grids(shape: torch.Size, variant: Variant) -> dict[str, tuple[int, int, int]]:
    """Return launch shapes: a warp a token of all heads; a block a slab, with room for its keys,
    values and counts.
    """
    batch, heads, tokens, head_dim = shape
    rows = 2 * SLAB_TOKENS * (head_dim + 8) * 2 + SLAB_TOKENS * 16  # states, what a token has
    slabs = batch * heads * -(-tokens // SLAB_TOKENS)
    values = -(-batch * tokens // _WARPS), 32 * _WARPS, _WARPS * (2 * heads * head_dim + 4096)
    return {
        "survey_values": values,
        "slabs": (slabs, 32 * variant.steps, rows + 4 * (64 + variant.steps)),
    }


def pack_kernels(variant: Variant) -> dict[str, Kernel]:
    """Return the functions of kernels/pack.cu for a variant."""
    macros = (*variant.code_macros, ("BF16", int(variant.bfloat16)), ("WARPS", _WARPS))
    names = ("survey_values", "survey_keys", "pack_slabs")
    return {name: Kernel("pack", name, macros) for name in names}
