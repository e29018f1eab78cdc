"""What benchmarks of attention hold against each other: torch's fp16 and the kernel's own templates
over exact states, and packed contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from random_pages import HEAD_DIM, Levels, Shape, random_pages
from timing import Contender, copies
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from kvqtool.codebook import normalfloat_levels
from kvqtool.fused import (
    ExactTokens,
    LayerTables,
    PackedContext,
    attend,
    new_workspace,
)
from kvqtool.memory import outliers_per_tail
from kvqtool.pages import Pages
from kvqtool.reading import dequantize
from kvqtool.spec import parse_spec
from kvqtool.turning import angle_table, coefficient_table, frequency_table
from kvqtool.variant import Variant, groups_of, variant_of

EAGER = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
TEMPLATE = "fp16 template"
FP8 = "fp8 template"
FLEX = "flex compiled"


def _query(shape: Shape) -> Tensor:
    return torch.randn(shape.batch, shape.num_heads, HEAD_DIM, device="cuda", dtype=torch.half)


def fp16_contenders(shape: Shape, names: Sequence[str] = (*EAGER, TEMPLATE)) -> Iterator[Contender]:
    """Yield torch's backends by name, those that run, and the kernel's own template, over fp16;
    FLEX is compiled for the shape, which takes a while.
    """
    wide = (shape.batch, shape.num_kv_heads, shape.context, HEAD_DIM)
    nbytes = 4 * shape.batch * shape.num_kv_heads * shape.context * HEAD_DIM
    pairs = [
        tuple(torch.randn(wide, device="cuda", dtype=torch.half) for _ in range(2))
        for _ in range(copies(nbytes))
    ]
    query, grouped = _query(shape)[:, :, None], shape.num_heads != shape.num_kv_heads

    def sdpa(backend: SDPBackend, key: Tensor, value: Tensor) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel([backend]):
                return scaled_dot_product_attention(query, key, value, enable_gqa=grouped)

        return call

    for name in (name for name in EAGER if name in names):
        backend = EAGER[name]
        calls = [sdpa(backend, *pair) for pair in pairs]
        with suppress(RuntimeError):
            calls[0]()
            yield Contender(name, nbytes, calls)
    if FLEX in names:
        torch.compiler.reset()  # a compiler that has seen many shapes gives up
        compiled = torch.compile(flex_attention, dynamic=False)
        calls = [partial(compiled, query, *pair, enable_gqa=grouped) for pair in pairs]
        calls[0]()
        yield Contender(FLEX, nbytes, calls)
    if TEMPLATE not in names:
        return
    variant = Variant(
        HEAD_DIM, 16, 16, False, False, False, groups_of(shape.num_heads, shape.num_kv_heads)
    )
    yield contender(TEMPLATE, shape, variant, random_pages(shape, variant))


def fp8_template(shape: Shape) -> Contender:
    """Return the kernel's template over e4m3 states, which it reads as 8-bit codes, by a table."""
    group = groups_of(shape.num_heads, shape.num_kv_heads)
    variant = Variant(HEAD_DIM, 8, 8, False, False, False, group)
    return contender(
        FP8, shape, variant, random_pages(shape, variant, levels=fp8_levels), fp8_levels
    )


def fp8_levels(bits: int) -> Tensor:
    """Return the numbers that float8_e4m3fn has, ascending, the greatest again up to 2**bits."""
    all_bytes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = all_bytes[all_bytes.isfinite()].unique()
    return torch.cat([numbers, numbers[-1:].expand((1 << bits) - len(numbers))])


def llama_inv_freq() -> Tensor:
    """Return radians a token of Llama 3's rotation, whichever heads a shape has."""
    return 500_000.0 ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))


def packed_variant(shape: Shape, text: str, given: str = "") -> Variant:
    """Return the kernel of a spec; `given` sets fields of it, as in most_warps=12,value_table=0."""
    group = groups_of(shape.num_heads, shape.num_kv_heads)
    spec = parse_spec(text)
    variant = variant_of(spec, HEAD_DIM, group, llama_inv_freq() if spec.key.pre_rope else None)
    fields = dict(part.split("=") for part in given.split(",") if part)
    kinds = {name: type(getattr(variant, name)) for name in fields}
    return replace(variant, **{name: kinds[name](int(value)) for name, value in fields.items()})


def packed(shape: Shape, text: str, given: str = "") -> Contender:
    """Return a random packed context of a spec; `given` as for `packed_variant`."""
    variant = packed_variant(shape, text, given)
    value = parse_spec(text).value
    per_token = 2 * outliers_per_tail(value, shape.num_kv_heads * HEAD_DIM)
    name = f"{text} {given}".strip()
    return contender(name, shape, variant, random_pages(shape, variant, per_token))


def contender(
    name: str, shape: Shape, variant: Variant, pages: Pages, levels_of: Levels = normalfloat_levels
) -> Contender:
    """Wrap pages with everything else a launch reads: one sink, random tables."""
    steps = HEAD_DIM // 16
    inv_freq = llama_inv_freq()
    if variant.channel_levels:
        table = torch.randn(shape.num_kv_heads, HEAD_DIM, 1 << variant.key_bits)
    else:
        table = torch.rand(shape.num_kv_heads, steps, 4, 2, 2, 2)
    levels = torch.zeros(2, variant.level_row)
    for side, bits in enumerate((variant.key_bits, variant.value_bits)):
        if bits <= 8:
            levels[side, : 1 << bits] = levels_of(bits)
    tables = LayerTables(
        table.half().cuda(), levels.half().cuda(),
        angle_table(inv_freq).cuda(), frequency_table(inv_freq).cuda(),
        coefficient_table(inv_freq).cuda(),
        torch.arange(HEAD_DIM, dtype=torch.int16).cuda(), HEAD_DIM**-0.5,
    )  # fmt: skip
    state = torch.zeros(shape.batch, 8, dtype=torch.int32, device="cuda")
    state[:, 0], state[:, 1], state[:, 3] = shape.context, 1, 1
    sink = torch.randn(shape.batch, shape.num_kv_heads, 1, HEAD_DIM, device="cuda").half()
    query = _query(shape)
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = new_workspace(variant, query, shape.num_kv_heads, blocks)
    inputs: list[tuple[PackedContext, LayerTables, Variant]] = []
    calls = []
    for copy in range(copies(pages.nbytes)):
        own = pages if not copy else Pages(*(t.clone() for t in vars(pages).values()))
        context = PackedContext(own, ExactTokens(sink, sink, sink, sink), state)
        inputs.append((context, tables, variant))
        calls.append(partial(attend, query, *inputs[-1], workspace))
    return Contender(name, pages.nbytes, calls, tuple(inputs))


def dequantized(shape: Shape, packed: Contender) -> Contender:
    """Return the way without fusion: decode everything, then the best of torch."""
    query, grouped = _query(shape)[:, :, None], shape.num_heads != shape.num_kv_heads

    def call(context: PackedContext, tables: LayerTables, variant: Variant) -> object:
        key, value = dequantize(context, tables, variant, torch.half)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return scaled_dot_product_attention(query, key, value, enable_gqa=grouped)

    calls = [partial(call, *inputs) for inputs in packed.inputs]
    return Contender(f"{packed.name} dequantize", packed.nbytes, calls)
