"""Time generation end to end: prompt, steps and peak memory of every way to hold the cache.

    python benchmarks/bench_generate.py --output benchmarks/results/generate-h200.json

A model of random weights reads a prompt and generates on greedily, one way after the other in one
process, each step timed on the host from token to token:

- `dynamic`: transformers' DynamicCache with sdpa, step by step: what `generate` does by default.
- `static`: StaticCache and torch.compile(mode="reduce-overhead"), transformers' fastest; only where
  asked for, since compiling takes a minute.
- `eager`, `graph`: this package's cache, step by step and from a CUDA graph.

`--fill` puts synthetic states into the cache in place of a prompt; `--largest` looks for the
largest batch that fits. One JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import torch
from bench_quality import commit, machine
from random_llama import SHAPES, bundle_of, fill, random_llama
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from kvqtool.attach import attach
from kvqtool.decode import Decoder
from kvqtool.files import atomic_output
from kvqtool.forward import read_prompt
from kvqtool.sampling import Sampling
from kvqtool.seam import Seam
from kvqtool.usage import kernel_of

WARM_UP: Final = 8  # steps left out: compiling and capturing
BASELINE: Final = "dynamic"


class Bench:
    """One model, and everything that is timed on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Make the model."""
        self.options = options
        self.device = torch.device(options.device)
        dtype = getattr(torch, options.dtype)
        made: tuple[PreTrainedModel, Seam] = random_llama(options.shape, dtype, self.device)
        self.model, self.seam = made
        self.bundle = bundle_of(*made, options.spec)
        self.like = self.model.lm_head.weight

    def row(self, way: str, batch: int, context: int) -> dict[str, Any]:
        """Time one way; a batch that does not fit gives a row that says so."""
        self._clean()
        row: dict[str, Any] = {"way": way, "batch": batch, "context_tokens": context}
        try:
            with torch.no_grad():
                row |= self._ways()[way](batch, context)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        self._clean()
        return row

    def _ways(self) -> dict[str, Callable[[int, int], dict[str, Any]]]:
        return {
            "dynamic": self._dynamic,
            "static": self._static,
            "eager": lambda batch, context: self._packed(batch, context, "eager"),
            "graph": lambda batch, context: self._packed(batch, context, "graph"),
        }

    def _dynamic(self, batch: int, context: int) -> dict[str, Any]:
        cache = DynamicCache(config=self.model.config)
        return self._stock(cache, self.model, batch, context)

    def _static(self, batch: int, context: int) -> dict[str, Any]:
        room = context + WARM_UP + self.options.steps + 1
        cache = StaticCache(config=self.model.config, max_cache_len=room)
        compiled = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)
        return self._stock(cache, compiled, batch, context)

    def _stock(self, cache: Any, step: Any, batch: int, context: int) -> dict[str, Any]:
        before = self._now()
        if self.options.fill:
            self._fill_stock(cache, batch, context)
            token = self._ids(batch, 1)
        else:
            token = self._read_stock(cache, self._ids(batch, context))
        prompt = self._prompt(before)
        seconds, started = [], self._now()
        for number in range(WARM_UP + self.options.steps):
            inputs = {"input_ids": token, "past_key_values": cache, "use_cache": True}
            if step is not self.model:
                inputs["position_ids"] = torch.full_like(token, context + number)
            token = step(**inputs).logits[:, -1].argmax(-1)[:, None]
            token.tolist()
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            if step is not self.model:
                token = token.clone()
        held = 2 * 2 * batch * (context + len(seconds)) * self._elements()
        return prompt | self._steps(seconds, batch) | {"cache_bytes": held}

    def _packed(self, batch: int, context: int, mode: str) -> dict[str, Any]:
        sampling = Sampling(max_new_tokens=1 + WARM_UP + self.options.steps)
        with attach(self.model, self.bundle, seam=self.seam) as session:
            cache, before = session.new_cache(self.bundle), self._now()
            if self.options.fill:
                fill(cache, self.seam, (batch, context), self.options.chunk, self.like)
                logits = torch.zeros(batch, self.model.config.vocab_size, device=self.device)
            else:
                ids, chunk = self._ids(batch, context), self.options.prefill_chunk
                logits = read_prompt(self.model, ids, cache, chunk)
            prompt = self._prompt(before)
            decoder, seconds = Decoder(self.model, cache, sampling, mode), []
            with closing(decoder.tokens(logits)) as tokens:
                next(tokens)
                started = time.perf_counter()
                for _ in tokens:
                    seconds.append(time.perf_counter() - started)
                    started = time.perf_counter()
            report = {"cache_bytes": cache.nbytes, "kernel": kernel_of(cache)}
            return prompt | self._steps(seconds, batch) | report | vars(decoder.report)

    def _read_stock(self, cache: Any, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token: Tensor = out.logits[:, -1].argmax(-1)[:, None]
        return token

    def _fill_stock(self, cache: Any, batch: int, context: int) -> None:
        shape = self.seam.packed[0].geometry
        size = batch, shape.num_kv_heads, context, shape.key_dim
        for layer in range(len(self.seam.packed)):
            key, value = (
                torch.empty(size, dtype=self.like.dtype, device=self.device).normal_()
                for _ in range(2)
            )
            cache.update(key, value, layer)

    def _ids(self, batch: int, tokens: int) -> Tensor:
        random = torch.Generator().manual_seed(1)
        size = (batch, tokens)
        ids = torch.randint(self.model.config.vocab_size, size, generator=random)
        return ids.to(self.device)

    def _elements(self) -> int:
        """Return keys of one token in all layers; values are as many."""
        return sum(s.geometry.num_kv_heads * s.geometry.key_dim for s in self.seam.packed)

    def _prompt(self, before: float) -> dict[str, Any]:
        found = {"prompt_seconds": self._now() - before, "prompt_peak_bytes": self._peak()}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return found

    def _steps(self, seconds: list[float], batch: int) -> dict[str, Any]:
        timed = seconds[WARM_UP:]
        return {
            "tokens_per_second": batch * len(timed) / sum(timed),
            "step_seconds": statistics.median(timed),
            "slowest_step_seconds": max(timed),
            "peak_bytes": self._peak(),
            "device_bytes": self._device_bytes(),
        }

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def _device_bytes(self) -> int | None:
        """Return the bytes that the device itself says are taken."""
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info()
        return total - free

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def largest(bench: Bench, way: str, context: int, batches: list[int]) -> dict[str, Any]:
    """Return the row of the largest of `batches` that fits; the larger ones are tried first."""
    row: dict[str, Any] = {}
    for batch in sorted(batches, reverse=True):
        row = bench.row(way, batch, context)
        _print(row)
        if "error" not in row:
            break
    return row | {"largest": True}


def main() -> None:
    """Time and print."""
    options = _options()
    bench, rows = Bench(options), []
    for context in options.contexts:
        if options.largest:
            for way in options.ways:
                rows.append(largest(bench, way, context, options.batches))
                _save(options, rows)
            continue
        for batch in options.batches:
            for way in options.ways:
                rows.append(bench.row(way, batch, context))
                _print(rows[-1])
                _save(options, rows)
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
        "spec": options.spec,
        "filled": options.fill,
        "rows": rows,
    }
    if options.output:
        with atomic_output(options.output, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _speedup(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Return tokens a second over the stock cache's at the same context, and batch or largest."""
    same = ("context_tokens", "largest" if row.get("largest") else "batch")
    rate = "tokens_per_second"
    for other in rows:
        is_base = other["way"] == BASELINE and all(other.get(k) == row.get(k) for k in same)
        if is_base and rate in row and rate in other:
            return float(row[rate] / other[rate])
    return None


def _print(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['way']:8} {row['batch']:4} x {row['context_tokens']:7}: {row['error']}")
        return
    gib = {name: (row[name] or 0) / 2**30 for name in ("prompt_peak_bytes", "peak_bytes")}
    print(
        f"{row['way']:8} {row['batch']:4} x {row['context_tokens']:7}: "
        f"prompt {row['prompt_seconds']:.2f} s, {gib['prompt_peak_bytes']:.1f} GiB; "
        f"{row['tokens_per_second']:.1f} tokens/s, step {row['step_seconds'] * 1e3:.2f} ms, "
        f"slowest {row['slowest_step_seconds'] * 1e3:.0f} ms, {gib['peak_bytes']:.1f} GiB",
        *(str(row[k]) for k in ("kernel", "mode", "reason", "captured") if k in row),
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--spec", default="nuq3-1%-sink1")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--contexts", type=int, nargs="*", default=[4096, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="*", default=[1])
    parser.add_argument("--ways", nargs="*", default=["dynamic", "eager", "graph"])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--fill", action="store_true", help="synthetic states, no prompt")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens filled at once")
    parser.add_argument("--prefill-chunk", type=int, help="tokens of a prompt that a call reads")
    parser.add_argument("--largest", action="store_true", help="the largest of --batches that fits")
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
