"""States of a prompt and the pages the codec makes of them, to test packing kernels against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from attention_case import codebook, sides_and_tables
from torch import Tensor

from kvqtool.appending import GrowingPages, append, new_pages
from kvqtool.code_tables import CodeTables, code_tables
from kvqtool.codebook import Codebook, as_half
from kvqtool.codec import encode
from kvqtool.compensation import BlockFisher
from kvqtool.cuda import Launcher
from kvqtool.fused import LayerTables
from kvqtool.hadamard import rotate_heads, turn
from kvqtool.packing import Packed
from kvqtool.page_memory import HEADER
from kvqtool.pages import Pages, PageSide, build_pages, list_sizes
from kvqtool.recover import count_outliers, find_exceptions
from kvqtool.rope import Rotation
from kvqtool.side import QuantSpec
from kvqtool.spec import parse_spec
from kvqtool.variant import Variant, variant_of


@dataclass(frozen=True)
class PackCase:
    """A spec and shapes; `tied` makes values of few distinct numbers, zeros of both signs too, and
    `crowded` three levels that are nearly one.
    """

    spec: str = "nuq3-1%"
    tokens: int = 130
    batch: int = 1
    num_kv_heads: int = 2
    head_dim: int = 128
    layout: str = "half"
    tied: bool = False
    bfloat16: bool = False
    crowded: bool = False


CASES = (
    *(PackCase(f"nuq{bits}-1%", tokens=70) for bits in (2, 3, 4)),
    *(PackCase(f"nuq{bits}-1%-pc", tokens=64) for bits in (2, 3, 4)),
    *(PackCase(tokens=n, num_kv_heads=1) for n in (1, 63, 65, 128, 129)),
    PackCase("int4", batch=2),
    PackCase("nuq8-1%", tokens=70),
    PackCase("int8/nuq3-1%", batch=2, tokens=66),
    PackCase("nuq4-1%-pc/nuq8-1%", bfloat16=True),
    PackCase("nuq8-1%/nuq3-1%-comp", tokens=70, head_dim=64),
    PackCase("nuq8/nuq4-1%-vrot", tokens=70),
    PackCase("nuq4-1%-postrope", batch=2),
    PackCase("nuq4-5%/nuq2-1%", batch=3, tokens=66),
    PackCase(tied=True),
    PackCase("nuq4-1%/nuq3-1%", tokens=66, crowded=True),
    PackCase(bfloat16=True, tied=True),
    PackCase(head_dim=64, num_kv_heads=3, layout="interleaved"),
    PackCase(head_dim=96, tokens=33),
    PackCase(head_dim=256, tokens=65, num_kv_heads=1),
    PackCase("nuq3-1%-pc-comp/nuq3-1%-comp", tokens=70, batch=2),
    PackCase("nuq2-5%-comp/nuq4-1%", tokens=130, layout="interleaved"),
    PackCase("nuq4-1%-postrope/nuq2-5%-qnorm-comp", bfloat16=True, tied=True),
    PackCase("nuq4-1%-qnorm-comp/nuq3-comp", head_dim=64, num_kv_heads=3, layout="interleaved"),
    PackCase("nuq3/nuq4-1%", tokens=70),
    PackCase("nuq3-pc-comp/nuq4-1%-comp", head_dim=64, tokens=70, num_kv_heads=3),
    PackCase("nuq3-comp/nuq4-comp", head_dim=96, tokens=33),
    PackCase("nuq3-1%/nuq3-1%-vrot", batch=2),
    PackCase("nuq4-1%/nuq2-5%-vrot-comp", head_dim=96, tokens=66, tied=True),
    PackCase("nuq3-1%-pc-comp/nf4-vrot", head_dim=64, num_kv_heads=3, bfloat16=True),
    PackCase("nuq2-1%-comp/nuq2-1%-comp", head_dim=256, tokens=65, num_kv_heads=1, bfloat16=True),
)


@dataclass(frozen=True)
class BuiltPack:
    """What `pack` takes, and what it must return."""

    states: tuple[Tensor, Tensor]
    turns: Tensor
    code: CodeTables
    tables: LayerTables
    variant: Variant
    expected: Packed

    @property
    def prompt(self) -> tuple[Tensor, Tensor]:
        """The states as `pack` takes them."""
        key, value = self.states
        return key, rotate_heads(value.float()) if self.code.turns_values else value


def build_pack(case: PackCase) -> BuiltPack:
    """Build a case on the CPU."""
    spec, half = parse_spec(case.spec), case.head_dim // 2
    random = torch.Generator().manual_seed(1)
    dtype = torch.bfloat16 if case.bfloat16 else torch.half
    shape = (case.batch, case.num_kv_heads, case.tokens, case.head_dim)
    key, value = (torch.randn(shape, generator=random) for _ in range(2))
    key *= torch.randn(1, case.num_kv_heads, 1, case.head_dim, generator=random).exp()
    if case.tied:
        value = value.mul(2).round() / 2 * torch.where(value < 0.2, -1.0, 1.0)
    key, value = key.to(dtype), value.to(dtype)
    inv_freq = 10_000.0 ** (-torch.arange(half) / half)
    phase = torch.arange(case.tokens)[:, None] * inv_freq
    cos, sin = phase.cos().to(dtype).float(), phase.sin().to(dtype).float()
    order = torch.arange(case.head_dim)
    if case.layout == "interleaved":
        order = torch.cat([order[0::2], order[1::2]])
    rotation = Rotation(case.layout, case.head_dim, 0, 1, "unique")
    rows = [part.permute(2, 0, 1, 3).float() for part in (key, value)]
    if spec.key.pre_rope:
        rows[0] = rotation.unrotate(rows[0], cos[:, None, None], sin[:, None, None])
    rows[1] = turn(rows[1], spec.value)
    flat = [part.reshape(case.tokens * case.batch, -1) for part in rows]
    heads = case.num_kv_heads
    books = book_of(spec.key, flat[0], heads), book_of(spec.value, flat[1], heads)
    if case.crowded:
        books = crowd(books[0]), crowd(books[1])
    encoded = encode(flat[0], books[0], spec.key), encode(flat[1], books[1], spec.value)
    sides, tables = sides_and_tables(spec, encoded, books, order, inv_freq)
    own = inv_freq if spec.key.pre_rope else None
    variant = variant_of(spec, case.head_dim, 1, own, bfloat16=case.bfloat16)
    code = code_tables(spec, books, case.num_kv_heads * case.head_dim)
    turns = torch.stack([cos, sin], dim=-1).expand(case.batch, -1, -1, -1).contiguous()
    return BuiltPack((key, value), turns, code, tables, variant, _expected(sides, case.batch))


def book_of(spec: QuantSpec, states: Tensor, heads: int) -> Codebook:
    """Return a codebook for rows (rows, channels), of heads whose channels depend on each other."""
    book = codebook(spec, states)
    if spec.moment_match:
        book = replace(book, decode_levels=as_half(book.levels * 1.1))
    return with_feedback(book, spec, heads, states.shape[1] // heads)


def crowd(book: Codebook) -> Codebook:
    """Return a codebook whose levels 3 to 5 are nearly one: a table of cells does not tell them."""
    levels = book.levels.clone()
    levels[..., 3:5] = levels[..., 5:6] - torch.tensor([0.0004, 0.0002])
    return replace(book, levels=levels, decode_levels=as_half(levels))


def with_feedback(book: Codebook, spec: QuantSpec, heads: int, width: int) -> Codebook:
    """Return a codebook that compensates rounding where its scheme does."""
    if not spec.compensated:
        return book
    random = torch.Generator().manual_seed(2)
    fisher = BlockFisher(heads, width, torch.device("cpu"))
    mixed = torch.randn(width, width, generator=random) / 8 + torch.eye(width)
    size = torch.rand(width, generator=random) * 2 + 0.1
    rows = torch.randn(300, heads, width, generator=random) @ mixed * size
    fisher.update(rows.flatten(1))
    feedback, order = fisher.feedback()
    return replace(book, feedback=feedback, order=order)


def _expected(sides: tuple[PageSide, PageSide], batch: int) -> Packed:
    """Return the pages of canonical rows and what gives the rows back, all by torch."""
    pages = build_pages(*sides, batch)
    counts = count_outliers(sides, batch)
    key, value = (find_exceptions(pages, counts, side, batch) for side in sides)
    quads = int(list_sizes(counts.flatten())[1].sum())
    return Packed(pages, counts, (key, value), counts, quads)


def same_packed(found: Packed, expected: Packed) -> None:
    """Raise unless pages are the same, but for the order within lists of outliers, and so is what
    gives their rows back.
    """
    same_pages(found.pages, expected.pages)
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.known, expected.known)
    assert found.quads == expected.quads
    for left, right in zip(found.exceptions, expected.exceptions, strict=True):
        assert torch.equal(left.place, right.place)
        assert torch.equal(left.value.view(torch.int16), right.value.view(torch.int16))


def same_pages(found: Pages, expected: Pages) -> None:
    """Raise unless pages are the same, but for the order within lists of outliers."""
    assert torch.equal(found.page_table, expected.page_table)
    assert torch.equal(found.ranges, expected.ranges)
    assert torch.equal(found.slabs, expected.slabs)
    assert torch.equal(found.outlier_index, expected.outlier_index)
    same_lists(found, expected)


def same_lists(found: Pages, expected: Pages) -> None:
    """Raise unless every list holds the same outliers, in whatever order."""
    lists = zip(lists_of(found), lists_of(expected), strict=True)
    assert all(torch.equal(left, right) for left, right in lists)


def lists_of(pages: Pages) -> Iterator[Tensor]:
    """Yield each list's outliers, without its head and its padding."""
    for first, quads in pages.outlier_index.view(-1, 2).tolist():
        begin = 4 * first + (HEADER if quads < 0 else 0)
        words = pages.outlier_words[begin : 4 * (first + (quads & 0x7FFFFFFF))]
        yield words[words != 0].sort()[0]


def append_all(built: BuiltPack, run: Launcher, room: tuple[int, int]) -> GrowingPages:
    """Append every token of a case to empty pages."""
    key, value = built.states
    batch, heads, tokens, _ = key.shape
    growing = new_pages(built.variant, batch, heads, -(-tokens // 128), room, key.device)
    state = torch.zeros(batch, 8, dtype=torch.int32, device=key.device)
    for t in range(tokens):
        state[:, 0] = t
        turns = built.turns[:, t].contiguous()
        token = key[:, :, t].contiguous(), value[:, :, t].contiguous(), turns, state
        append(token, growing, built.code, built.tables, built.variant, run)
    return growing
