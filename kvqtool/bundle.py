"""Bundle: what calibration leaves behind. A scheme, its codebooks, and the model and text they
belong to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.container import load_container, save_container
from kvqtool.errors import BundleError, KvqError
from kvqtool.memory import LayerGeometry
from kvqtool.methods import get_method
from kvqtool.spec import EXACT, KvSpec, parse_spec

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
                    f"bundle was made for {self.model['name']} ({field} {_brief(mine)}), "
                    f"the model {model['name']} has {_brief(theirs)}; calibrate a bundle for it"
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
            lower = self.codebooks[index, "key"].lower
            if lower is not None and len(lower) != layer.key_channels:
                raise BundleError(
                    f"bundle has {len(lower)} key channels in layer {index}, "
                    f"the model has {layer.key_channels}; "
                    "calibrate a bundle for this model"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file format,
        `layers.{i}.{key|value}.{levels|decode_levels|lower|upper}`.
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
            spec = parse_spec(metadata["spec"])
            layers = sorted({int(name.split(".")[1]) for name in tensors})
            books = {
                (layer, side): _codebook(tensors, layer, side, spec)
                for layer in layers
                for side in SIDES
            }
            return Bundle(spec, dict(metadata["model"]), books, dict(metadata["provenance"]))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise BundleError(f"bundle lacks or garbles {error}; calibrate it again") from error
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


def _codebook(tensors: dict[str, Tensor], layer: int, side: str, spec: KvSpec) -> Codebook:
    quant = spec.key if side == "key" else spec.value
    prefix = f"layers.{layer}.{side}"
    levels = tensors[f"{prefix}.levels"].float()
    lower, upper = (
        tensors[f"{prefix}.{end}"].float() if quant.per_channel else None
        for end in ("lower", "upper")
    )
    decoded = tensors.get(f"{prefix}.decode_levels")
    book = Codebook(levels, levels if decoded is None else decoded.float(), lower, upper)
    shape: tuple[int, ...] = (0 if quant.method == EXACT else 1 << quant.bits,)
    if quant.channel_levels and lower is not None:
        shape = (len(lower), *shape)
    ends = () if lower is None or upper is None else (lower, upper)
    shapes_fit = (
        tuple(levels.shape) == tuple(book.decode_levels.shape) == shape
        and len({len(end) for end in ends}) < 2
    )
    if not shapes_fit or not all(
        torch.isfinite(t).all() for t in (levels, book.decode_levels, *ends)
    ):
        raise ValueError(f"the codebook of layer {layer} {side}")
    return book


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
