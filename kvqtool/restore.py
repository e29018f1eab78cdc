"""Read a saved cache back and believe nothing it says: every tensor is checked before it is used.

A file whose checksum holds can still lie. What is restored has the shapes the memory table gives,
holds finite numbers only, and decodes to finite numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kvqtool.adaptive_store import ATTENTION, AdaptiveStore
from kvqtool.angles import AngleStore
from kvqtool.attach import Session, place_of
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.container import load_container
from kvqtool.errors import BundleError, brief
from kvqtool.memory import (
    LayerGeometry,
    body_buffers,
    dropped_tokens,
    outliers_per_tail,
    split_tokens,
    units_per_token,
)
from kvqtool.models import LoadedModel
from kvqtool.outliers import row_of_outlier
from kvqtool.packed import TILED
from kvqtool.side import WIDTHS, QuantSpec
from kvqtool.spec import SIDES
from kvqtool.store import LayerStore

KIND: Final = "kvqtool-cache"
VERSION: Final = 1

_PARTS: Final = ("sink", "window")
_PREFILLS: Final = ("exact", "decode-exact")
_KINDS: Final = ("positions", "table")
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
# Attention multiplies two states and sums: far below this it cannot leave float32.
_LARGEST: Final = 1e15
_MOST_ATTENTION: Final = 1.001  # a weight of 1, summed in float32


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


@dataclass(frozen=True)
class _Source:
    """A saved cache while it is being restored, and its tensors that nothing has taken yet."""

    saved: SavedCache
    left: dict[str, Tensor]


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
        saved = SavedCache(
            bundle=Bundle.from_parts(metadata["bundle"], books),
            tokens=metadata["tokens"],
            prefill=metadata["prefill"],
            token_ids=tensors.get("token_ids"),
            next_logits=tensors.get("next_logits"),
            tensors={name: t for name, t in tensors.items() if _belongs_to_cache(name)},
            angle_kinds=metadata["angles"],
        )
        _check_fields(saved)
        return saved
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"cache {path} lacks or garbles {brief(error)}; make it again") from error


def restore_cache(session: Session, saved: SavedCache, loaded: LoadedModel) -> KvqCache:
    """Return a live cache that holds what a file held.

    Raises:
        BundleError: when a tensor is missing, is not known, or is not what the spec and the model
            ask for.
    """
    cache = session.new_cache(saved.bundle, prefill=saved.prefill)
    left = dict(saved.tensors)
    # Layers of a spread model lie on several devices, and angles with the first that brings them.
    devices: dict[int, torch.device] = {}
    for layer, store in zip(session.seam.packed, cache.stores, strict=True):
        device = place_of(session.model, layer).device
        _restore_layer(store, layer.geometry, _Source(saved, left), (device, loaded.dtype))
        devices.setdefault(layer.group, device)
    for group, angles in cache.angles.items():
        rows = _angles_of(angles, str(group), _Source(saved, left))
        angles.restore(rows.to(devices[group]), kind=saved.angle_kinds[str(group)])
    if left:
        raise BundleError(
            f"saved cache holds {brief(min(left))}, which nothing reads; make it again"
        )
    return cache


def _belongs_to_cache(name: str) -> bool:
    """Tell a layer's tensors and angles from the rest; ValueError for what belongs nowhere."""
    if name.startswith("bundle.") or name in ("token_ids", "next_logits"):
        return False
    if not name.startswith(("layers.", "angles.")):
        raise ValueError(f"the tensor {name}")
    return True


def _check_fields(saved: SavedCache) -> None:
    """Raise ValueError for fields that contradict each other."""
    if type(saved.tokens) is not int or not 0 < saved.tokens < 1 << 31:
        raise ValueError(f"the number of tokens ({saved.tokens})")
    if saved.prefill not in _PREFILLS:
        raise ValueError(f"prefill {saved.prefill}")
    kinds: Any = saved.angle_kinds
    if not isinstance(kinds, dict) or any(kind not in _KINDS for kind in kinds.values()):
        raise ValueError(f"angles {kinds}")
    vocab_size = saved.bundle.model["vocab_size"]
    ids, logits = saved.token_ids, saved.next_logits
    if (ids is None) != (logits is None):
        raise ValueError("token_ids, which come with next_logits")
    if ids is not None and (
        ids.dtype != torch.int64
        or tuple(ids.shape) != (saved.tokens,)
        or not ((ids >= 0) & (ids < vocab_size)).all()
    ):
        raise ValueError("token_ids")
    if logits is not None and (
        logits.dtype != torch.float32
        or tuple(logits.shape) != (vocab_size,)
        or not torch.isfinite(logits).all()
    ):
        raise ValueError("next_logits")


def _restore_layer(
    store: LayerStore,
    geometry: LayerGeometry,
    source: _Source,
    place: tuple[torch.device, torch.dtype],
) -> None:
    saved, (device, dtype) = source.saved, place
    prefix, spec = f"layers.{store.layer}", store.spec
    exact, widths = {}, (geometry.key_dim, geometry.value_dim)
    sink, body, window = split_tokens(spec, saved.tokens)
    for part, length in zip(_PARTS, (sink, window), strict=True):
        key, value = (
            _states(source, f"{prefix}.{part}.{side}", (1, geometry.num_kv_heads, length, width))
            for side, width in zip(SIDES, widths, strict=True)
        )
        exact[part] = key.to(device, dtype), value.to(device, dtype)
    body -= dropped_tokens(spec, saved.tokens, store.sliding_window)
    sides = zip(
        SIDES, (spec.key, spec.value), (geometry.key_channels, geometry.value_channels), strict=True
    )
    units = units_per_token(spec, geometry)
    rows = [
        _rows_of(source, f"{prefix}.{side}", quant, (body * units, channels // units))
        if body
        else {}
        for side, quant, channels in sides
    ]
    moved = [{name: tensor.to(device) for name, tensor in side.items()} for side in rows]
    store.restore(exact, (moved[0], moved[1]), saved.tokens)
    if isinstance(store, AdaptiveStore):
        name = f"{prefix}.{ATTENTION}"
        seen = _states(source, name, (1, units, window)).to(device)
        if seen.dtype != torch.float32 or not ((seen >= 0) & (seen <= _MOST_ATTENTION)).all():
            raise _wrong(name, seen, "float32 weights from 0 to 1")
        store.attention = seen


def _rows_of(
    source: _Source,
    prefix: str,
    spec: QuantSpec,
    shape: tuple[int, int],
) -> dict[str, Tensor]:
    """Return one side's encoded rows, (body, channels) decoded, each buffer checked against the
    memory table.
    """
    if spec.method == "fp":
        return {"states": _states(source, f"{prefix}.states", shape)}
    body, channels = shape
    per_row = 2 * outliers_per_tail(spec, channels)
    names = body_buffers(spec, channels, 0, 0, "float32")
    rows = {name: _take(source, f"{prefix}.{name}") for name in names}
    outliers = (
        len(rows["outlier_values"]) if rows.get("outlier_values", torch.tensor(0)).dim() else 0
    )
    counts = _width_counts(prefix, rows)
    for name, buffer in body_buffers(spec, channels, body, outliers, "float32").items():
        expected = (counts[TILED[name]], *buffer.shape[1:]) if name in TILED else buffer.shape
        dtype = str(rows[name].dtype).removeprefix("torch.")
        if (tuple(rows[name].shape), dtype) != (expected, buffer.dtype):
            raise _wrong(f"{prefix}.{name}", rows[name], f"{buffer.dtype} {expected}")
        if rows[name].is_floating_point() and not torch.isfinite(rows[name]).all():
            raise BundleError(f"saved cache holds {prefix}.{name} that is no number; make it again")
    for name in ("ranges", "group_ranges", "norms"):
        sizes = rows[name] if name in rows else torch.zeros(1, 1)
        if ((sizes if name == "norms" else sizes[..., 0]) < 0).any():
            raise BundleError(f"saved cache holds {prefix}.{name} below zero; make it again")
    if "outlier_values" in rows and not _outliers_fit(rows, body, channels, per_row):
        raise BundleError(
            f"saved cache holds {prefix} outliers that do not lie in {body} rows of {channels} "
            "channels; make it again"
        )
    return rows


def _width_counts(prefix: str, rows: dict[str, Tensor]) -> dict[int, int]:
    """Return how many rows have each width, where rows have their own."""
    widths = rows.get("widths")
    if widths is None:
        return {}
    counts = {width: int((widths == width).sum()) for width in WIDTHS}
    if sum(counts.values()) != widths.numel():
        raise BundleError(f"saved cache holds {prefix}.widths that are none; make it again")
    return counts


def _outliers_fit(rows: dict[str, Tensor], body: int, channels: int, per_row: int) -> bool:
    """Whether each row has as many outliers as it says, in ascending channels."""
    index = rows["outlier_channels"].long()
    counts = rows.get("outlier_counts", torch.tensor([per_row]).expand(body)).long()
    if not ((counts >= 0) & (counts <= channels)).all() or int(counts.sum()) != len(index):
        return False
    place = row_of_outlier(rows, body, per_row) * channels + index
    return bool(((index >= 0) & (index < channels)).all() and (place.diff() > 0).all())


def _angles_of(angles: AngleStore, group: str, source: _Source) -> Tensor:
    saved, name = source.saved, f"angles.{group}"
    kind, width = saved.angle_kinds.get(group), angles.rotation.width // 2
    if kind == "table":
        return _states(source, name, (saved.tokens, 1, width, 2))
    rows = _take(source, name)
    if kind is None or angles.formula is None:
        raise BundleError(f"saved cache says {name} is {kind}, not a table; make it again")
    if tuple(rows.shape) != (saved.tokens, 1) or rows.dtype != torch.int32 or (rows < 0).any():
        raise _wrong(name, rows, f"positions int32 {(saved.tokens, 1)}")
    return rows


def _states(source: _Source, name: str, shape: tuple[int, ...]) -> Tensor:
    """Take a tensor of floats of a shape, all of them finite and none of them absurd."""
    states = _take(source, name)
    if tuple(states.shape) != shape or states.dtype not in _FLOATS:
        raise _wrong(name, states, f"floats {shape}")
    if not (states.float().abs() <= _LARGEST).all():  # NaN is not either
        raise BundleError(f"saved cache holds {name} that is no number; make it again")
    return states


def _take(source: _Source, name: str) -> Tensor:
    """Take a tensor from those that are left."""
    if name not in source.left:
        raise BundleError(f"saved cache has no tensor {name}; make it again")
    return source.left.pop(name)


def _wrong(name: str, found: Tensor, expected: str) -> BundleError:
    said = f"{found.dtype} {brief(tuple(found.shape))}"
    return BundleError(f"saved cache holds {name} as {said}, expected {expected}; make it again")
