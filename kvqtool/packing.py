"""Pack a prompt's states into pages on the GPU: kernels/pack.cu and what it needs around it.

The codes, ranges and outliers are those of `codec.encode` followed by `pages.build_pages`, bit for
bit; only the order of a list's outliers differs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from kvqtool.arguments import Expected, check_tensors
from kvqtool.code_tables import PLAIN, CodeTables, expect_code
from kvqtool.codebook import send
from kvqtool.cuda import Argument, Kernel, Launcher, Macros, run_on_gpu
from kvqtool.fused import LayerTables, expect_tables
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS
from kvqtool.page_memory import QUAD, SLABS
from kvqtool.pages import Pages, list_sizes
from kvqtool.recover import Exceptions, no_exceptions
from kvqtool.variant import Variant

_WARPS: Final = 4  # of a block of `survey_values`
_WRITERS: Final = {"pack_slabs": "pack", "write_lists": "lists"}
_FLOATS: Final = ("survey_floats", "code_floats")
_ROUNDINGS: Final = ("compensate_keys", "compensate_values")


@dataclass(frozen=True)
class Packed:
    """Pages, and what gives their canonical rows back (`kvqtool/recover.py`).

    Args:
        pages: the pages.
        counts: (pages, num_kv_heads, 2 slabs, 2 sides) int32, outliers of each list.
        exceptions: of keys and of values, counted from the first token.
        known: `counts` on the host.
    """

    pages: Pages
    counts: Tensor
    exceptions: tuple[Exceptions, Exceptions]
    known: Tensor

    @property
    def quads(self) -> int:
        """Quads of words that the lists take."""
        return int(list_sizes(self.known.flatten())[1].sum())

    def split(self, pages: int, elements: int) -> tuple[Packed, Packed]:
        """Return the first pages and the others; the words stay together.

        Args:
            pages: how many of them, of all sequences.
            elements: keys in them, by which exceptions count.
        """
        parts = []
        for chosen in (slice(pages), slice(pages, None)):
            picked = {n: getattr(self.pages, n)[chosen] for n in ("slabs", "ranges")}
            index = self.pages.outlier_index[chosen]
            part = replace(self.pages, **picked, outlier_index=index)
            is_first = chosen.start is None
            key, value = (_within(e, elements, is_first=is_first) for e in self.exceptions)
            parts.append(Packed(part, self.counts[chosen], (key, value), self.known[chosen]))
        return parts[0], parts[1]


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
            bfloat16, contiguous; values float32 and rotated where `code` says that they are.
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
        [*_expect_prompt(states, turns, code, variant), *expect_code(code, variant, heads)],
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
        width = 4 if self.code.turns_values else 2  # beside a float's cut stands its channel
        cuts = torch.empty(batch, tokens, width, dtype=torch.int32, device=device)
        counts = torch.zeros(blocks * batch, heads, SLABS, 2, dtype=torch.int32, device=device)
        values = [self.states[1], table, ranges, cuts, counts]
        survey = "survey_floats" if self.code.turns_values else "survey_values"
        self._launch(survey, [*values, batch, heads, tokens, blocks, self.code.per_tail])
        slabs = counts.new_empty(blocks * batch, heads, SLABS, self.variant.slab_words)
        slabs[-batch:] = 0  # a slab past the last token is not written
        flagged = len(slabs) if self.variant.outliers else 0
        flags = counts.new_empty(flagged, heads, SLABS, 2, 32 * self.variant.steps)
        given = [*self.states, table, *self._keys, self.code.value_middles, self.tables.order]
        coded = self._compensate(table, ranges, cuts)
        written = [ranges, *coded, cuts, counts, flags, slabs]
        self._launch("pack_slabs", [*given, self.turns, *written, heads, tokens, blocks])
        known = counts.cpu()
        index, size = _lay_out(known)
        words = counts.new_zeros(size)
        index = send(index, device)
        pages = Pages(slabs, ranges, index, words, table)
        exceptions = self._write_lists(pages, given, [ranges, *coded, flags])
        return Packed(pages, counts, exceptions, known)

    def _compensate(self, table: Tensor, ranges: Tensor, cuts: Tensor) -> list[Tensor]:
        """Return codes and outliers as they are stored of the sides that are encoded ahead: those
        of keys, then those of values.
        """
        (key, value), code = self.states, self.code
        keys = [key, table, *self._keys, self.tables.order, self.turns]
        values = [value, table, ranges, cuts, code.value_middles]
        sides = (
            (keys, "compensate_keys" if code.key_rounding else None, code.key_rounding),
            (values, code.value_encoder, code.value_rounding),
        )
        written = []
        for read, name, rounding in sides:
            size = 0 if name is None else key.numel()
            coded = torch.empty(size, dtype=torch.uint8, device=key.device)
            moved = torch.empty(size, dtype=torch.float16, device=key.device)
            written += [coded, moved]
            if name is not None:
                needed = vars(rounding).values() if rounding else ()
                self._launch(name, [*read, *needed, coded, moved, *self.shape[1:]])
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
        kernel = pack_kernels(self.variant, self.code.macros)[name]
        self.run(kernel, _grid(name, self.states, self.variant), arguments)


def _exceptions(spills: Tensor, spilled: Tensor) -> tuple[Exceptions, Exceptions]:
    """Return what the kernel left beside the lists; waits for the GPU."""
    key, value = (
        _sorted(row[:count]) if count else no_exceptions(spilled.device)
        for row, count in zip(spilled, spills.tolist(), strict=True)
    )
    return key, value


def _sorted(spilled: Tensor) -> Exceptions:
    found = spilled.sort()[0]
    return Exceptions(found >> 16, found.to(torch.int16).view(torch.float16))


def _within(found: Exceptions, elements: int, *, is_first: bool) -> Exceptions:
    """Return the exceptions among the first elements, or behind them, counted from there."""
    if not len(found.place):
        return found
    kept = (found.place < elements) == is_first
    return Exceptions(found.place[kept] - (0 if is_first else elements), found.value[kept])


def _expect_prompt(
    states: tuple[Tensor, Tensor], turns: Tensor, code: CodeTables, variant: Variant
) -> list[Expected]:
    batch, heads, tokens, _ = states[0].shape
    shape = (batch, heads, tokens, variant.head_dim)
    return [
        ("keys", states[0], variant.states, shape),
        ("values", states[1], torch.float32 if code.turns_values else variant.states, shape),
        ("turns", turns, torch.float32, (batch, tokens, variant.head_dim // 2, 2)),
    ]


def _lay_out(counts: Tensor) -> tuple[Tensor, int]:
    """Return the index of lists of so many outliers, and the words they take; counts and index lie
    on the host, which is faster at little things.
    """
    _, quads, in_rounds = list_sizes(counts.flatten())
    first = quads.cumsum(0) - quads
    sizes = quads - (in_rounds.long() << 31)  # bit 31 of an int32
    index = torch.stack([first, sizes], dim=1).to(torch.int32).view(*counts.shape[:3], 4)
    return index, max(int(quads.sum()), 1) * QUAD


def _grid(name: str, states: tuple[Tensor, Tensor], variant: Variant) -> tuple[int, int, int]:
    """Return a launch's shape: a warp a token of all heads; or a block a slab, with room for its
    keys, values and what its tokens have, or for counts; or for what compensated rounding works on.
    """
    batch, heads, tokens, head_dim = states[0].shape
    each = SLAB_TOKENS * 8 * states[1].element_size()  # a token's range and cuts
    slabs, threads = batch * heads * -(-tokens // SLAB_TOKENS), 32 * variant.steps
    if name == "survey_values":
        shared = _WARPS * (2 * heads * head_dim + 4096)
        return -(-batch * tokens // _WARPS), 32 * _WARPS, shared
    if name == "survey_floats":
        return -(-batch * tokens // _WARPS), 32 * _WARPS, 4 * _WARPS * heads * head_dim
    if name == "code_floats":
        return slabs, SLAB_TOKENS, each
    if name.startswith("compensate"):
        shared = 4 * 65 * head_dim + SLAB_TOKENS * (head_dim + 4) + 4 * head_dim + each
        return slabs, SLAB_TOKENS, shared
    if name == "write_lists":
        return slabs, threads, 4 * (head_dim + variant.steps + 4)
    staged, coded = 2 * SLAB_TOKENS * (head_dim + 8) * 2, SLAB_TOKENS * 16
    return slabs, threads, staged + coded + 4 * variant.middles


def pack_kernels(variant: Variant, code: Macros = PLAIN) -> dict[str, Kernel]:
    """Return the functions that pack a prompt for a variant and `CodeTables.macros`, of
    kernels/pack.cu, compensate.cu and floats.cu.
    """
    macros = (*variant.code_macros, ("BF16", int(variant.bfloat16)), ("WARPS", _WARPS))
    is_key, is_value, is_float = (value for _, value in code)
    ahead = (("KEY_COMP", is_key), ("VALUE_COMP", is_value | is_float))
    survey = Kernel("pack", "survey_values", (*macros, *PLAIN[:2]))
    rounding = {n: Kernel("compensate", n, (*macros, code[2])) for n in _ROUNDINGS}
    floats = {name: Kernel("floats", name, macros) for name in _FLOATS}
    writers = {n: Kernel(file, n, (*macros, *ahead)) for n, file in _WRITERS.items()}
    return {"survey_values": survey} | rounding | floats | writers
