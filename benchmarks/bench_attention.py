"""One query token's attention over a long context: packed cache against the best fp16 of torch.

    python benchmarks/bench_attention.py --quick
    python benchmarks/bench_attention.py --flex --fp8 --output attention.json

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
from pathlib import Path

import torch
from contenders import (
    EAGER,
    FLEX,
    FP8,
    TEMPLATE,
    dequantized,
    fp8_template,
    fp16_contenders,
    packed,
)
from random_pages import HEAD_DIM, Shape
from timing import interleave, read_rate

SPECS = ("nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq4-1%-pc", "nuq3-1%-pc", "nuq2-1%-pc", "nuq4")
QUICK = (
    Shape(1, 32, 32, 131072),
    Shape(4, 32, 8, 131072),
    Shape(1, 32, 8, 32768),
    Shape(1, 32, 8, 4096),
)
FULL = tuple(dict.fromkeys((
    *QUICK,
    *(Shape(b, h, k, n) for h, k in ((32, 32), (32, 8), (64, 8)) for b in (1, 4, 16)
      for n in (4096, 16384, 32768, 131072, 524288, 1048576)),
)))  # fmt: skip
# What is held at once, over one copy of the fp16 states: these, those of the fp16 template and what
# making its pages takes, and the packed contexts. `sdpa math` repeats states for all query heads.
HELD = 6


def main() -> None:
    """Measure and print."""
    options = _options()
    shapes = [_shape(text) for text in options.shapes or ()]
    shapes = shapes or list(QUICK if options.quick else FULL)
    if options.list:
        for shape in shapes:
            names = ", ".join(_names(options))
            print(f"{shape}: {_bytes_held(shape) / 1e9:.1f} GB; {names}")
        return
    torch.manual_seed(0)
    rate = read_rate()
    rows = []
    for shape in shapes:
        wanted, free = _bytes_held(shape), torch.cuda.mem_get_info()[0]
        if wanted > free:
            there = f"{free / 1e9:.0f} GB are free"
            print(f"{shape}: left out, takes {wanted / 1e9:.0f} GB, {there}", file=sys.stderr)
            continue
        started = time.perf_counter()
        rows += _measure_shape(shape, options, rate)
        torch.cuda.empty_cache()
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


def _shape(text: str) -> Shape:
    """Return the shape that `--shapes` names."""
    batch, num_heads, num_kv_heads, context = map(int, text.split(","))
    return Shape(batch, num_heads, num_kv_heads, context)


def _bytes_held(shape: Shape) -> int:
    """Return the most that a shape's measurement holds at once, or a little more."""
    states = 4 * shape.batch * shape.num_kv_heads * shape.context * HEAD_DIM
    return (HELD + shape.num_heads // shape.num_kv_heads) * states


def _names(options: argparse.Namespace) -> list[str]:
    """Return whom a shape's measurement holds against each other."""
    specs = options.spec or SPECS
    packed_names = [f"{spec} {given}".strip() for given in ("", *options.also) for spec in specs]
    if options.once:
        return packed_names
    others = [FLEX] * options.flex + [FP8] * options.fp8
    return [*EAGER, TEMPLATE, *others, *packed_names]


def _measure_shape(
    shape: Shape, options: argparse.Namespace, read_rate: float
) -> list[dict[str, object]]:
    all_packed = [
        packed(shape, spec, given)
        for given in ("", *options.also)
        for spec in options.spec or SPECS
    ]
    if options.once:
        for contender in all_packed * 3:
            contender.calls[0]()
        torch.cuda.synchronize()
        return []
    exact = fp16_contenders(shape, (*EAGER, TEMPLATE, *([FLEX] * options.flex)))
    contenders = [*exact, *([fp8_template(shape)] if options.fp8 else []), *all_packed]
    if options.dequantize:
        contenders.append(dequantized(shape, all_packed[0]))
    times = interleave(contenders, options.rounds)
    fp16 = {
        c.name: statistics.median(times[c.name])
        for c in contenders
        if c.name in (TEMPLATE, FLEX, *EAGER)
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the four shapes that must hold")
    parser.add_argument("--flex", action="store_true", help="also compiled flex_attention; slow")
    parser.add_argument("--fp8", action="store_true", help="also the kernel's template over e4m3")
    parser.add_argument("--list", action="store_true", help="say what would run, without a GPU")
    parser.add_argument("--dequantize", action="store_true", help="also decode, then attend")
    parser.add_argument("--once", action="store_true", help="three bare launches, for a profiler")
    parser.add_argument("--spec", action="append", help="specs instead of all; repeatable")
    parser.add_argument(
        "--also", action="append", default=[], help="every spec with these fields too; repeatable"
    )
    parser.add_argument(
        "--shapes", action="append", help="B,HEADS,KV_HEADS,CONTEXT instead of all; repeatable"
    )
    parser.add_argument("--rounds", type=int, default=11, help="how often contenders take turns")
    parser.add_argument("--output", type=Path, help="write the JSON here")
    parser.add_argument("--commit", help="the commit, for the record")
    return parser.parse_args()


if __name__ == "__main__":
    main()
