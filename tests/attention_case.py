"""A small packed context with its exact answer in float64, to test fused attention against."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from moved import moved
from torch import Tensor

from kvqtool.codebook import Codebook, as_half, normalfloat_levels, round_range
from kvqtool.codec import channel_affine, decode, encode
from kvqtool.fused import ExactTokens, LayerTables, PackedContext
from kvqtool.pages import PageSide, build_pages, key_table, level_table
from kvqtool.side import QuantSpec
from kvqtool.spec import KvSpec, parse_spec
from kvqtool.turning import angle_table, coefficient_table, frequency_table
from kvqtool.variant import Variant, groups_of, variant_of


@dataclass(frozen=True)
class Case:
    """What to build: a spec and shapes; `lengths` are each sequence's packed tokens."""

    spec: str = "nuq4-1%"
    lengths: tuple[int, ...] = (130,)
    num_kv_heads: int = 2
    group: int = 1
    head_dim: int = 128
    sinks: int = 0
    window: int = 0
    position: int = 0
    softcap: float | None = None
    first_seen: int = 0
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = False
    theta: float = 10_000.0


@dataclass(frozen=True)
class Built:
    """A query, the packed context, the tables, the variant, and the right answers in float64: the
    output, and the log of the sum of exp(score), (batch, num_heads).
    """

    query: Tensor
    context: PackedContext
    tables: LayerTables
    variant: Variant
    expected: Tensor
    log_sums: Tensor
    greatest_value: float


def build(case: Case) -> Built:
    """Build a case from random states with strong channels, as keys have."""
    spec, half = parse_spec(case.spec), case.head_dim // 2
    random = torch.Generator().manual_seed(case.seed)
    batch, tokens = len(case.lengths), max(case.lengths)
    channels = case.num_kv_heads * case.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    strength = normal(channels).exp() * 0.5
    keys = (normal(tokens * batch, channels) * strength + normal(channels)).half().float()
    values = (normal(tokens * batch, channels) * normal(channels).exp() * 0.3).half().float()
    books = codebook(spec.key, keys), codebook(spec.value, values)
    rows = encode(keys, books[0], spec.key), encode(values, books[1], spec.value)
    shape = (tokens, batch, case.num_kv_heads, case.head_dim)
    key, value = (
        decode(part, book, side, channels).double().view(shape).permute(1, 2, 0, 3)
        for part, book, side in zip(rows, books, (spec.key, spec.value), strict=True)
    )
    inv_freq = radians(case.head_dim, case.theta)
    if spec.key.pre_rope:
        phase = (case.position + torch.arange(tokens, dtype=torch.float64))[:, None] * inv_freq
        cos, sin = phase.cos(), phase.sin()
        low, high = key[..., :half], key[..., half:]
        key = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    num_heads, dtype = (
        case.num_kv_heads * case.group,
        torch.bfloat16 if case.bfloat16 else torch.half,
    )
    query = (normal(batch, num_heads, case.head_dim) * 2).to(dtype)

    def exact(count: int) -> tuple[Tensor, Tensor]:
        wide = (batch, case.num_kv_heads, max(count, 1), case.head_dim)
        return (normal(*wide)).to(dtype), (normal(*wide) * 0.3).to(dtype)

    sinks, window = exact(case.sinks), exact(case.window)
    sides, tables = sides_and_tables(spec, rows, books, torch.arange(case.head_dim), inv_freq)
    tables = replace(tables, scale=case.head_dim**-0.5, softcap=case.softcap)
    state = torch.zeros(batch, 8, dtype=torch.int32)
    state[:, 0] = torch.tensor(case.lengths)
    state[:, 1], state[:, 2] = case.sinks, case.window
    state[:, 3], state[:, 4] = case.position, case.first_seen
    variant = variant_of_case(case)
    parts = []
    for b, length in enumerate(case.lengths):
        ks = [sinks[0][b, :, : case.sinks].double(), key[b, :, case.first_seen : length]]
        vs = [sinks[1][b, :, : case.sinks].double(), value[b, :, case.first_seen : length]]
        ks.append(window[0][b, :, : case.window].double())
        vs.append(window[1][b, :, : case.window].double())
        parts.append(_attention(query[b], torch.cat(ks, 1), torch.cat(vs, 1), case))
    context = PackedContext(build_pages(*sides, batch), ExactTokens(*sinks, *window), state)
    expected, log_sums = (torch.stack(part) for part in zip(*parts, strict=True))
    greatest = float(value.abs().max())
    return Built(query, context, tables, variant, expected, log_sums, greatest)


def variant_of_case(case: Case) -> Variant:
    """Return the kernel a case is for."""
    group = groups_of(case.num_kv_heads * case.group, case.num_kv_heads)
    softcap = case.softcap is not None
    spec = parse_spec(case.spec)
    inv_freq = radians(case.head_dim, case.theta) if spec.key.pre_rope else None
    return variant_of(spec, case.head_dim, group, inv_freq, softcap=softcap, bfloat16=case.bfloat16)


def radians(head_dim: int, theta: float = 10_000.0) -> Tensor:
    """Return a rotation's radians a token, (head_dim / 2,) float64."""
    half = head_dim // 2
    return theta ** (-torch.arange(half, dtype=torch.float64) / half)


def sides_and_tables(
    spec: KvSpec,
    rows: tuple[dict[str, Tensor], dict[str, Tensor]],
    books: tuple[Codebook, Codebook],
    order: Tensor,
    inv_freq: Tensor,
) -> tuple[tuple[PageSide, PageSide], LayerTables]:
    """Return what builds pages of canonical rows, and the tables, of scale 1, that read them."""
    heads = len(channel_affine(books[0])[0]) // len(order)
    sides = (
        PageSide(rows[0], books[0], spec.key, heads, len(order), order),
        PageSide(rows[1], books[1], spec.value, heads, len(order), None),
    )
    tables = LayerTables(
        key_table(books[0], spec.key, order, heads),
        level_table(*sides),
        angle_table(inv_freq),
        frequency_table(inv_freq),
        coefficient_table(inv_freq),
        order.to(torch.int16),
        1.0,
    )
    return sides, tables


def _attention(query: Tensor, key: Tensor, value: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    grouped = query.double().view(case.num_kv_heads, case.group, case.head_dim)
    score = grouped @ key.transpose(1, 2) / math.sqrt(case.head_dim)
    if case.softcap is not None:
        score = case.softcap * (score / case.softcap).tanh()
    return (score.softmax(-1) @ value).view(-1, case.head_dim), score.logsumexp(-1).flatten()


def codebook(spec: QuantSpec, states: Tensor) -> Codebook:
    """Return an uneven codebook with ranges that a few states leave, those of the spec's share."""
    levels = normalfloat_levels(spec.bits) * 0.9
    if spec.channel_levels:
        levels = levels * torch.linspace(0.8, 1.0, states.shape[1])[:, None]
    levels = as_half(levels)
    if not spec.per_channel:
        return Codebook(levels, levels)
    tail = (spec.outlier_fraction or 0.01) / 2
    low, high = states.quantile(tail, dim=0), states.quantile(1 - tail, dim=0)
    return Codebook(levels, levels, *round_range(low, high))


def log_tolerance(built: Built) -> float:
    """Return how far the log of a sum of exp(score) may be off: as far as a score at most. Its
    products are of a query and a turned key, each rounded to fp16, so 2 * 2**-11 of the greatest
    score; 5e-3 where that is less, for products that cancel.
    """
    return max(5e-3, 2 * 2**-11 * float(built.log_sums.abs().max()))


def on_device(built: Built, device: str) -> Built:
    """Return the case with its inputs on a device; the answer stays where it is."""
    return replace(moved(built, device), expected=built.expected, log_sums=built.log_sums)


# Every width, codebook, head size, group and kind of token, at lengths around every boundary.
CASES = (
    *(Case(lengths=(n,), num_kv_heads=1) for n in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129)),
    *(Case(f"nuq{bits}-1%", (100, 257)) for bits in (2, 3, 4)),
    *(Case(f"nuq{bits}-1%-pc", (70,)) for bits in (2, 3, 4)),
    *(Case(f"nuq{bits}", (200,)) for bits in (2, 3, 4)),
    *(Case(spec, (130,), group=2) for spec in ("nuq8-1%", "nuq8-1%/nuq2-1%", "nuq3-1%/nuq8")),
    Case("nuq4-1%-pc/int8", (70,), num_kv_heads=1),
    Case("int8", (65,), num_kv_heads=1, head_dim=256, group=8),
    *(Case("nuq3-1%", (65, 129), group=group) for group in (2, 3, 4, 8)),
    Case("nuq4-1%", (64,), num_kv_heads=1, group=16),
    *(Case("nuq3-1%", (80,), num_kv_heads=1, head_dim=d) for d in (64, 96, 256)),
    Case("nuq4-1%-pc", (80,), num_kv_heads=1, head_dim=64, group=4),
    Case("nuq4-1%/nuq2-1%", (140,), group=2),
    Case("int4", (64,)),
    Case("nf3-1%", (64,)),
    Case("nuq4-1%-postrope", (200,)),
    Case("nuq4-1%", (300,), first_seen=70),
    Case("nuq4-1%", (130,), sinks=1, window=65, group=4),
    Case("nuq4-1%", (130,), sinks=5, bfloat16=True),
    Case("nuq3-1%", (130,), softcap=20.0),
    Case("nuq3-1%", (130,), position=2**20 + 5),
    Case("nuq4-30%", (128,), num_kv_heads=1),
)
# Real lengths, for a GPU.
LONG = (
    Case("nuq4-1%", (4096, 1000), num_kv_heads=8, group=4, sinks=1),
    Case("nuq3-1%", (9000,), num_kv_heads=4, group=8, sinks=1, window=128),
    Case("nuq2-1%", (20000,), num_kv_heads=2, position=1),
    Case("nuq4-1%-pc", (5000,), num_kv_heads=8, group=4),
)
