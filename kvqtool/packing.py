"""Pack a prompt's states into pages on the GPU: kernels/pack.cu and what it needs around it.

The codes, ranges and outliers are those of `codec.encode` followed by `pages.build_pages`, bit for
bit; only the order of a list's outliers differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvqtool.arguments import Expected, check_tensors
from kvqtool.code_tables import CodeTables, Rounding, expect_code
from kvqtool.cuda import Argument, Kernel, Launcher, run_on_gpu
from kvqtool.fused import LayerTables, expect_tables
from kvqtool.memory import PAGE_TOKENS
from kvqtool.packing_kernels import launch_shape, pack_kernels
from kvqtool.page_memory import QUAD, SLABS
from kvqtool.pages import Pages, list_sizes
from kvqtool.recover import Exceptions, no_exceptions
from kvqtool.variant import Variant


@dataclass(frozen=True)
class Packed:
    """Pages, and what gives their canonical rows back (`kvqtool/recover.py`).

    Args:
        pages: the pages.
        counts: (pages, num_kv_heads, 2 slabs, 2 sides) int32, outliers of each list.
        exceptions: of keys and of values, counted from the first token.
        known: `counts` on the host.
        quads: of words, that the lists take.
    """

    pages: Pages
    counts: Tensor
    exceptions: tuple[Exceptions, Exceptions]
    known: Tensor
    quads: int

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
            known = self.known[chosen]
            quads = int(list_sizes(known.flatten())[1].sum())
            parts.append(Packed(part, self.counts[chosen], (key, value), known, quads))
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
    heads, expected = states[0].shape[1], _expect_prompt(states, turns, code, variant)
    also = expect_code(code, variant, heads)
    check_tensors(expected)
    prompt = _Prompt(states, turns, code, tables, variant, run)
    survey = prompt.survey()
    # While the GPU looks at the values:
    check_tensors(expected[:1], also, expect_tables(tables, variant, heads))
    return prompt.packed(survey)


@dataclass(frozen=True)
class _Survey:
    """What the first kernel writes: ranges (pages, 128) int32, counts and flags, and cuts where
    values are encoded before `pack_values`.
    """

    ranges: Tensor
    numbers: _Numbers
    cuts: Tensor | None


@dataclass(frozen=True)
class _Prompt:
    """The arguments of `pack`, and the kernels' launches."""

    states: tuple[Tensor, Tensor]
    turns: Tensor
    code: CodeTables
    tables: LayerTables
    variant: Variant
    run: Launcher

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, KV heads, tokens, pages of a sequence."""
        batch, heads, tokens, _ = self.states[0].shape
        return batch, heads, tokens, -(-tokens // PAGE_TOKENS)

    @property
    def _marked(self) -> int:
        """Words of flags of a side: a bit an element of every page."""
        batch, heads, _, blocks = self.shape
        words = blocks * batch * heads * SLABS * 32 * self.variant.steps
        return words if self.variant.outliers else 0

    def survey(self) -> _Survey:
        """Find tokens' ranges and which of their values are outliers."""
        batch, heads, tokens, blocks = self.shape
        value, count = self.states[1], blocks * batch
        is_encoded = self.code.value_encoder is not None
        numbers = _Numbers(count, heads, 0 if is_encoded else self._marked, value.device)
        ranges = numbers.counts.new_empty(count, PAGE_TOKENS)
        if tokens % PAGE_TOKENS:  # what lies past the last token is not written
            ranges[-batch:] = 0
        width = 4 if self.code.turns_values else 2  # beside a float's cut stands its channel
        cuts = ranges.new_empty(batch, tokens, width) if is_encoded else None
        written: list[Argument] = [value, ranges, ranges if cuts is None else cuts, numbers.counts]
        shape: list[Argument] = [batch, heads, tokens, self.code.per_tail]
        if self.code.turns_values:
            self._launch("survey_floats", [*written, *shape])
        else:
            self._launch("survey_values", [*written, numbers.flags, *shape, int(cuts is None)])
        return _Survey(ranges, numbers, cuts)

    def packed(self, survey: _Survey) -> Packed:
        """Encode what was surveyed."""
        batch, heads, tokens, blocks = self.shape
        count, numbers, ranges, cuts = blocks * batch, survey.numbers, survey.ranges, survey.cuts
        table = torch.arange(count, dtype=torch.int32, device=ranges.device)  # as the survey counts
        table = table.view(blocks, batch).T.contiguous()
        slabs = table.new_empty(count, heads, SLABS, self.variant.slab_words)
        if tokens % PAGE_TOKENS:
            slabs[-batch:] = 0
        key_flags = table.new_empty(self._marked)
        value_flags = numbers.flags if cuts is None else table.new_empty(self._marked)
        index = table.new_empty(count, heads, SLABS, 4)
        key_coded = self._key_codes(table)
        shape: list[Argument] = [heads, tokens, blocks]
        keys = [self.states[0], table, *self._keys, self.tables.order, self.turns, *key_coded]
        self._launch("pack_keys", [*keys, numbers.counts, key_flags, slabs, *shape])
        self._launch("lay_out", [numbers.counts, index, numbers.quads, count * heads * SLABS])
        numbers.send()
        value_coded = self._value_codes(table, ranges, ranges if cuts is None else cuts)
        values = [self.states[1], table, self.code.value_middles, ranges, *value_coded]
        self._launch("pack_values", [*values, value_flags, slabs, *shape])
        halves = ranges.view(torch.float16).view(count, PAGE_TOKENS, 2)
        read = [*self.states, table, *self._keys, self.code.value_middles, self.tables.order]
        read += [self.turns, self.tables.levels, self.tables.key_table, ranges]
        read += [*key_coded, *value_coded, key_flags, value_flags, index]
        quads = numbers.receive()
        # Every list is written to its end.
        words = table.new_empty(quads * QUAD) if quads else table.new_zeros(QUAD)
        spilled = self._write_lists(read, words, numbers.spills)
        pages = Pages(slabs, halves, index, words, table)
        counts, known = numbers.counts.clone(), numbers.known  # without the flags beside them
        return Packed(pages, counts, _exceptions(numbers.spills, spilled), known, quads)

    def _key_codes(self, table: Tensor) -> list[Tensor]:
        """Return codes and outliers as they are stored of keys that are encoded ahead."""
        rounding = self.code.key_rounding
        read = [self.states[0], table, *self._keys, self.tables.order, self.turns]
        return self._encode("compensate_keys" if rounding else None, read, rounding)

    def _value_codes(self, table: Tensor, ranges: Tensor, cuts: Tensor) -> list[Tensor]:
        """Likewise of values."""
        read = [self.states[1], table, ranges, cuts, self.code.value_middles]
        return self._encode(self.code.value_encoder, read, self.code.value_rounding)

    def _encode(
        self, name: str | None, read: Sequence[Argument], rounding: Rounding | None
    ) -> list[Tensor]:
        states = self.states[0]
        size = 0 if name is None else states.numel()
        coded = torch.empty(size, dtype=torch.uint8, device=states.device)
        moved = torch.empty(size, dtype=torch.float16, device=states.device)
        if name is not None:
            needed = vars(rounding).values() if rounding else ()
            self._launch(name, [*read, *needed, coded, moved, *self.shape[1:]])
        return [coded, moved]

    def _write_lists(self, read: list[Tensor], words: Tensor, spills: Tensor) -> Tensor:
        """Write the outliers that flags among what is `read` tell of; return what is spilled."""
        room = words.numel()
        spilled = torch.empty(2, room, dtype=torch.int64, device=spills.device)
        if self.variant.outliers:
            self._launch("write_lists", [*read, words, spills, spilled, room, *self.shape])
        return spilled

    @cached_property
    def _keys(self) -> list[Tensor]:
        code = self.code
        return [code.lower, code.upper, code.offset, code.inverse, code.key_middles]

    def _launch(self, name: str, arguments: Sequence[Argument]) -> None:
        self.run(self._kernels[name], launch_shape(name, self.states, self.variant), arguments)

    @cached_property
    def _kernels(self) -> dict[str, Kernel]:
        return pack_kernels(self.variant, self.code.macros)


class _Numbers:
    """What kernels count, in one tensor of zeros: outliers of each list, quads of words, how many
    outliers of either side are spilled; and flags of values, which are marked.
    """

    def __init__(self, pages: int, heads: int, marked: int, device: torch.device) -> None:
        size = pages * heads * SLABS * 2
        zeros = torch.zeros(size + 4 + marked, dtype=torch.int32, device=device)
        self._all, self.flags = zeros[: size + 4], zeros[size + 4 :]
        self.counts = zeros[:size].view(pages, heads, SLABS, 2)
        self.quads, self.spills = zeros[size : size + 1], zeros[size + 1 : size + 3]

    def send(self) -> None:
        """Begin to copy them to the host."""
        self._known = self._all.to("cpu", non_blocking=True)
        device = self._all.device
        is_gpu = device.type == "cuda"
        self._sent = torch.cuda.current_stream(device).record_event() if is_gpu else None

    def receive(self) -> int:
        """Return the quads, as they were when sent; waits for what was sent only."""
        if self._sent is not None:
            self._sent.synchronize()
        return int(self._known[self.counts.numel()])

    @property
    def known(self) -> Tensor:
        """Counts on the host, once received."""
        return self._known[: self.counts.numel()].view(self.counts.shape)


def _exceptions(spills: Tensor, spilled: Tensor) -> tuple[Exceptions, Exceptions]:
    """Return what the kernel left beside the lists; waits for the GPU."""
    none = no_exceptions(spilled.device)
    counts = spills.tolist()
    if not any(counts):
        return none, none
    found = zip(spilled, counts, strict=True)
    key, value = (_sorted(row[:count]) if count else none for row, count in found)
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
