"""The arithmetic of a plan: every term in bytes, and how it came about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvqtool.layers import CacheLayer
from kvqtool.load import FRAGMENTATION, Load
from kvqtool.memory import ITEM_BYTES, part_buffers


@dataclass(frozen=True)
class Term:
    """One line: what, its bytes, and the calculation in words."""

    term: str
    nbytes: int
    how: str


def explain(load: Load, context: int) -> list[Term]:
    """Return the terms of the fullest GPU: cache, peak, margins, and their sum."""
    batch, tokens = load.work.batch, load.held(context) + load.work.new_tokens
    stage = load.fullest(context, batch)
    cached = load.forward(stage, batch).cache
    lines = []
    for layer, count in cached.counted.items():
        lines += list(_layer_terms(load, layer, count, tokens))
    for angles in cached.angles:
        kind = "float32 cosines and sines" if angles.is_table(tokens) else "int32 positions"
        lines.append(Term("angles", angles.nbytes(batch, tokens), f"{kind}, once a rope group"))
    lines.append(Term("cache", sum(line.nbytes for line in lines), "the sum of the lines above"))
    peak = load.peak(stage, context, batch)
    call = load.call(stage, context, batch)
    source = load.shape.weights.source if load.shape.weights else "unknown"
    lines += [
        Term("weights", peak.weights, f"from {source}, in {load.work.dtype}"),
        Term("activations", peak.activations, f"{call}, at its highest point, {peak.phase}"),
        Term("scratch", peak.scratch, f"one layer's, while it does {peak.phase}"),
        Term("peak", peak.nbytes, f"weights + {peak.cache:,} of cache + activations + scratch"),
    ]
    extras = load.extras(stage, peak.nbytes)
    how = {
        "codebooks": "levels and ranges of every packed layer, float32",
        "workspace": "cuBLAS",
        "fragmentation": f"{100 * FRAGMENTATION:g}% of the peak",
        "reserve": "the GPU's context; --reserve",
    }
    lines += [Term(name, size, how[name]) for name, size in extras.items()]
    total = load.total(stage, context, batch)
    return [*lines, Term("total", total, "peak + codebooks + workspace + fragmentation + reserve")]


def _layer_terms(load: Load, layer: CacheLayer, count: int, tokens: int) -> Iterator[Term]:
    """Yield the buffers of all layers that are alike."""
    batch, dtype = load.work.batch, load.work.dtype
    label = f"{count} {layer.kind} layers" + (f" of window {layer.window}" if layer.window else "")
    if not layer.is_packed:
        for name, size in layer.own_bytes(batch, tokens, dtype).items():
            yield Term(name, count * size, f"{label} x {size:,} B, the model's own cache")
        if layer.kind in ("shared", "none"):
            yield Term("nothing", 0, f"{label}: no cache of their own")
        return
    spec = layer.own_spec or load.spec
    parts = layer.parts(spec, tokens)
    outliers = layer.outliers(spec, parts[1] * batch, bound=False)
    for name, buffer in part_buffers(spec, layer.geometry, batch, parts, outliers, dtype).items():
        if buffer.nbytes:
            shape = " x ".join(f"{size:,}" for size in buffer.shape)
            item = ITEM_BYTES[buffer.dtype]
            yield Term(name, count * buffer.nbytes, f"{label} x {shape} {buffer.dtype} of {item} B")
