"""Time generation end to end: prompt, steps and peak memory of every way to hold the cache.

    python benchmarks/bench_generate.py --output benchmarks/results/generate-h200.json

A model of random weights reads a prompt and generates on greedily, one way after the other in one
process, each step timed on the host from token to token:

- `dynamic`: transformers' DynamicCache with sdpa, step by step: what `generate` does by default.
- `static`: StaticCache and torch.compile(mode="reduce-overhead"), transformers' fastest; only where
  asked for, since compiling takes a minute.
- `quantized`: transformers' QuantizedCache, 4 bits of HQQ (`pip install hqq`).
- `eager`, `graph`: this package's cache, step by step and from a CUDA graph, for each `--spec`.

Before a way is timed first, it reads a short prompt and takes a few steps: what compiles or loads
once is in that row's `first_use_seconds`, not in its prompt. What steps compile or capture is in
`warm_up_seconds`, those of the first 8 steps, which no rate counts. A way that is named twice is
timed twice.

`--fill` puts synthetic states into the cache in place of a prompt; `--largest` looks for the
largest batch that fits. One JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from bench_quality import commit, machine
from generation_ways import PACKED, STOCK, Case, Ways
from random_llama import SHAPES

from kvqtool.files import atomic_output
from kvqtool.live import forget_peak

BASELINE: Final = "dynamic"
FIRST_TOKENS: Final = 300  # of a way's first use: whole pages, and tokens that fill none
FIRST_STEPS: Final = 2


class Bench:
    """The ways to generate, and those that were used already."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Make the model."""
        self.device = torch.device(options.device)
        self._ways = Ways(options.shape, getattr(torch, options.dtype), self.device)
        self._used: set[tuple[str, str]] = set()

    def row(self, case: Case) -> dict[str, Any]:
        """Time one case; what does not fit gives a row that says so."""
        row: dict[str, Any] = {"way": case.way}
        if case.way in PACKED:
            row |= {"spec": case.spec, "prefill_chunk": case.chunk}
        row |= {"batch": case.batch, "context_tokens": case.context}
        try:
            row |= self._first_use(case)
            self._clean()
            row |= self._ways.run(case)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        self._clean()
        return row

    def _first_use(self, case: Case) -> dict[str, float]:
        """Use a way once where it was not yet; a compiled one is compiled for its own shape."""
        if (case.way, case.spec) in self._used or case.fill or case.way == "static":
            return {}
        started = time.perf_counter()
        short = replace(case, batch=1, context=FIRST_TOKENS, steps=FIRST_STEPS, chunk=None)
        self._ways.run(short)
        self._used.add((case.way, case.spec))
        return {"first_use_seconds": time.perf_counter() - started}

    def _clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        forget_peak(self.device)


def largest(bench: Bench, case: Case, batches: list[int]) -> dict[str, Any]:
    """Return the row of the largest of `batches` that fits; the larger ones are tried first."""
    row: dict[str, Any] = {}
    for batch in sorted(batches, reverse=True):
        row = bench.row(replace(case, batch=batch))
        _print(row)
        if "error" not in row:
            break
    return row | {"largest": True}


def cases(options: argparse.Namespace) -> list[Case]:
    """Return what is to be timed, in order; of the largest batch, one case of each."""
    found = []
    for context in options.contexts:
        for batch in options.batches[:1] if options.largest else options.batches:
            for way in options.ways:
                steps = options.stock_steps if way in STOCK else None
                case = Case(way, batch, context, steps or options.steps, "")
                case = replace(case, fill=options.chunk if options.fill else None)
                specs = options.spec if way in PACKED else [""]
                chunk = options.prefill_chunk if way in PACKED else None
                found += [replace(case, spec=spec, chunk=chunk) for spec in specs]
    return found


def main() -> None:
    """Time and print."""
    options = _options()
    bench, rows = Bench(options), []
    for case in cases(options):
        if options.largest:
            rows.append(largest(bench, case, options.batches))
        else:
            rows.append(bench.row(case))
            _print(rows[-1])
        _save(options, rows)


def _save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["speedup_vs_dynamic_cache"] = _speedup(row, rows)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "shape": options.shape,
        "dtype": options.dtype,
        "spec": ", ".join(options.spec),
        "filled": options.fill,
        "rows": rows,
    }
    if options.output:
        with atomic_output(options.output, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _speedup(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Return tokens a second over the stock cache's at the same context, and batch or largest; its
    last row's where it was timed twice.
    """
    same = ("context_tokens", "largest" if row.get("largest") else "batch")
    rate = "tokens_per_second"
    for other in reversed(rows):
        is_base = other["way"] == BASELINE and all(other.get(k) == row.get(k) for k in same)
        if is_base and rate in row and rate in other:
            return float(row[rate] / other[rate])
    return None


def _print(row: dict[str, Any]) -> None:
    label = f"{row['way']:9} {row['batch']:4} x {row['context_tokens']:7}:"
    if "error" in row:
        print(label, row["error"], flush=True)
        return
    gib = {name: (row[name] or 0) / 2**30 for name in ("prompt_peak_bytes", "peak_bytes")}
    print(
        f"{label} prompt {row['prompt_seconds']:.3f} s, {gib['prompt_peak_bytes']:.2f} GiB; "
        f"{row['tokens_per_second']:.1f} tokens/s, step {row['step_seconds'] * 1e3:.2f} ms, "
        f"slowest {row['slowest_step_seconds'] * 1e3:.0f} ms, {gib['peak_bytes']:.2f} GiB; "
        f"first use {row.get('first_use_seconds', 0):.1f} s, "
        f"first steps {row['warm_up_seconds']:.1f} s",
        *(str(row[k]) for k in ("spec", "kernel", "mode", "reason", "captured") if k in row),
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--spec", nargs="*", default=["nuq3-1%-sink1"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--contexts", type=int, nargs="*", default=[4096, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="*", default=[1])
    ways = (*STOCK, *PACKED)
    parser.add_argument("--ways", nargs="*", choices=ways, default=["dynamic", "eager", "graph"])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--stock-steps", type=int, help="of transformers' caches; default: --steps")
    parser.add_argument("--fill", action="store_true", help="synthetic states, no prompt")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens filled at once")
    parser.add_argument("--prefill-chunk", type=int, help="tokens of a prompt that a call reads")
    parser.add_argument("--largest", action="store_true", help="the largest of --batches that fits")
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
