"""Hold a million tokens on one GPU, decode from them, and check the attention.

    python benchmarks/million_tokens.py --output benchmarks/results/million-tokens-h200.json

A Llama of the 7B shape with random weights, and a cache that is filled through the pack kernels,
piece by piece, with normal keys and values, every 32nd key channel four times as wide. Then steps
from a CUDA graph, and attention of sampled heads against float64 over the same codes. What was
allocated stands beside what the planner says. One JSON object; exit code 1 where attention is
further from float64 than the bound.
"""

from __future__ import annotations

import os

# Buffers of gigabytes grow here: without this what they leave behind is not used again.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import argparse
import json
import statistics
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from bench_quality import commit, machine
from random_llama import SHAPES, bundle_of, fill, random_llama
from torch import Tensor

from kvqtool.attach import attach
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.decode import Decoder
from kvqtool.files import atomic_output
from kvqtool.fused import ExactTokens, LayerTables, PackedContext
from kvqtool.layer import KvqLayer
from kvqtool.memory import expected_outliers, layer_buffers
from kvqtool.paged import PagedStore
from kvqtool.reader import PageReader
from kvqtool.reading import decode_pages
from kvqtool.sampling import Sampling
from kvqtool.seam import Seam
from kvqtool.usage import kernel_of

BOUND: Final = 2e-3  # of float64, relative to the greatest value
WARM_UP: Final = 4


@torch.no_grad()
def main() -> None:
    """Fill, decode, check, print."""
    options = _options()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model, seam = random_llama(options.shape, dtype, device, options.layers)
    bundle = bundle_of(model, seam, options.spec)
    with attach(model, bundle, seam=seam, read_path=options.read_path) as session:
        cache, started = session.new_cache(bundle), _now(device)
        fill(cache, seam, (1, options.tokens), options.chunk, model.lm_head.weight)
        record: dict[str, Any] = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "commit": options.commit or commit(),
            "date": time.strftime("%Y-%m-%d"),
            "shape": options.shape,
            "layers": len(seam.packed),
            "spec": options.spec,
            "dtype": options.dtype,
            "tokens": options.tokens,
            "fill_seconds": _now(device) - started,
            "fill_peak_bytes": _peak(device),
        }
        _print(record)
        logits = torch.zeros(1, model.config.vocab_size, device=device)
        sampling, seconds = Sampling(max_new_tokens=options.steps + 1), []
        decoder = Decoder(model, cache, sampling)
        with closing(decoder.tokens(logits)) as tokens:
            next(tokens)
            before = time.perf_counter()
            for _ in tokens:
                seconds.append(time.perf_counter() - before)
                before = time.perf_counter()
        timed = seconds[WARM_UP:] or seconds
        record |= {
            "steps": len(seconds),
            "tokens_per_second": len(timed) / sum(timed),
            "step_seconds": statistics.median(timed),
            "decode": decoder.report.as_json(),
            "kernel": kernel_of(cache),
            "cache_bytes": cache.nbytes,
            "planned_cache_bytes": planned(bundle, seam, cache.get_seq_length(), options.dtype),
            "fp16_cache_bytes": sum(4 * s.geometry.key_channels for s in seam.packed)
            * cache.get_seq_length(),
            "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "peak_bytes": _peak(device),
        }
        _print(record)
        worst = [check(cache, layer, options.heads) for layer in _sampled(len(seam.packed))]
        record |= {"attention_checked": worst, "bound": BOUND}
    if options.output:
        with atomic_output(options.output, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))
    sys.exit(int(any(row["relative_error"] > BOUND for row in worst)))


def planned(bundle: Bundle, seam: Seam, tokens: int, dtype: str) -> int:
    """Return what the planner says a cache takes: rows of the layout that is saved."""
    total = 0
    for layer in seam.packed:
        spec = bundle.spec_of(layer.index)
        outliers = expected_outliers(spec, layer.geometry, tokens - spec.sink_tokens)
        buffers = layer_buffers(spec, layer.geometry, 1, tokens, outliers, dtype)
        total += sum(buffer.nbytes for buffer in buffers.values())
    return total


def check(cache: KvqCache, number: int, heads: int) -> dict[str, Any]:
    """Attend with a random query to one layer; compare sampled heads with float64."""
    layer = cache.layers[number]
    assert isinstance(layer, KvqLayer) and isinstance(layer.store, PagedStore)
    assert layer.reader is not None
    position = None if layer.angles is None else layer.angles.first
    context = layer.store.context(layer.read_angles, position, 0)
    key = context.exact.sink_key
    random = torch.Generator(key.device).manual_seed(number)
    shape, dim = (1, key.shape[1], 1, key.shape[3]), key.shape[3]
    query = torch.empty(shape, device=key.device).normal_(generator=random).to(key.dtype)
    found = layer.reader.attend(query, context, dim**-0.5, None)[0, 0]
    error = 0.0
    chosen = torch.linspace(0, key.shape[1] - 1, heads).long().tolist()
    for head in chosen:
        exact = _attend_exactly(layer.reader, context, head, query[0, head, 0].double())
        apart = (found[head].double() - exact).abs().max() / exact.abs().max()
        error = max(error, float(apart))
    return {"layer": number, "heads": chosen, "relative_error": error}


def _attend_exactly(reader: PageReader, context: PackedContext, head: int, query: Tensor) -> Tensor:
    """Return one head's attention over its own codes, softmax and sums in float64."""
    only = slice(head, head + 1)
    pages = context.pages
    # Lists of outliers are found by where they start, so that one head's are a slice.
    pages = replace(
        pages,
        slabs=pages.slabs[:, only].contiguous(),
        outlier_index=pages.outlier_index[:, only].contiguous(),
    )
    exact = ExactTokens(*(part[:, only] for part in vars(context.exact).values()))
    tables: LayerTables = reader.tables_on(query.device)
    own = replace(tables, key_table=tables.key_table[only])
    variant = reader.variant(context.pages.slabs.shape[1], context.exact.sink_key)
    keys, values = decode_pages(PackedContext(pages, exact, context.state), own, variant)
    first, last = int(context.state[0, 4]), int(context.state[0, 0])
    keys = torch.cat([exact.sink_key[0, 0], keys[0, 0, first:last], exact.window_key[0, 0]])
    values = torch.cat([exact.sink_value[0, 0], values[0, 0, first:last], exact.window_value[0, 0]])
    weights = (keys.double() @ query * len(query) ** -0.5).softmax(0)
    return weights @ values.double()


def _sampled(layers: int) -> list[int]:
    return sorted({0, layers // 2, layers - 1})


def _print(record: dict[str, Any]) -> None:
    print(json.dumps({k: v for k, v in record.items() if k != "command"}), file=sys.stderr)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, for a trial")
    parser.add_argument("--spec", default="nuq3-1%-sink1")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--read-path", default="auto")
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--chunk", type=int, default=16384, help="tokens packed at once")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2, help="heads checked in each of 3 layers")
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
