"""Bundle: what calibration leaves behind. A scheme, its codebooks, and the model and text they
belong to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kvqtool.bundle_parts import (
    check_identity,
    layers_of,
    read_codebook,
    read_layer_specs,
    read_spec,
)
from kvqtool.codebook import Codebook
from kvqtool.container import load_container, save_container
from kvqtool.errors import BundleError, KvqError, brief
from kvqtool.memory import LayerGeometry, groups_per_token
from kvqtool.methods import fit_widths
from kvqtool.spec import SIDES, KvSpec

KIND: Final = "kvqtool-bundle"
VERSION: Final = 1
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


@dataclass(frozen=True)
class Bundle:
    """Everything needed to compress one model's cache by one scheme.

    Args:
        spec: the scheme; where layers differ, what they have in common.
        model: identity of the model, as JSON (see `models.ModelIdentity`).
        codebooks: by (layer, "key" or "value").
        provenance: text, windows, seed, device and versions it was made with; no dates, so equal
            inputs give equal files.
        layer_specs: the scheme of each packed layer of a mixed one; empty where all have `spec`.
            Sinks, recent window and the form of keys are those of `spec`.
    """

    spec: KvSpec
    model: dict[str, Any]
    codebooks: dict[tuple[int, str], Codebook]
    provenance: dict[str, Any]
    layer_specs: dict[int, KvSpec] = field(default_factory=dict)

    def spec_of(self, layer: int) -> KvSpec:
        """Return the scheme of a packed layer."""
        return self.layer_specs.get(layer, self.spec)

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
        for part in _IDENTITY:
            mine, theirs = self.model[part], model[part]
            if mine != theirs:
                raise BundleError(
                    f"bundle was made for {brief(self.model['name'])} ({part} {brief(mine)}), "
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
            spec = self.spec_of(index)
            for side, quant, width in (
                ("key", spec.key, layer.key_dim),
                ("value", spec.value, layer.value_dim),
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
                if book.query_norm is not None and len(book.query_norm) != layer.num_kv_heads:
                    raise BundleError(
                        f"bundle has {len(book.query_norm)} query norms in layer {index}, the "
                        f"model {layer.num_kv_heads} heads; calibrate a bundle for this model"
                    )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file format,
        `layers.{i}.{key|value}.{levels|decode_levels|lower|upper|feedback|order}`, and
        `layers.{i}.key.query_norm`.
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
            if book.query_norm is not None:
                named[f"{prefix}.query_norm"] = book.query_norm.half()
        return named

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the file format."""
        said = {"spec": str(self.spec), "model": self.model, "provenance": self.provenance}
        if self.layer_specs:
            said["layers"] = {str(i): str(spec) for i, spec in sorted(self.layer_specs.items())}
        return said

    @staticmethod
    def from_parts(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Bundle:
        """Build a bundle from what `metadata` and `tensors` returned.

        Raises:
            BundleError: when the parts do not make one.
        """
        try:
            spec = read_spec(metadata["spec"])
            model, provenance = metadata["model"], metadata["provenance"]
            check_identity(model)
            if not isinstance(provenance, dict):
                raise ValueError("its provenance")
            layers = layers_of(tensors)
            specs = read_layer_specs(metadata.get("layers", {}), spec, layers)
            books = {
                (layer, side): read_codebook(tensors, layer, side, specs.get(layer, spec))
                for layer in layers
                for side in SIDES
            }
            return Bundle(spec, model, books, provenance, specs)
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
    for side in SIDES:
        quant = spec.side(side)
        levels = fit_widths(quant, None)
        books |= {(layer, side): Codebook(*levels) for layer in layers}
    return Bundle(spec, model, books, {"calibrated": False})
