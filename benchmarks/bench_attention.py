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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvqtool.codebook import normalfloat_levels
from kvqtool.fused import (
    ExactTokens,
    LayerTables,
    PackedContext,
    Variant,
    attend,
    groups_of,
    new_workspace,
)
from kvqtool.memory import PAGE_TOKENS, SLAB_TOKENS, outliers_per_tail
from kvqtool.pages import Pages, folds_levels, lay_out_lists
from kvqtool.reading import dequantize
from kvqtool.slabs import angle_table, frequency_table, pack_slabs
from kvqtool.spec import parse_spec

READ = r"""
extern "C" __global__ void read(const uint4* from, unsigned long long count, unsigned* to) {
    unsigned sum = 0;
    unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
        uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
        sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
        sum += c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    if (sum == 0x12345678) *to = sum;
}
"""
HEAD_DIM = 128
SPECS = ("nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq4-1%-pc", "nuq3-1%-pc", "nuq2-1%-pc", "nuq4")
EAGER = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Shape:
    """A decode step: sequences, heads, tokens of context."""

    batch: int
    num_heads: int
    num_kv_heads: int
    context: int


QUICK = (
    Shape(1, 32, 32, 131072),
    Shape(4, 32, 8, 131072),
    Shape(1, 32, 8, 32768),
    Shape(1, 32, 8, 4096),
)
FULL = (
    *QUICK,
    *(Shape(b, h, k, n) for h, k in ((32, 32), (32, 8), (64, 8)) for b in (1, 4, 16)
      for n in (4096, 16384, 32768, 131072, 524288) if b * k * n <= 2**22 + 2**20),
)  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A name, the bytes a launch must read, and one function per copy of its inputs."""

    name: str
    nbytes: int
    calls: list[Callable[[], object]]
    inputs: tuple[tuple[PackedContext, LayerTables, Variant], ...] = ()


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.manual_seed(0)
    read_rate = _read_rate()
    rows = []
    for shape in QUICK if options.quick else FULL:
        if (
            options.shapes
            and f"{shape.batch},{shape.num_heads},{shape.num_kv_heads},{shape.context}"
            not in options.shapes
        ):
            continue
        started = time.perf_counter()
        rows += _measure_shape(shape, options, read_rate)
        print(f"{shape}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": options.commit,
        "date": time.strftime("%Y-%m-%d"),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read_gb_per_second": read_rate / 1e9,
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
    contenders = [*_fp16(shape), *packed]
    if options.dequantize:
        contenders.append(_dequantized(shape, packed[0]))
    times = _interleave(contenders, options.rounds)
    fp16 = {
        c.name: statistics.median(times[c.name])
        for c in contenders
        if c.name in ("fp16 template", *EAGER)
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


def _interleave(contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
    """Return seconds a launch, a number a round; a round replays every contender's graph."""
    graphs = {}
    torch.cuda.synchronize()
    for contender in contenders:
        with torch.cuda.stream(torch.cuda.Stream()):
            contender.calls[0]()
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        slow = contender.name in ("sdpa math", "sdpa efficient") or contender.name.endswith(
            "dequantize"
        )
        launches = (contender.calls * (1 if slow else max(1, 16 // len(contender.calls))))[
            : 2 if slow else None
        ]
        with torch.cuda.graph(graph):
            for call in launches:
                call()
        graphs[contender.name] = graph, len(launches)
        graph.replay()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, launches) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3 / launches)
    return times


def _copies(nbytes: int) -> int:
    """Return how many copies of a contender's inputs exceed five times the L2 cache."""
    wanted = 5 * torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, -(-wanted // nbytes))


def _query(shape: Shape) -> Tensor:
    return torch.randn(shape.batch, shape.num_heads, HEAD_DIM, device="cuda", dtype=torch.half)


def _fp16(shape: Shape) -> Iterator[Contender]:
    wide = (shape.batch, shape.num_kv_heads, shape.context, HEAD_DIM)
    nbytes = 4 * shape.batch * shape.num_kv_heads * shape.context * HEAD_DIM
    pairs = [
        tuple(torch.randn(wide, device="cuda", dtype=torch.half) for _ in range(2))
        for _ in range(_copies(nbytes))
    ]
    query = _query(shape)[:, :, None]

    def sdpa(backend: SDPBackend, key: Tensor, value: Tensor) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel([backend]):
                return scaled_dot_product_attention(
                    query, key, value, enable_gqa=shape.num_heads != shape.num_kv_heads
                )

        return call

    for name, backend in EAGER.items():
        calls = [sdpa(backend, *pair) for pair in pairs]
        with suppress(RuntimeError):
            calls[0]()
            yield Contender(name, nbytes, calls)
    variant = Variant(
        HEAD_DIM, 16, 16, False, False, False, groups_of(shape.num_heads, shape.num_kv_heads)
    )
    yield _contender("fp16 template", shape, variant, _random_pages(shape, variant))


def _packed(shape: Shape, text: str) -> Contender:
    spec = parse_spec(text)
    variant = Variant(
        HEAD_DIM,
        spec.key.bits,
        spec.value.bits,
        folds_levels(spec.key),
        True,
        bool(spec.key.outlier_fraction),
        groups_of(shape.num_heads, shape.num_kv_heads),
    )
    per_token = 2 * outliers_per_tail(spec.value, shape.num_kv_heads * HEAD_DIM)
    return _contender(text, shape, variant, _random_pages(shape, variant, per_token))


def _contender(name: str, shape: Shape, variant: Variant, pages: Pages) -> Contender:
    """Wrap pages with everything else a launch reads: one sink, random tables."""
    steps, half = HEAD_DIM // 16, HEAD_DIM // 2
    inv_freq = 500_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    if variant.channel_levels:
        table = torch.randn(shape.num_kv_heads, HEAD_DIM, 1 << variant.key_bits)
    else:
        table = torch.rand(shape.num_kv_heads, steps, 4, 2, 2, 2)
    levels = torch.zeros(2, 16)
    for side, bits in enumerate((variant.key_bits, variant.value_bits)):
        if bits <= 4:
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
    for copy in range(_copies(pages.nbytes)):
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


def _random_pages(shape: Shape, variant: Variant, value_outliers: int = 0) -> Pages:
    """Return pages of random codes; `value_outliers` a token over all KV heads."""
    pages = shape.batch * -(-shape.context // PAGE_TOKENS)
    slabs = pages * shape.num_kv_heads * 2
    sides = []
    for bits, is_key in ((variant.key_bits, True), (variant.value_bits, False)):
        parts = []
        for start in range(0, slabs, 2048):
            states = (
                torch.randn(min(2048, slabs - start), SLAB_TOKENS, HEAD_DIM, device="cuda") * 0.4
            )
            if bits <= 4:
                levels = normalfloat_levels(bits).cuda()
                states = torch.bucketize(states, (levels[1:] + levels[:-1]) / 2, out_int32=True)
            parts.append(pack_slabs(states, bits, is_key=is_key))
        sides.append(torch.cat(parts))
    words = torch.cat(sides, dim=1).view(pages, shape.num_kv_heads, 2, -1)
    ranges = torch.rand(pages, PAGE_TOKENS, 2, device="cuda").half()
    table = (
        torch.arange(pages, dtype=torch.int32, device="cuda").view(-1, shape.batch).T.contiguous()
    )
    index, outliers = _random_outliers(slabs, shape, value_outliers if variant.outliers else 0)
    return Pages(words, ranges, index.view(pages, shape.num_kv_heads, 2, 4), outliers, table)


def _random_outliers(slabs: int, shape: Shape, per_token: int) -> tuple[Tensor, Tensor]:
    """Return lists of outliers at random places: 1 % of keys, `per_token` of a token's values."""
    if not per_token:
        empty = torch.zeros(slabs, 4, dtype=torch.int32, device="cuda")
        return empty, torch.zeros(4, dtype=torch.int32, device="cuda")
    shares = torch.tensor([0.01, per_token / shape.num_kv_heads / HEAD_DIM], device="cuda")
    trials = torch.full((slabs, 2), float(SLAB_TOKENS * HEAD_DIM), device="cuda")
    counts = torch.binomial(trials, shares.expand(slabs, 2)).long().flatten()
    owner = torch.arange(2 * slabs, device="cuda").repeat_interleave(counts)
    token = torch.randint(0, 64, owner.shape, device="cuda")
    place = torch.randint(0, HEAD_DIM, owner.shape, device="cuda")
    unit = torch.randint(0, 4 * HEAD_DIM // 16 * 64, owner.shape, device="cuda")
    where = torch.where(owner % 2 == 0, unit << 3 | (place & 3) << 1, place << 8 | token << 2)
    delta = torch.randn(len(owner), device="cuda").half().view(torch.int16).to(torch.int32)
    return lay_out_lists(owner, delta << 16 | where.to(torch.int32), slabs)


def _read_rate() -> float:
    """Return the bytes a second that a kernel which only reads gets, over 4 GiB."""
    import cupy

    kernel = cupy.RawKernel(READ, "read")
    data = torch.randint(0, 2**31 - 1, (2**30,), dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    best = 0.0
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        for blocks in (132 * 4, 132 * 8, 132 * 16):
            for _ in range(4):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                kernel((blocks,), (512,), (data.data_ptr(), data.numel() // 4, out.data_ptr()))
                end.record()
                end.synchronize()
                best = max(best, data.numel() * 4 / (begin.elapsed_time(end) / 1e3))
    return best


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the four shapes that must hold")
    parser.add_argument("--dequantize", action="store_true", help="also decode, then attend")
    parser.add_argument("--spec", action="append", help="specs instead of all; repeatable")
    parser.add_argument("--shapes", action="append", help="B,HEADS,KV_HEADS,CONTEXT; repeatable")
    parser.add_argument("--rounds", type=int, default=11, help="how often contenders take turns")
    parser.add_argument("--output", type=Path, help="write the JSON here")
    parser.add_argument("--commit", help="the commit, for the record")
    return parser.parse_args()


if __name__ == "__main__":
    main()
