"""Saved caches: a document's compressed cache as a file, with all that is needed to go on from it.

The file carries its bundle, the token ids, the logits after the last token, and every layer's
sinks, packed rows and window in the canonical layout, so a model and this file continue where the
document ended.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvqtool.attach import Session, attach
from kvqtool.bundle import SIDES, Bundle
from kvqtool.cache import KvqCache
from kvqtool.container import load_container, save_container
from kvqtool.data import Text
from kvqtool.errors import BundleError, InputError
from kvqtool.forward import next_logits
from kvqtool.memory import (
    LayerGeometry,
    body_buffers,
    dropped_tokens,
    outliers_per_tail,
    split_tokens,
)
from kvqtool.models import LoadedModel
from kvqtool.rope import AngleStore
from kvqtool.spec import QuantSpec
from kvqtool.store import LayerStore
from kvqtool.usage import KERNEL, layer_report, measure

KIND: Final = "kvqtool-cache"
VERSION: Final = 1

_PARTS: Final = ("sink", "window")


@dataclass(frozen=True)
class CacheReport:
    """What `kvqtool quantize-cache` reports; every field is documented in docs/json.md."""

    path: str
    spec: str
    tokens: int
    cache_bytes: int
    cache_bytes_fp16: int
    paper_bytes: float
    bundle_bytes: int
    file_bytes: int
    effective_bits: float
    compression: float
    outliers: int
    prefill: str
    device: str
    dtype: str
    kernel: str
    layers: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class SavedCache:
    """A saved cache as read from its file.

    Args:
        bundle: scheme, codebooks and model identity.
        tokens: tokens stored.
        prefill: how the document was read.
        token_ids: (tokens,) int64, or None for a cache made from states.
        next_logits: (vocabulary,) float32, or None likewise.
        tensors: layers and angles, by their names in the file.
        angle_kinds: `positions` or `table`, by angle group.
    """

    bundle: Bundle
    tokens: int
    prefill: str
    token_ids: Tensor | None
    next_logits: Tensor | None
    tensors: dict[str, Tensor]
    angle_kinds: dict[str, str]


@torch.no_grad()
def quantize_text(
    loaded: LoadedModel,
    bundle: Bundle,
    text: Text,
    path: str | Path,
    *,
    prefill: str = "exact",
    force: bool = False,
) -> CacheReport:
    """Read a document and write its compressed cache.

    Args:
        loaded: the model.
        bundle: scheme and codebooks.
        text: the document.
        path: the file to write.
        prefill: `exact` or `decode-exact`, see `Session.new_cache`.
        force: whether an existing file may be replaced.

    Raises:
        InputError: when the document is empty or longer than the model's context.
        BundleError: when the bundle belongs to another model.
    """
    started = time.perf_counter()
    bundle.check_model(loaded.identity.as_json())
    ids = torch.tensor(loaded.tokenizer(text.text, verbose=False)["input_ids"], dtype=torch.int64)
    room = loaded.identity.max_context
    if not 0 < len(ids) <= room:
        raise InputError(
            f"the document has {len(ids)} tokens, the model takes 1 to {room}; cut it to fit"
        )
    with attach(loaded.model, bundle, seam=loaded.seam) as session:
        cache = session.new_cache(bundle, prefill=prefill)
        logits = next_logits(loaded.model, ids[None].to(loaded.device), cache)[0]
    extra = {"token_ids": ids, "next_logits": logits}
    return _save(cache, loaded, extra, Path(path), force, started)


@torch.no_grad()
def quantize_states(
    loaded: LoadedModel,
    bundle: Bundle,
    states: str | Path,
    path: str | Path,
    *,
    force: bool = False,
) -> CacheReport:
    """Compress key and value states from a safetensors file.

    Args:
        loaded: the model they belong to.
        bundle: scheme and codebooks.
        states: file with `layers.{i}.key` and `layers.{i}.value`, each (1, num_kv_heads, tokens,
            head_dim), keys after RoPE at positions 0, 1, 2, ...
        path: the file to write.
        force: whether an existing file may be replaced.

    Raises:
        InputError: when a tensor is missing or has another shape.
    """
    started = time.perf_counter()
    bundle.check_model(loaded.identity.as_json())
    try:
        tensors = load_file(str(states))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"states file {states} cannot be read: {error}; write it with safetensors"
        ) from error
    with attach(loaded.model, bundle, seam=loaded.seam) as session:
        cache = session.new_cache(bundle)
        for layer in session.seam.packed:
            key, value = _states_of(tensors, layer.index, layer.geometry, loaded)
            if cache.stores[0].tokens not in (0, key.shape[2]):
                raise InputError(
                    f"layers.{layer.index} has {key.shape[2]} tokens, the layers before it "
                    f"{cache.stores[0].tokens}; give as many"
                )
            if layer.rotation is not None and cache.angles:
                if layer.formula is None:
                    raise InputError(
                        "this model's rotary angles are no function of position; use --text instead"
                    )
                positions = torch.arange(key.shape[2], device=loaded.device)[None]
                cache.announce(
                    layer.index,
                    *layer.rotation.model_tables(*layer.formula.tables(positions)),
                    positions,
                )
            cache.update(key, value, layer.index)
    return _save(cache, loaded, {}, Path(path), force, started)


def load_cache(path: str | Path) -> SavedCache:
    """Read a saved cache.

    Raises:
        BundleError: when the file is missing, damaged, or of another kind or version.
    """
    metadata, tensors = load_container(path, KIND, VERSION)
    books = {
        name.removeprefix("bundle."): t for name, t in tensors.items() if name.startswith("bundle.")
    }
    try:
        rows = {
            "token_ids": int(metadata["tokens"]),
            "next_logits": int(metadata["bundle"]["model"]["vocab_size"]),
        }
        for name, length in rows.items():
            if name in tensors and tuple(tensors[name].shape) != (length,):
                raise ValueError(f"{name} of shape {tuple(tensors[name].shape)}")
        return SavedCache(
            bundle=Bundle.from_parts(metadata["bundle"], books),
            tokens=int(metadata["tokens"]),
            prefill=str(metadata["prefill"]),
            token_ids=tensors.get("token_ids"),
            next_logits=tensors.get("next_logits"),
            tensors={
                name: t for name, t in tensors.items() if name.startswith(("layers.", "angles."))
            },
            angle_kinds=dict(metadata["angles"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"cache {path} lacks or garbles {error}; make it again") from error


def restore_cache(session: Session, saved: SavedCache, loaded: LoadedModel) -> KvqCache:
    """Return a live cache that holds what a file held.

    Raises:
        BundleError: when a tensor is missing or does not have the shape the spec and the model ask
            for.
    """
    cache = session.new_cache(saved.bundle, prefill=saved.prefill)
    for layer, store in zip(session.seam.packed, cache.stores, strict=True):
        _restore_layer(store, layer.geometry, saved, loaded)
    for group, angles in cache.angles.items():
        _restore_angles(angles, str(group), saved, loaded.device)
    return cache


def _save(
    cache: KvqCache,
    loaded: LoadedModel,
    extra: dict[str, Tensor],
    path: Path,
    force: bool,
    started: float,
) -> CacheReport:
    tensors = {f"bundle.{name}": tensor for name, tensor in cache.bundle.tensors().items()} | extra
    for store in cache.stores:
        tensors |= {
            f"layers.{store.layer}.{name}": tensor for name, tensor in store.canonical().items()
        }
    for group, angles in cache.angles.items():
        tensors[f"angles.{group}"] = angles.canonical()
    usage = measure(cache)
    metadata = {
        "bundle": cache.bundle.metadata(),
        "tokens": usage.tokens,
        "prefill": cache.prefill,
        "angles": {str(group): angles.kind for group, angles in cache.angles.items()},
    }
    save_container(path, KIND, VERSION, (metadata, tensors), force=force)
    return CacheReport(
        path=str(path),
        spec=str(cache.bundle.spec),
        tokens=usage.tokens,
        cache_bytes=usage.cache_bytes,
        cache_bytes_fp16=usage.cache_bytes_fp16,
        paper_bytes=usage.paper_bytes,
        bundle_bytes=cache.bundle.bundle_bytes,
        file_bytes=path.stat().st_size,
        effective_bits=usage.effective_bits,
        compression=usage.cache_bytes_fp16 / usage.cache_bytes,
        outliers=usage.outliers,
        prefill=cache.prefill,
        device=loaded.device.type,
        dtype=str(loaded.dtype).removeprefix("torch."),
        kernel=KERNEL,
        layers=layer_report(cache),
        seconds=time.perf_counter() - started,
    )


def _states_of(
    tensors: dict[str, Tensor], index: int, geometry: LayerGeometry, loaded: LoadedModel
) -> tuple[Tensor, Tensor]:
    states = []
    for side, width in zip(SIDES, (geometry.key_dim, geometry.value_dim), strict=True):
        tensor = tensors.get(f"layers.{index}.{side}")
        if tensor is None:
            raise InputError(
                f"states file has no layers.{index}.{side}; it has {sorted(tensors)[:4]}..."
            )
        heads = geometry.num_kv_heads
        if tensor.dim() != 4 or (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != (
            1,
            heads,
            width,
        ):
            raise InputError(
                f"layers.{index}.{side} has shape {tuple(tensor.shape)}, expected (1, {heads}, "
                f"T, {width})"
            )
        states.append(tensor.to(loaded.device, loaded.dtype))
    if states[0].shape[2] != states[1].shape[2] or not states[0].shape[2]:
        raise InputError(
            f"layers.{index} has {states[0].shape[2]} keys and {states[1].shape[2]} values; "
            "give as many"
        )
    return states[0], states[1]


def _restore_layer(
    store: LayerStore, geometry: LayerGeometry, saved: SavedCache, loaded: LoadedModel
) -> None:
    prefix, spec = f"layers.{store.layer}", saved.bundle.spec
    exact, widths = {}, (geometry.key_dim, geometry.value_dim)
    sink, _, window = split_tokens(spec, saved.tokens)
    for part, length in zip(_PARTS, (sink, window), strict=True):
        pair = [_take(saved, f"{prefix}.{part}.{side}") for side in SIDES]
        for tensor, width in zip(pair, widths, strict=True):
            shape = (1, geometry.num_kv_heads, length, width)
            if tuple(tensor.shape) != shape:
                raise BundleError(
                    f"saved cache holds {prefix}.{part} of shape {tuple(tensor.shape)}, "
                    f"expected {shape}; make it again"
                )
        exact[part] = (
            pair[0].to(loaded.device, loaded.dtype),
            pair[1].to(loaded.device, loaded.dtype),
        )
    dropped = dropped_tokens(spec, saved.tokens, store.sliding_window)
    body = saved.tokens - dropped - sum(pair[0].shape[2] for pair in exact.values())
    sides = zip(
        SIDES, (spec.key, spec.value), (geometry.key_channels, geometry.value_channels), strict=True
    )
    rows = [
        _rows_of(saved, f"{prefix}.{side}", quant, channels, body)
        for side, quant, channels in sides
    ]
    moved = [{name: tensor.to(loaded.device) for name, tensor in side.items()} for side in rows]
    store.restore(exact, (moved[0], moved[1]), saved.tokens)


def _rows_of(
    saved: SavedCache, prefix: str, spec: QuantSpec, channels: int, body: int
) -> dict[str, Tensor]:
    """Return one side's encoded rows, each buffer checked against the shape the memory table gives
    it.
    """
    if body <= 0:
        if body < 0:
            raise BundleError(
                f"saved cache claims {saved.tokens} tokens but holds more; make it again"
            )
        return {}
    names = body_buffers(spec, channels, 0, 0, "float32")
    rows = {name: _take(saved, f"{prefix}.{name}") for name in names}
    outliers = 2 * outliers_per_tail(spec, channels) * body
    if "outlier_counts" in rows:
        outliers = int(rows["outlier_counts"].long().sum())
    for name, buffer in body_buffers(spec, channels, body, outliers, "float32").items():
        dtype_fits = spec.method == "fp" or str(rows[name].dtype) == f"torch.{buffer.dtype}"
        if tuple(rows[name].shape) != buffer.shape or not dtype_fits:
            found = f"{rows[name].dtype} {tuple(rows[name].shape)}"
            raise BundleError(
                f"saved cache holds {prefix}.{name} as {found}, expected {buffer}; make it again"
            )
    index = rows.get("outlier_channels", torch.empty(0)).long()
    if not ((index >= 0) & (index < channels)).all():
        raise BundleError(
            f"saved cache holds {prefix} outliers beyond channel {channels - 1}; make it again"
        )
    return rows


def _restore_angles(
    angles: AngleStore, group: str, saved: SavedCache, device: torch.device
) -> None:
    rows = _take(saved, f"angles.{group}").to(device)
    kind = saved.angle_kinds.get(group)
    width = angles.rotation.width // 2
    shape = (saved.tokens, 1) if kind == "positions" else (saved.tokens, 1, width, 2)
    if tuple(rows.shape) != shape or (kind == "positions" and angles.formula is None):
        raise BundleError(
            f"saved cache holds angles {tuple(rows.shape)} as {kind}, expected {shape}; "
            "make it again"
        )
    angles.restore(rows, kind=str(kind))


def _take(saved: SavedCache, name: str) -> Tensor:
    if name not in saved.tensors:
        raise BundleError(f"saved cache has no tensor {name}; make it again")
    return saved.tensors[name]
