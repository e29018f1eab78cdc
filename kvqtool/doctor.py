"""What the kernels need and find on this machine, whether they run here, and which layers of a
model they read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kvqtool.attach import Session, attach, place_of
from kvqtool.bundle import Bundle
from kvqtool.cuda import library_versions, unavailable
from kvqtool.errors import KvqError
from kvqtool.memory import LayerGeometry
from kvqtool.models import LoadedModel
from kvqtool.paged import PagedStore
from kvqtool.read_path import layer_variant, page_form, unreadable
from kvqtool.reader import PageReader, SharedTables
from kvqtool.seam import LayerSeam
from kvqtool.spec import KvSpec, parse_spec
from kvqtool.synthetic import synthetic_bundle
from kvqtool.variant import Variant

_TOKENS: Final = 200
# Of the greatest output: fp16 tables, queries and weights.
_TOLERANCE: Final = 1e-2


@dataclass(frozen=True)
class DoctorReport:
    """What `kvqtool doctor` reports; every field is documented in docs/json.md."""

    device: str
    gpu: str | None
    compute_capability: str | None
    shared_bytes: int | None
    driver: str | None
    torch: str
    torch_cuda: str | None
    cupy: str | None
    nvrtc: str | None
    is_ready: bool
    kernels: str
    layers: list[dict[str, Any]]


def examine(
    device: torch.device, loaded: LoadedModel | None = None, scheme: KvSpec | Bundle | None = None
) -> DoctorReport:
    """Look at a machine, and at a model's layers under a scheme.

    Args:
        device: what kernels would run on.
        loaded: the model, or None.
        scheme: a spec or a bundle, for a model only.
    """
    is_cuda = device.type == "cuda"
    versions = library_versions(device)
    failure = try_kernels(device)
    shared = versions["shared_bytes"]
    capability = torch.cuda.get_device_capability(device) if is_cuda else None
    return DoctorReport(
        device=str(device),
        gpu=torch.cuda.get_device_name(device) if is_cuda else None,
        compute_capability=".".join(map(str, capability)) if capability else None,
        shared_bytes=int(shared) if shared else None,
        driver=versions["driver"],
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        cupy=versions["cupy"],
        nvrtc=versions["nvrtc"],
        is_ready=failure is None,
        kernels=failure or "attention compiles, runs, and equals its reference",
        layers=[] if loaded is None or scheme is None else layer_paths(loaded, scheme),
    )


def try_kernels(device: torch.device) -> str | None:
    """Return why fused attention does not run on a device as it should, or None where it does."""
    reason = unavailable(device)
    if reason:
        return reason
    try:
        found, expected = (_attend_once(place) for place in (device, torch.device("cpu")))
    except KvqError as failure:
        return str(failure)
    error = float((found.cpu() - expected).abs().max() / expected.abs().max())
    if not error < _TOLERANCE:
        return f"attention is off by {error:.2g} of the greatest output; report this GPU"
    return None


def layer_paths(loaded: LoadedModel, scheme: KvSpec | Bundle) -> list[dict[str, Any]]:
    """Return a row per layer of a model: the kernel that reads it, or why none does."""
    with attach(loaded.model, seam=loaded.seam, read_path="fused") as session:
        return [_layer_row(session, layer, scheme) for layer in loaded.seam.layers]


def _layer_row(session: Session, layer: LayerSeam, scheme: KvSpec | Bundle) -> dict[str, Any]:
    spec = scheme if isinstance(scheme, KvSpec) else scheme.spec_of(layer.index)
    row: dict[str, Any] = {"layer": layer.index, "spec": spec.name}
    if not layer.is_packed:
        return row | {"read_path": "stock", "kernel": None, "read_reason": layer.note}
    place = place_of(session.model, layer)
    reason = session.obstacle or unreadable(layer, spec, place)
    if reason is None and place.device.type != "cuda":
        reason = "no CUDA device; on a GPU the kernel reads it"
    kernel = None if reason else _describe(layer_variant(layer, spec, place))
    path = "materialise" if reason else "fused"
    return row | {"read_path": path, "kernel": kernel, "read_reason": reason}


def _describe(variant: Variant) -> str:
    macros = (*variant.code_macros, ("GROUP", variant.group), ("WARPS", variant.warps))
    return "attend.cu " + " ".join(f"{name}={value}" for name, value in macros)


def _attend_once(device: torch.device) -> Tensor:
    """Return attention of a random query over a small random cache, the same everywhere, float32.

    Raises:
        RunError: when a kernel does not compile.
    """
    spec, geometry = parse_spec("nuq3-1%-postrope"), LayerGeometry(2, 64, 64)
    random = torch.Generator().manual_seed(0)
    key, value, query = (
        torch.randn(shape, generator=random).half().to(device)
        for shape in ((1, 2, _TOKENS, 64), (1, 2, _TOKENS, 64), (1, 4, 1, 64))
    )
    seam = LayerSeam(0, geometry, None, True, None, None, "")
    books, form = synthetic_bundle(spec, {0: geometry}).codebooks_of(0), page_form(seam, spec)
    store = PagedStore(spec, books, seam, form)
    store.append(key, value, _no_angles)
    reader = PageReader(seam, spec, books, form, SharedTables())
    return reader.attend(query, store.context(_no_angles, None, 0), 0.125, None).float()


def _no_angles(start: int, stop: int) -> tuple[Tensor, Tensor]:
    raise AssertionError("keys that are not rotated ask for no angles")
