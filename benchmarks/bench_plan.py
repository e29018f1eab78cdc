r"""The planner's totals against what torch allocates: one table of shapes, specs and lengths.

    python benchmarks/bench_plan.py --device cuda --output benchmarks/results/plan-llama-h100.json
    python benchmarks/bench_plan.py --device cpu --tiny

Each point builds a Llama of random weights with the shapes of a real model, reads a prompt in
chunks into a compressed cache, generates one token, and compares the highest number of bytes
allocated with the plan made from the config alone. Every predicted term is printed beside what was
measured, so that an error can be attributed. On a GPU the count is `max_memory_allocated`; on a CPU
the tensors that operations return are traced, and the peaks of small models mean little.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from bench_quality import commit, machine
from transformers import LlamaConfig, PreTrainedModel

from kvqtool.architectures import cache_layers
from kvqtool.config import parse_config
from kvqtool.files import atomic_output, check_output
from kvqtool.load import Load, Workload
from kvqtool.measure import random_model, run_forward
from kvqtool.parameters import estimated_weights
from kvqtool.probe import probe
from kvqtool.seam import Seam
from kvqtool.shape import ModelShape
from kvqtool.spec import parse_spec
from kvqtool.synthetic import synthetic_bundle
from kvqtool.trunk import read_trunk


class Shape(NamedTuple):
    """Widths of a real model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool


SHAPES: Final = {
    "smollm2-1.7b": Shape(2048, 8192, 32, 32, 64, 49152, is_tied=True),
    "llama-3.2-1b": Shape(2048, 8192, 32, 8, 64, 128256, is_tied=True),
    "qwen2.5-0.5b": Shape(896, 4864, 14, 2, 64, 151936, is_tied=True),
    "llama-3.1-8b": Shape(4096, 14336, 32, 8, 128, 128256, is_tied=False),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 128, 32000, is_tied=False),
}


@dataclass(frozen=True)
class Point:
    """One measurement: a shape, how many of its layers, a spec, and how it is filled."""

    shape: str
    layers: int
    spec: str
    context: int
    batch: int
    chunk: int
    dtype: str = "bfloat16"


POINTS: Final = (
    Point("smollm2-1.7b", 24, "fp", 32768, 1, 4096),
    Point("smollm2-1.7b", 24, "int8-g64", 16384, 4, 2048),
    Point("smollm2-1.7b", 24, "nuq4-1%-sink1", 16384, 4, 2048),
    Point("smollm2-1.7b", 24, "nuq3-1%-sink1", 16384, 8, 1024),
    Point("smollm2-1.7b", 24, "nuq2-1%-sink1", 4096, 2, 4096),
    Point("llama-3.2-1b", 16, "int8-g64", 16384, 8, 1024),
    Point("llama-3.2-1b", 16, "nuq8-1%-sink1", 8192, 16, 512),
    Point("llama-3.2-1b", 16, "int4-g64-sink4-r128", 4096, 4, 256),
    Point("llama-3.2-1b", 16, "fp", 16384, 8, 1024, "float16"),
    Point("qwen2.5-0.5b", 24, "nuq4-1%-cap4", 16384, 32, 256),
    Point("llama-3.1-8b", 32, "int8-g128", 8192, 16, 512),
    Point("llama-3.1-8b", 8, "int3-g64", 32768, 4, 1024),
    Point("llama-2-7b", 32, "nuq4-1%-sink1", 16384, 4, 1024),
    Point("llama-2-7b", 8, "nf4-1%-pertoken", 30000, 2, 2048),
)


# Figures of a record, and what `run_forward` calls them.
_FIGURES: Final = {
    "weights": "weights",
    "cache": "packed cache, outliers as expected",
    "idle": "beside weights and cache",
    "prefill_peak": "prefill peak",
    "decode_peak": "decode peak",
}


def main() -> None:
    """Measure every point, print the table and save it."""
    options = _options()
    if options.output:
        check_output(options.output, options.force)
    device = torch.device(options.device)
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("error: a CPU is for a smoke test; add --tiny, or use --device cuda")
    points = [_tiny(point) for point in POINTS] if options.tiny else list(POINTS)
    points = [point for i, point in enumerate(points) if not options.point or i in options.point]
    started, rows, model, last = time.perf_counter(), [], None, None
    for point in points:
        key = (point.shape, point.layers, point.dtype)
        if key != last:
            model = None  # before the next one is made
            model, last = _build(point, device, tiny=options.tiny), key
        rows.append(_measure(point, *model))
        _print_row(rows[-1])
    errors = [abs(row["error"]) for row in rows]
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": options.commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": time.perf_counter() - started,
        "points": len(rows),
        "points_with_30_percent_cache": sum(row["cache_share"] >= 0.3 for row in rows),
        "largest_error": max(errors),
        "rows": rows,
    }
    if options.output:
        with atomic_output(options.output, force=True) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    kept = ("points", "points_with_30_percent_cache", "largest_error", "seconds")
    print(json.dumps({name: record[name] for name in kept}))


def _tiny(point: Point) -> Point:
    """Shrink a point to what a CPU does in a second, with all its kinds kept."""
    return replace(point, layers=4, context=600, batch=min(point.batch, 2), chunk=256)


def _config(point: Point, tiny: bool) -> LlamaConfig:
    shape = SHAPES[point.shape]
    shrink = 8 if tiny else 1
    kv_heads = max(shape.kv_heads // shrink, 1)
    return LlamaConfig(
        hidden_size=shape.hidden // shrink,
        intermediate_size=shape.intermediate // shrink,
        num_hidden_layers=point.layers,
        num_attention_heads=kv_heads * shape.heads // shape.kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=shape.head_dim,
        vocab_size=512 if tiny else shape.vocabulary,
        max_position_embeddings=131072,
        tie_word_embeddings=shape.is_tied,
        dtype=point.dtype,
    )


def _build(point: Point, device: torch.device, *, tiny: bool) -> tuple[PreTrainedModel, Seam]:
    """Return a random model on its device, and what the probe finds of it."""
    torch.manual_seed(0)
    model = random_model(_load(point, _config(point, tiny)), device)
    return model, probe(model)


def _measure(point: Point, model: PreTrainedModel, seam: Seam) -> dict[str, Any]:
    """Fill a cache, take one step, and set the bytes beside the planned ones."""
    spec = parse_spec(point.spec)
    layers = {layer.index: layer.geometry for layer in seam.packed}
    spreads = {
        index: model.model.layers[index].self_attn.k_proj.weight.detach().float().norm(dim=1)
        for index in layers
    }
    started = time.perf_counter()
    load = _load(point, model.config)
    bundle = synthetic_bundle(spec, layers, spreads)
    found = run_forward(load, point.context, (model, seam), bundle)
    by_name = {row.name: row for row in found}
    peaks = [by_name["prefill peak"], by_name["decode peak"]]
    planned = max(row.planned_bytes for row in peaks)
    measured = max(row.measured_bytes for row in peaks)
    forward = load.forward(0, point.batch)
    return {
        "point": asdict(point),
        "measured": {key: by_name[name].measured_bytes for key, name in _FIGURES.items()},
        "predicted": {key: by_name[name].planned_bytes for key, name in _FIGURES.items()}
        | {
            "cache_given_outliers": by_name["packed cache, outliers as found"].planned_bytes,
            "prefill": asdict(forward.prefill(point.context)),
            "decode": asdict(forward.decode(point.context, point.context + 1)),
        },
        "total_bytes": measured,
        "planned_bytes": planned,
        "error": planned / measured - 1,
        "cache_share": by_name["packed cache, outliers as found"].measured_bytes / measured,
        "seconds": time.perf_counter() - started,
    }


def _load(point: Point, llama: LlamaConfig) -> Load:
    """Plan the point from its config alone."""
    config = parse_config(llama.to_dict(), point.shape)
    layers = cache_layers(config)
    weights = estimated_weights(config, len(layers))
    shape = ModelShape(config, layers, read_trunk(config), weights)
    work = Workload(
        point.context, point.batch, dtype=point.dtype, prefill_chunk=point.chunk, reserve_bytes=0
    )
    return Load(shape, parse_spec(point.spec), work)


def _print_row(row: dict[str, Any]) -> None:
    point = row["point"]
    print(
        f"{point['shape']} x{point['layers']} {point['spec']} T={point['context']} "
        f"B={point['batch']} chunk={point['chunk']}: {row['planned_bytes'] / 2**30:.3f} GiB "
        f"planned, {row['total_bytes'] / 2**30:.3f} measured, {100 * row['error']:+.2f} %, "
        f"cache {100 * row['cache_share']:.0f} %, {row['seconds']:.1f} s"
    )
    predicted = row["predicted"]
    for name, measured in row["measured"].items():
        print(f"    {name}: {predicted[name]} planned, {measured} measured")
    print(f"    cache, outliers as found: {predicted['cache_given_outliers']} planned")
    for call in ("prefill", "decode"):
        terms = dict(predicted[call])
        phase = terms.pop("phase")
        listed = ", ".join(f"{name} {size}" for name, size in terms.items())
        print(f"    planned {call}: {listed}; at {phase}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=found)
    parser.add_argument("--tiny", action="store_true", help="small models: does it run at all")
    parser.add_argument("--point", type=int, action="append", help="only this one; repeatable")
    parser.add_argument("--commit", help="for checkouts without git")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
