"""What a compressed cache holds and how: figures measured on its tensors, and a row per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from kvqtool.accounting import paper_bits, paper_bytes
from kvqtool.adaptive_layer import AdaptiveLayer
from kvqtool.adaptive_store import AdaptiveStore
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache, is_rotated
from kvqtool.layer import KvqLayer
from kvqtool.packed import PackedBody
from kvqtool.seam import LayerSeam, Seam
from kvqtool.side import WIDTHS
from kvqtool.spec import SIDES
from kvqtool.store import LayerStore

# What a call that read a layer one way ran, on CUDA and elsewhere; "materialise" is torch decoding
# the whole layer for stock attention.
_KERNELS: Final = {
    "fused": ("cuda (fused)", "torch (fused reference)"),
    "dequantize": ("cuda (dequantize)", "torch (dequantize reference)"),
    "materialise": ("torch (materialise)", "torch (materialise)"),
}


@dataclass(frozen=True)
class CacheUsage:
    """What a cache holds, measured on its tensors.

    Args:
        tokens: tokens of each sequence.
        batch: sequences.
        cache_bytes: bytes of every tensor the packed layers have allocated, angles included.
        cache_bytes_fp16: bytes of what stock layers would hold at this point in 16-bit floats.
        paper_bytes: bytes by KVQuant's accounting.
        effective_bits: 8 * cache_bytes over the elements held.
        outliers: elements stored exactly beside the codes.
        quantized_share: share of tokens that are stored as codes.
    """

    tokens: int
    batch: int
    cache_bytes: int
    cache_bytes_fp16: int
    paper_bytes: float
    effective_bits: float
    outliers: int
    quantized_share: float


def measure(cache: KvqCache) -> CacheUsage:
    """Measure what a cache holds now."""
    stores = [store for store in cache.stores if not store.is_empty]
    tokens, batch = stores[0].tokens, stores[0].batch
    held = [(store.tokens - store.dropped, store.geometry.elements) for store in stores]
    seen = [(min(tokens, (store.sliding_window or tokens + 1) - 1), store) for store in stores]
    elements = batch * sum(count * width for count, width in held)
    packed = sum(store.bodies[0].tokens for store in stores)
    is_fp = cache.bundle.spec.key.method == "fp"
    return CacheUsage(
        tokens=tokens,
        batch=batch,
        cache_bytes=cache.nbytes,
        cache_bytes_fp16=2 * batch * sum(count * s.geometry.elements for count, s in seen),
        paper_bytes=sum(_paper_bytes(store, batch, count) for count, store in seen),
        effective_bits=8 * cache.nbytes / elements,
        outliers=sum(body.outliers for store in stores for body in store.bodies),
        quantized_share=0.0 if is_fp else packed / sum(count for count, _ in held),
    )


def _paper_bytes(store: LayerStore, batch: int, tokens: int) -> float:
    """Return a layer's bytes by KVQuant's accounting, at the bits its tokens have."""
    if not isinstance(store, AdaptiveStore):
        return paper_bytes(store.spec, (store.geometry,), batch, tokens)
    sides = zip((store.spec.key, store.spec.value), store.bodies, strict=True)
    return sum(
        paper_bits(spec, body.channels, mean_bits(body)) * body.channels * body.units
        for spec, body in sides
    ) * (batch * tokens / 8)


def mean_bits(body: PackedBody) -> float:
    """Return the bits of a packed side's codes: the spec's, or the mean of its rows' own."""
    rows = sum(body.widths)
    if not body.spec.is_adaptive or not rows:
        return body.spec.bits
    return sum(bits * count for bits, count in zip(WIDTHS, body.widths, strict=True)) / rows


def describe_layers(seam: Seam, bundle: Bundle) -> list[dict[str, Any]]:
    """Return one row per layer: what it is, how its keys rotate, how it is stored and read."""
    return [_layer_row(bundle, layer) for layer in seam.layers]


def layer_report(cache: KvqCache) -> list[dict[str, Any]]:
    """Return the rows of `describe_layers`, each with how angles are kept and the layer's bytes."""
    rows = describe_layers(cache.seam, cache.bundle)
    for row, layer in zip(rows, cache.seam.layers, strict=True):
        rotated = layer.is_packed and is_rotated(layer, cache.bundle)
        row["angles"] = cache.angles[layer.group].kind if rotated else None
        row["cache_bytes"] = _layer_bytes(cache, layer)
        row |= _read_path(cache, layer) | _widths(cache, layer)
    return rows


def kernel_of(cache: KvqCache) -> str:
    """Return what has read the packed layers so far, with the number of layers where not all were
    read alike.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, KvqLayer)]
    found = []
    for way, names in _KERNELS.items():
        readers = [layer for layer in layers if layer.path.calls[way]]
        if readers:
            name = names[0 if readers[0].store.window[0].is_cuda else 1]
            found.append(
                name if len(readers) == len(layers) else f"{name} in {len(readers)} layers"
            )
    return ", ".join(found) or "none: nothing packed was read"


def _layer_row(bundle: Bundle, layer: LayerSeam) -> dict[str, Any]:
    spec, packed = bundle.spec_of(layer.index), layer.is_packed
    rotated = packed and is_rotated(layer, bundle)
    axis = "channel" if spec.key.per_channel else "group" if spec.key.group_size else "token"
    kind = "stock" if not packed else "sliding" if layer.window else "full"
    return {
        "layer": layer.index,
        "kind": kind,
        "window": layer.window,
        "rope": layer.note,
        "key_storage": _key_form(layer, rotated) if packed else None,
        "key_axis": axis if packed and spec.key.method != "fp" else None,
        "key_bits": spec.key.bits if packed and not spec.adaptive else None,
        "value_bits": spec.value.bits if packed and not spec.adaptive else None,
    }


def _read_path(cache: KvqCache, layer: LayerSeam) -> dict[str, Any]:
    """Return how a layer is read by one token, why, and how many calls read it which way."""
    held = cache.layers[layer.index]
    if not isinstance(held, KvqLayer):
        return {"read_path": "stock", "read_reason": layer.note, "read_calls": None}
    kind = "mixed" if held.store.spec.has_window else "materialise"
    return {
        "read_path": "fused" if held.path.is_fused else kind,
        "read_reason": held.path.reason,
        "read_calls": dict(held.path.calls),
    }


def _widths(cache: KvqCache, layer: LayerSeam) -> dict[str, Any]:
    """Return the bits that a layer's tokens have come to; nothing where the spec fixes them."""
    held = cache.layers[layer.index]
    if not isinstance(held, AdaptiveLayer) or held.store.is_empty:
        return {}
    found: dict[str, Any] = {}
    for side, body in zip(SIDES, held.store.bodies, strict=True):
        found[f"{side}_bits"] = mean_bits(body) if body.tokens else None
        found[f"{side}_widths"] = list(body.widths)
    if held.store.shadow is not None:
        found["shadow_bytes"] = held.store.shadow.nbytes
    return found


def _key_form(layer: LayerSeam, rotated: bool) -> str:
    if rotated:
        return "pre-RoPE"
    return "post-RoPE" if layer.rotation is not None else "as given"


def _layer_bytes(cache: KvqCache, layer: LayerSeam) -> int:
    """Return the bytes of one layer's tensors, a stock layer's keys, values and states included."""
    held = cache.layers[layer.index]
    if isinstance(held, KvqLayer):
        tensors = [tensor for group in held.store.tensors.values() for tensor in group]
    else:
        parts = [
            part if isinstance(part, (list, tuple)) else [part] for part in vars(held).values()
        ]
        tensors = [part for group in parts for part in group if isinstance(part, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
