"""One query token's attention over a long context: packed cache against the best fp16 of torch.

    python benchmarks/bench_attention.py --quick
    python benchmarks/bench_attention.py --output benchmarks/results/attention-h100.json

Every contender runs inside a CUDA graph over copies that together exceed five times the L2 cache;
contenders take turns, and the median counts. `fraction_of_byte_limit` is the time the bytes that
must move would take at this card's own read bandwidth, measured in the same run, over the time
taken. Packed contexts are random: codes of normal data, outliers at random places.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from random_pages import HEAD_DIM, Shape, random_pages
from timing import Contender, copies, interleave, read_rate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
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
from kvqtool.slabs import angle_table, frequency_table
from kvqtool.spec import parse_spec
from kvqtool.variant import Variant, groups_of, variant_of

SPECS = ("nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq4-1%-pc", "nuq3-1%-pc", "nuq2-1%-pc", "nuq4")
EAGER = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
TEMPLATE = "fp16 template"


QUICK = (
    Shape(1, 32, 32, 131072),
    Shape(4, 32, 8, 131072),
    Shape(1, 32, 8, 32768),
    Shape(1, 32, 8, 4096),
)
FULL = tuple(dict.fromkeys((
    *QUICK,
    *(Shape(b, h, k, n) for h, k in ((32, 32), (32, 8), (64, 8)) for b in (1, 4, 16)
      for n in (4096, 16384, 32768, 131072, 524288) if b * k * n <= 2**22 + 2**20),
)))  # fmt: skip


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.manual_seed(0)
    rate = read_rate()
    rows = []
    for shape in QUICK if options.quick else FULL:
        if (
            options.shapes
            and f"{shape.batch},{shape.num_heads},{shape.num_kv_heads},{shape.context}"
            not in options.shapes
        ):
            continue
        started = time.perf_counter()
        rows += _measure_shape(shape, options, rate)
        print(f"{shape}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": options.commit,
        "date": time.strftime("%Y-%m-%d"),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read_gb_per_second": rate / 1e9,
        "rounds": options.rounds,
        "rows": rows,
    }
    text = json.dumps(record, indent=1) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)


def _measure_shape(
    shape: Shape, options: argparse.Namespace, read_rate: float
) -> list[dict[str, object]]:
    packed = [_packed(shape, spec) for spec in options.spec or SPECS]
    packed += [
        _packed(shape, spec, given) for given in options.also for spec in options.spec or SPECS
    ]
    if options.once:
        for contender in packed * 3:
            contender.calls[0]()
        torch.cuda.synchronize()
        return []
    contenders = [*fp16_contenders(shape), *packed]
    if options.dequantize:
        contenders.append(_dequantized(shape, packed[0]))
    times = interleave(contenders, options.rounds)
    fp16 = {
        c.name: statistics.median(times[c.name]) for c in contenders if c.name in (TEMPLATE, *EAGER)
    }
    best = min(fp16.values())
    rows = []
    for contender in contenders:
        found = sorted(times[contender.name])
        median = statistics.median(found)
        rows.append(
            {
                "spec": contender.name,
                "context_tokens": shape.context,
                "batch": shape.batch,
                "num_heads": shape.num_heads,
                "num_kv_heads": shape.num_kv_heads,
                "card": torch.cuda.get_device_name(),
                "microseconds": median * 1e6,
                "microseconds_p10": found[len(found) // 10] * 1e6,
                "microseconds_p90": found[-1 - len(found) // 10] * 1e6,
                "bytes": contender.nbytes,
                "gb_per_second": contender.nbytes / median / 1e9,
                "fraction_of_byte_limit": contender.nbytes / read_rate / median,
                "speedup_vs_best_fp16": best / median,
                "best_fp16": min(fp16, key=lambda name: fp16[name]),
                "copies": len(contender.calls),
            }
        )
        row = rows[-1]
        print(
            f"{shape.batch:3} {shape.num_heads}/{shape.num_kv_heads} {shape.context:7}"
            f" {contender.name:15}"
            f" {median * 1e6:8.1f} us {row['gb_per_second']:6.0f} GB/s"
            f" {row['fraction_of_byte_limit']:.2f} of limit, x{row['speedup_vs_best_fp16']:.2f}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def _query(shape: Shape) -> Tensor:
    return torch.randn(shape.batch, shape.num_heads, HEAD_DIM, device="cuda", dtype=torch.half)


def fp16_contenders(shape: Shape, names: Sequence[str] = (*EAGER, TEMPLATE)) -> Iterator[Contender]:
    """Yield torch's backends by name, those that run, and the kernel's own template, over fp16."""
    wide = (shape.batch, shape.num_kv_heads, shape.context, HEAD_DIM)
    nbytes = 4 * shape.batch * shape.num_kv_heads * shape.context * HEAD_DIM
    pairs = [
        tuple(torch.randn(wide, device="cuda", dtype=torch.half) for _ in range(2))
        for _ in range(copies(nbytes))
    ]
    query = _query(shape)[:, :, None]

    def sdpa(backend: SDPBackend, key: Tensor, value: Tensor) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel([backend]):
                return scaled_dot_product_attention(
                    query, key, value, enable_gqa=shape.num_heads != shape.num_kv_heads
                )

        return call

    for name in (name for name in EAGER if name in names):
        backend = EAGER[name]
        calls = [sdpa(backend, *pair) for pair in pairs]
        with suppress(RuntimeError):
            calls[0]()
            yield Contender(name, nbytes, calls)
    if TEMPLATE not in names:
        return
    variant = Variant(
        HEAD_DIM, 16, 16, False, False, False, groups_of(shape.num_heads, shape.num_kv_heads)
    )
    yield contender(TEMPLATE, shape, variant, random_pages(shape, variant))


def packed_variant(shape: Shape, text: str, given: str = "") -> Variant:
    """Return the kernel of a spec; `given` sets fields of it, as in most_warps=12,value_table=0."""
    group = groups_of(shape.num_heads, shape.num_kv_heads)
    variant = variant_of(parse_spec(text), HEAD_DIM, group)
    fields = dict(part.split("=") for part in given.split(",") if part)
    kinds = {name: type(getattr(variant, name)) for name in fields}
    return replace(variant, **{name: kinds[name](int(value)) for name, value in fields.items()})


def _packed(shape: Shape, text: str, given: str = "") -> Contender:
    variant = packed_variant(shape, text, given)
    value = parse_spec(text).value
    per_token = 2 * outliers_per_tail(value, shape.num_kv_heads * HEAD_DIM)
    name = f"{text} {given}".strip()
    return contender(name, shape, variant, random_pages(shape, variant, per_token))


def contender(name: str, shape: Shape, variant: Variant, pages: Pages) -> Contender:
    """Wrap pages with everything else a launch reads: one sink, random tables."""
    steps, half = HEAD_DIM // 16, HEAD_DIM // 2
    inv_freq = 500_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    if variant.channel_levels:
        table = torch.randn(shape.num_kv_heads, HEAD_DIM, 1 << variant.key_bits)
    else:
        table = torch.rand(shape.num_kv_heads, steps, 4, 2, 2, 2)
    levels = torch.zeros(2, variant.level_row)
    for side, bits in enumerate((variant.key_bits, variant.value_bits)):
        if bits <= 8:
            levels[side, : 1 << bits] = normalfloat_levels(bits)
    tables = LayerTables(
        table.half().cuda(), levels.half().cuda(),
        angle_table(inv_freq).cuda(), frequency_table(inv_freq).cuda(),
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


def _dequantized(shape: Shape, packed: Contender) -> Contender:
    """Return the way without fusion: decode everything, then the best of torch."""
    query, grouped = _query(shape)[:, :, None], shape.num_heads != shape.num_kv_heads

    def call(context: PackedContext, tables: LayerTables, variant: Variant) -> object:
        key, value = dequantize(context, tables, variant, torch.half)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return scaled_dot_product_attention(query, key, value, enable_gqa=grouped)

    calls = [partial(call, *inputs) for inputs in packed.inputs]
    return Contender(f"{packed.name} dequantize", packed.nbytes, calls)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the four shapes that must hold")
    parser.add_argument("--dequantize", action="store_true", help="also decode, then attend")
    parser.add_argument("--once", action="store_true", help="three bare launches, for a profiler")
    parser.add_argument("--spec", action="append", help="specs instead of all; repeatable")
    parser.add_argument(
        "--also", action="append", default=[], help="every spec with these fields too; repeatable"
    )
    parser.add_argument("--shapes", action="append", help="B,HEADS,KV_HEADS,CONTEXT; repeatable")
    parser.add_argument("--rounds", type=int, default=11, help="how often contenders take turns")
    parser.add_argument("--output", type=Path, help="write the JSON here")
    parser.add_argument("--commit", help="the commit, for the record")
    return parser.parse_args()


if __name__ == "__main__":
    main()
