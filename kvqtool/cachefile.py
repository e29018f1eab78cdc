"""Saved caches: a document's compressed cache as a file, with all that is needed to go on from it.

The file carries its bundle, the token ids, the logits after the last token, and every layer's
sinks, packed rows and window in the canonical layout, so a model and this file continue where the
document ended.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvqtool.attach import attached, place_of
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.container import save_container
from kvqtool.data import Text
from kvqtool.errors import InputError, brief
from kvqtool.forward import Reading, read_prompt
from kvqtool.models import LoadedModel
from kvqtool.read_path import Place
from kvqtool.restore import KIND, VERSION, SavedCache, load_cache, restore_cache
from kvqtool.seam import LayerSeam
from kvqtool.spec import SIDES
from kvqtool.usage import kernel_of, layer_report, measure

__all__ = [
    "KIND",
    "VERSION",
    "CacheReport",
    "SavedCache",
    "load_cache",
    "quantize_states",
    "quantize_text",
    "restore_cache",
]

EXACTLY: Final = Reading()


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
    prefill_chunk: int | None
    device: str
    dtype: str
    kernel: str
    layers: list[dict[str, Any]]
    seconds: float


@torch.no_grad()
def quantize_text(
    loaded: LoadedModel,
    bundle: Bundle,
    text: Text,
    path: str | Path,
    *,
    reading: Reading = EXACTLY,
    force: bool = False,
) -> CacheReport:
    """Read a document and write its compressed cache.

    Args:
        loaded: the model.
        bundle: scheme and codebooks.
        text: the document.
        path: the file to write.
        reading: how the document is read.
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
    with attached(loaded, bundle) as session:
        cache = session.new_cache(bundle, prefill=reading.prefill)
        chunk = cache.tokens_at_once(reading.chunk)
        logits = read_prompt(loaded.model, ids[None].to(loaded.device), cache, chunk)[0]
    extra = {"token_ids": ids, "next_logits": logits}
    report = _save(cache, loaded, extra, Path(path), force, started)
    return replace(report, prefill_chunk=reading.chunk)


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
    if bundle.spec.adaptive is not None:
        raise InputError(
            f"{bundle.spec} decides bits by attention, and states have no queries; use --text"
        )
    tensors = _read_states(states)
    with attached(loaded, bundle) as session:
        cache = session.new_cache(bundle)
        for layer in session.seam.packed:
            key, value = _states_of(tensors, layer, place_of(loaded.model, layer))
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
        spec=cache.bundle.spec.name,
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
        prefill_chunk=None,
        device=loaded.device.type,
        dtype=str(loaded.dtype).removeprefix("torch."),
        kernel=kernel_of(cache),
        layers=layer_report(cache),
        seconds=time.perf_counter() - started,
    )


def _read_states(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"states file {path} cannot be read: {brief(error)}; write it with safetensors"
        ) from error


def _states_of(tensors: dict[str, Tensor], layer: LayerSeam, place: Place) -> tuple[Tensor, Tensor]:
    states, index, geometry = [], layer.index, layer.geometry
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
        states.append(tensor.to(place.device, place.dtype))
    if states[0].shape[2] != states[1].shape[2] or not states[0].shape[2]:
        raise InputError(
            f"layers.{index} has {states[0].shape[2]} keys and {states[1].shape[2]} values; "
            "give as many"
        )
    return states[0], states[1]
