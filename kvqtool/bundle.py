"""Bundle: what calibration leaves behind. A scheme, its codebooks, and the model and text they
belong to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.container import load_container, save_container
from kvqtool.errors import BundleError, KvqError, brief
from kvqtool.memory import LayerGeometry, groups_per_token
from kvqtool.methods import get_method
from kvqtool.side import EXACT, QuantSpec
from kvqtool.spec import KvSpec, parse_spec

KIND: Final = "kvqtool-bundle"
VERSION: Final = 1
SIDES: Final = ("key", "value")
# Two models whose bundles fit each other agree in all of these; the name may differ (a copied
# folder, a fine-tune).
_IDENTITY: Final = (
    "architecture",
    "num_layers",
    "layers",
    "vocab_size",
    "tokenizer_sha256",
    "rope_sha256",
)


_FIELDS: Final = {
    "name": str,
    "architecture": str,
    "num_layers": int,
    "layers": list,
    "vocab_size": int,
    "max_context": int,
    "tokenizer_sha256": str,
    "rope_sha256": str,
}
_SIZES: Final = {field.name for field in fields(LayerGeometry)}
_LONGEST_SPEC: Final = 200
_TENSOR: Final = re.compile(
    r"layers\.(0|[1-9][0-9]{0,5})\."
    r"(?:key\.(?:levels|decode_levels|lower|upper|feedback|order)"
    r"|value\.(?:levels|decode_levels|feedback|order))"
)


@dataclass(frozen=True)
class Bundle:
    """Everything needed to compress one model's cache by one scheme.

    Args:
        spec: the scheme.
        model: identity of the model, as JSON (see `models.ModelIdentity`).
        codebooks: by (layer, "key" or "value").
        provenance: text, windows, seed, device and versions it was made with; no dates, so equal
            inputs give equal files.
    """

    spec: KvSpec
    model: dict[str, Any]
    codebooks: dict[tuple[int, str], Codebook]
    provenance: dict[str, Any]

    @property
    def bundle_bytes(self) -> int:
        """Bytes of all codebook tensors as they are stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def codebooks_of(self, layer: int) -> tuple[Codebook, Codebook]:
        """Return a layer's key and value codebooks."""
        return self.codebooks[layer, "key"], self.codebooks[layer, "value"]

    def check_model(self, model: dict[str, Any]) -> None:
        """Refuse a model the bundle was not made for.

        Args:
            model: the identity of the model at hand, as JSON.

        Raises:
            BundleError: naming what differs, both values, and the remedy.
        """
        for field in _IDENTITY:
            mine, theirs = self.model[field], model[field]
            if mine != theirs:
                raise BundleError(
                    f"bundle was made for {brief(self.model['name'])} ({field} {brief(mine)}), "
                    f"the model {model['name']} has {brief(theirs)}; calibrate a bundle for it"
                )

    def check_layers(self, layers: dict[int, LayerGeometry]) -> None:
        """Refuse cache layers, by index, that the codebooks do not fit.

        Raises:
            BundleError: naming the first layer that differs.
        """
        for index, layer in layers.items():
            if (index, "key") not in self.codebooks:
                raise BundleError(
                    f"bundle has no codebook for layer {index}; calibrate a bundle for this model"
                )
            for side, quant, width in (
                ("key", self.spec.key, layer.key_dim),
                ("value", self.spec.value, layer.value_dim),
            ):
                book, channels = self.codebooks[index, side], layer.num_kv_heads * width
                try:
                    groups_per_token(quant, channels)
                except KvqError as error:
                    raise BundleError(f"bundle does not fit layer {index}: {error}") from error
                if book.lower is not None and len(book.lower) != channels:
                    raise BundleError(
                        f"bundle has {len(book.lower)} {side} channels in layer {index}, "
                        f"the model has {channels}; calibrate a bundle for this model"
                    )
                if book.order is not None and book.order.shape != (layer.num_kv_heads, width):
                    raise BundleError(
                        f"bundle has {side} heads of {tuple(book.order.shape)} in layer {index}, "
                        f"the model has {(layer.num_kv_heads, width)}; "
                        "calibrate a bundle for this model"
                    )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file format,
        `layers.{i}.{key|value}.{levels|decode_levels|lower|upper|feedback|order}`.
        """
        named = {}
        for (layer, side), book in self.codebooks.items():
            prefix = f"layers.{layer}.{side}"
            named[f"{prefix}.levels"] = book.levels.half()
            if not torch.equal(book.levels, book.decode_levels):
                named[f"{prefix}.decode_levels"] = book.decode_levels.half()
            if book.lower is not None and book.upper is not None:
                named[f"{prefix}.lower"], named[f"{prefix}.upper"] = (
                    book.lower.half(),
                    book.upper.half(),
                )
            if book.feedback is not None and book.order is not None:
                named[f"{prefix}.feedback"] = book.feedback.half()
                named[f"{prefix}.order"] = book.order
        return named

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the file format."""
        return {"spec": str(self.spec), "model": self.model, "provenance": self.provenance}

    @staticmethod
    def from_parts(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Bundle:
        """Build a bundle from what `metadata` and `tensors` returned.

        Raises:
            BundleError: when the parts do not make one.
        """
        try:
            if len(metadata["spec"]) > _LONGEST_SPEC:
                raise ValueError("the spec")
            spec = parse_spec(metadata["spec"])
            model, provenance = metadata["model"], metadata["provenance"]
            _check_identity(model)
            if not isinstance(provenance, dict):
                raise ValueError("its provenance")
            books = {
                (layer, side): _codebook(tensors, layer, side, spec)
                for layer in _layers_of(tensors)
                for side in SIDES
            }
            return Bundle(spec, model, books, provenance)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            found = brief(error)
            raise BundleError(f"bundle lacks or garbles {found}; calibrate it again") from error
        except KvqError as error:
            raise BundleError(f"bundle cannot be read: {error}") from error


def save_bundle(bundle: Bundle, path: str | Path, *, force: bool = False) -> None:
    """Write a bundle; whole or not at all."""
    save_container(path, KIND, VERSION, (bundle.metadata(), bundle.tensors()), force=force)


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle.

    Raises:
        BundleError: when the file is missing, damaged, or of another kind or version.
    """
    return Bundle.from_parts(*load_container(path, KIND, VERSION))


def uncalibrated_bundle(spec: KvSpec, model: dict[str, Any], layers: list[int]) -> Bundle:
    """Return the bundle of a scheme that needs no calibration.

    Args:
        spec: such a scheme.
        model: the model's identity, as JSON.
        layers: indices of the packed cache layers.
    """
    books: dict[tuple[int, str], Codebook] = {}
    for side, quant in zip(SIDES, (spec.key, spec.value), strict=True):
        levels = get_method(quant.method).fit(quant, None)
        books |= {(layer, side): Codebook(*levels) for layer in layers}
    return Bundle(spec, model, books, {"calibrated": False})


def _check_identity(model: Any) -> None:
    """Raise ValueError or KeyError for what is no model's identity."""
    for field, kind in _FIELDS.items():
        if type(model[field]) is not kind:
            raise ValueError(f"the model's {field}")
    for layer in model["layers"]:
        if not isinstance(layer, dict) or layer.keys() != _SIZES:
            raise ValueError("the model's layers")
        if not all(type(size) is int and size > 0 for size in layer.values()):
            raise ValueError("the model's layers")


def _layers_of(tensors: dict[str, Tensor]) -> list[int]:
    """Return the layers that tensors belong to; ValueError for one that belongs nowhere."""
    layers = set()
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        dtype = torch.int16 if name.endswith(".order") else torch.float16
        if match is None or tensor.dtype != dtype:
            raise ValueError(f"the tensor {name}")
        layers.add(int(match[1]))
    return sorted(layers)


def _codebook(tensors: dict[str, Tensor], layer: int, side: str, spec: KvSpec) -> Codebook:
    """Return one side's codebook; KeyError or ValueError where the tensors make none."""
    quant = spec.key if side == "key" else spec.value
    prefix = f"layers.{layer}.{side}"
    levels = tensors[f"{prefix}.levels"].float()
    decoded = tensors.get(f"{prefix}.decode_levels", levels).float()
    lower, upper = (
        tensors[f"{prefix}.{end}"].float() if quant.per_channel else None
        for end in ("lower", "upper")
    )
    if not quant.per_channel and {f"{prefix}.lower", f"{prefix}.upper"} & tensors.keys():
        raise ValueError(f"the range of layer {layer} {side}")
    shape: tuple[int, ...] = (0 if quant.method == EXACT else 1 << quant.bits,)
    if quant.channel_levels and lower is not None:
        shape = (len(lower), *shape)
    parts = [part for part in (levels, decoded, lower, upper) if part is not None]
    if (
        not all(torch.isfinite(part).all() for part in parts)
        or not tuple(levels.shape) == tuple(decoded.shape) == shape
        or (levels.diff(dim=-1) < 0).any()
    ):
        raise ValueError(f"the codebook of layer {layer} {side}")
    if (
        lower is not None
        and upper is not None
        and (lower.dim() != 1 or lower.shape != upper.shape or (lower > upper).any())
    ):
        raise ValueError(f"the range of layer {layer} {side}")
    return Codebook(levels, decoded, lower, upper, *_feedback(tensors, prefix, quant))


def _feedback(
    tensors: dict[str, Tensor], prefix: str, quant: QuantSpec
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return what compensation needs; KeyError or ValueError where the tensors do not give it."""
    names = f"{prefix}.feedback", f"{prefix}.order"
    if not quant.compensated:
        if tensors.keys() & set(names):
            raise ValueError(f"the feedback of {prefix}")
        return None, None
    feedback, order = tensors[names[0]].float(), tensors[names[1]]
    heads, width = order.shape
    every = torch.arange(width).expand(heads, width)
    if (
        tuple(feedback.shape) != (heads, width, width)
        or not torch.isfinite(feedback).all()
        or not torch.equal(order.long().sort(dim=1).values, every)
    ):
        raise ValueError(f"the feedback of {prefix}")
    return feedback, order
