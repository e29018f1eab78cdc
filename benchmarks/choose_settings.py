"""Which settings of the attention kernel are fastest, beside the best fp16 of torch.

    python benchmarks/choose_settings.py --compile
    python benchmarks/choose_settings.py --output settings.json

Settings are fields of `variant.Variant`. All settings of a scheme read the same pages and take
turns in CUDA graphs; a line each, the fastest marked. `--compile` only fills CuPy's cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from bench_attention import QUICK, SPECS
from contenders import contender, fp16_contenders, packed_variant
from random_pages import HEAD_DIM, Shape, random_pages
from timing import interleave, read_rate
from warm_kernels import compile_variant

from kvqtool.memory import outliers_per_tail
from kvqtool.spec import parse_spec
from kvqtool.variant import Variant

# "" is what variant_of chooses.
SETTINGS: Final = ("", "chunk_steps=2,most_chunks=4", "chunk_steps=4,most_chunks=2",
                   "chunk_steps=8,most_chunks=2", "ahead=0,most_chunks=2", "most_warps=12",
                   "ahead=4,most_warps=12")  # fmt: skip


def main() -> None:
    """Compile, or measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--spec", action="append", choices=SPECS, help="instead of all; repeatable")
    parser.add_argument("--setting", action="append", help="instead of all; repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", help="the commit, for the record")
    parser.add_argument("--output", type=Path, help="write a JSON record here")
    options = parser.parse_args()
    specs, settings = options.spec or SPECS, options.setting or SETTINGS
    if options.compile:
        _compile_all(specs, settings)
        return
    rate = read_rate()
    rows: list[dict[str, object]] = []
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
    for shape in reversed(QUICK):
        for spec in specs:
            rows += _measure(shape, spec, settings, options.rounds, rate)
            if options.output:
                options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def variants(shape: Shape, spec: str, settings: Sequence[str]) -> dict[str, Variant]:
    """Return the variants of a scheme by their settings, each once; "" is what is chosen now."""
    found: dict[str, Variant] = {}
    for given in settings:
        variant = packed_variant(shape, spec, given)
        if variant not in found.values():
            found[given] = variant
    return found


def _measure(
    shape: Shape, spec: str, settings: Sequence[str], rounds: int, rate: float
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    per_token = 2 * outliers_per_tail(parse_spec(spec).value, shape.num_kv_heads * HEAD_DIM)
    chosen = variants(shape, spec, settings)
    pages = random_pages(shape, packed_variant(shape, spec), per_token)
    made = [contender(name, shape, variant, pages) for name, variant in chosen.items()]
    made += list(fp16_contenders(shape, ("sdpa cudnn",)))
    times = {name: statistics.median(t) for name, t in interleave(made, rounds).items()}
    best = min(chosen, key=lambda name: times[name])
    for name in chosen:
        mark = "<" if name == best else ""
        print(
            f"{shape.batch} {shape.num_heads}/{shape.num_kv_heads} {shape.context:7} {spec:11}"
            f" {name or 'now':32} {chosen[name].warps:2} warps {times[name] * 1e6:7.1f} us"
            f" x{times['sdpa cudnn'] / times[name]:.2f} {mark}",
            flush=True,
        )
        rows.append(
            {
                "spec": spec,
                "settings": name,
                "warps": chosen[name].warps,
                "context_tokens": shape.context,
                "batch": shape.batch,
                "num_heads": shape.num_heads,
                "num_kv_heads": shape.num_kv_heads,
                "card": torch.cuda.get_device_name(),
                "microseconds": times[name] * 1e6,
                "bytes": pages.nbytes,
                "fraction_of_byte_limit": pages.nbytes / rate / times[name],
                "speedup_vs_best_fp16": times["sdpa cudnn"] / times[name],
                "best_fp16": "sdpa cudnn",
                "best_fp16_microseconds": times["sdpa cudnn"] * 1e6,
            }
        )
    del pages, made
    torch.cuda.empty_cache()
    return rows


def _compile_all(specs: Sequence[str], settings: Sequence[str]) -> None:
    started = time.perf_counter()
    asked = [variants(shape, spec, settings) for shape in QUICK for spec in specs]
    found = list(dict.fromkeys(v for each in asked for v in each.values()))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        problems = [line for line in pool.imap_unordered(compile_variant, found) if line]
    print(f"{len(found)} variants in {time.perf_counter() - started:.0f} s", *problems, sep="\n")


if __name__ == "__main__":
    main()
