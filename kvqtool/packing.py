"""Pack a prompt's states into pages on the GPU: kernels/pack.cu and what it needs around it.

The codes, ranges and outliers are those of `codec.encode` followed by `pages.build_pages`, bit for
bit; only the order of a list's outliers differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvqtool.arguments import Expected, check_tensors
from kvqtool.code_tables import NOT_COMPENSATED, CodeTables, expect_code
from kvqtool.cuda import Argument, Kernel, Launcher, Macros, run_on_gpu
from kvqtool.fused import LayerTables, expect_tables
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS
from kvqtool.page_memory import QUAD, SLABS
from kvqtool.pages import Pages, list_sizes
from kvqtool.recover import Exceptions
from kvqtool.variant import Variant

_WARPS: Final = 4  # of a block of `survey_values`
_WRITERS: Final = ("pack_slabs", "write_lists")
_ROUNDINGS: Final = ("compensate_keys", "compensate_values")


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
        values = [self.states[1], table, ranges, cuts, counts]
        self._launch("survey_values", [*values, batch, heads, tokens, blocks, self.code.per_tail])
        slabs = counts.new_empty(blocks * batch, heads, SLABS, self.variant.slab_words)
        slabs[-batch:] = 0  # a slab past the last token is not written
        flagged = len(slabs) if self.variant.outliers else 0
        flags = counts.new_empty(flagged, heads, SLABS, 2, 32 * self.variant.steps)
        given = [*self.states, table, *self._keys, self.code.value_middles, self.tables.order]
        coded = self._compensate(table, ranges, cuts)
        written = [ranges, *coded, cuts, counts, flags, slabs]
        self._launch("pack_slabs", [*given, self.turns, *written, heads, tokens, blocks])
        index, words = _lay_out(counts)
        pages = Pages(slabs, ranges, index, words, table)
        return Packed(pages, counts, self._write_lists(pages, given, [ranges, *coded, flags]))

    def _compensate(self, table: Tensor, ranges: Tensor, cuts: Tensor) -> list[Tensor]:
        """Return codes and moved outliers of the sides whose rounding is compensated: those of
        keys, then those of values.
        """
        (key, value), shape = self.states, self.shape[1:]
        read = {
            "keys": [key, table, *self._keys, self.tables.order, self.turns],
            "values": [value, table, ranges, cuts, self.code.value_middles],
        }
        written = []
        for name, rounding in zip(
            read, (self.code.key_rounding, self.code.value_rounding), strict=True
        ):
            size = 0 if rounding is None else key.numel()
            coded = torch.empty(size, dtype=torch.uint8, device=key.device)
            moved = torch.empty(size, dtype=torch.float16, device=key.device)
            written += [coded, moved]
            if rounding is not None:
                given = [*read[name], *vars(rounding).values(), coded, moved]
                self._launch(f"compensate_{name}", [*given, *shape])
        return written

    def _write_lists(
        self, pages: Pages, given: list[Tensor], coded: list[Tensor]
    ) -> tuple[Exceptions, Exceptions]:
        """Write the outliers that `flags`, last of `coded`, tells of."""
        room = len(pages.outlier_words)
        spills = pages.outlier_words.new_zeros(2)
        spilled = torch.empty(2, room, dtype=torch.int64, device=spills.device)
        if self.variant.outliers:
            read = [*given, self.turns, self.tables.levels, self.tables.key_table, *coded]
            written = [pages.outlier_index, pages.outlier_words, spills, spilled]
            self._launch("write_lists", [*read, *written, room, *self.shape])
        return _exceptions(spills, spilled)

    @property
    def _keys(self) -> list[Tensor]:
        code = self.code
        return [code.lower, code.upper, code.offset, code.inverse, code.key_middles]

    def _launch(self, name: str, arguments: list[Argument]) -> None:
        kernel = pack_kernels(self.variant, self.code.comp_macros)[name]
        self.run(kernel, _grid(name, self.states[0].shape, self.variant), arguments)


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


def _lay_out(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index, words) with room for lists of so many outliers; waits for the GPU."""
    _, quads, in_rounds = list_sizes(counts.flatten())
    first = quads.cumsum(0) - quads
    sizes = quads - (in_rounds.long() << 31)  # bit 31 of an int32
    index = torch.stack([first, sizes], dim=1).to(torch.int32).view(*counts.shape[:3], 4)
    size = max(int(quads.sum()), 1) * QUAD
    return index, torch.zeros(size, dtype=torch.int32, device=counts.device)


def _grid(name: str, shape: torch.Size, variant: Variant) -> tuple[int, int, int]:
    """Return a launch's shape: a warp a token of all heads; or a block a slab, with room for its
    keys, values and what its tokens have, or for counts; or for what compensated rounding works on.
    """
    batch, heads, tokens, head_dim = shape
    slabs, threads = batch * heads * -(-tokens // SLAB_TOKENS), 32 * variant.steps
    if name == "survey_values":
        shared = _WARPS * (2 * heads * head_dim + 4096)
        return -(-batch * tokens // _WARPS), 32 * _WARPS, shared
    if name.startswith("compensate"):
        shared = 4 * 65 * head_dim + SLAB_TOKENS * (head_dim + 4) + 4 * head_dim + SLAB_TOKENS * 16
        return slabs, SLAB_TOKENS, shared
    if name == "write_lists":
        return slabs, threads, 4 * (head_dim + variant.steps + 4)
    return slabs, threads, 2 * SLAB_TOKENS * (head_dim + 8) * 2 + SLAB_TOKENS * 16 + 4 * 32


def pack_kernels(variant: Variant, comp: Macros = NOT_COMPENSATED) -> dict[str, Kernel]:
    """Return the functions of kernels/pack.cu and kernels/compensate.cu for a variant and
    `CodeTables.comp_macros`.
    """
    macros = (*variant.code_macros, ("BF16", int(variant.bfloat16)), ("WARPS", _WARPS))
    survey = Kernel("pack", "survey_values", (*macros, *NOT_COMPENSATED))
    rounding = {name: Kernel("compensate", name, macros) for name in _ROUNDINGS}
    writers = {name: Kernel("pack", name, (*macros, *comp)) for name in _WRITERS}
    return {"survey_values": survey} | rounding | writers
