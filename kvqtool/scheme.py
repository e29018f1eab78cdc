"""What a cache is stored by: one spec for all layers, or a bundle that has one for each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from kvqtool.errors import BundleError, InputError, KvqError, brief
from kvqtool.headers import read_header
from kvqtool.layers import PACKED_KINDS, CacheLayer
from kvqtool.shape import ModelShape
from kvqtool.spec import KvSpec, parse_spec

_FORMAT: Final = "kvqtool-bundle"
_OWN_CACHES: Final = (*PACKED_KINDS, "latent")


@dataclass(frozen=True)
class Scheme:
    """A spec, and what layers have of their own.

    Args:
        spec: the scheme; where layers differ, what they have in common.
        name: as reports call it.
        layer_specs: the scheme of each layer that has its own, by index.
        num_layers: layers the bundle was made for; None for a bare spec.
    """

    spec: KvSpec
    name: str
    layer_specs: dict[int, KvSpec] = field(default_factory=dict)
    num_layers: int | None = None

    def applied_to(self, shape: ModelShape) -> ModelShape:
        """Return a model's shape with each layer's own scheme.

        Raises:
            BundleError: when the bundle was made for another model.
        """
        if self.num_layers is None:
            return shape
        owners = sum(layer.kind in _OWN_CACHES for layer in shape.layers)
        if owners != self.num_layers:
            raise BundleError(
                f"bundle {self.name} was made for {self.num_layers} cache layers, {shape.name} has "
                f"{owners}; name the model it was calibrated for"
            )
        layers = [self._own(index, layer) for index, layer in enumerate(shape.layers)]
        return replace(shape, layers=tuple(layers))

    def _own(self, index: int, layer: CacheLayer) -> CacheLayer:
        own = self.layer_specs.get(index)
        return replace(layer, own_spec=own) if own and layer.is_packed else layer


def plain_scheme(spec: KvSpec) -> Scheme:
    """Return the scheme of one spec for all layers; a mixed one as its bytes bound it.

    Raises:
        InputError: when the spec has a budget of its own, whose layers only calibration knows.
    """
    if spec.target_bits is not None:
        raise InputError(
            f"{spec.name} spends its bits layer by layer when it is calibrated; "
            "name that --bundle, or plan the scheme without @"
        )
    return Scheme(spec, spec.name)


def bundle_scheme(path: Path) -> Scheme:
    """Read the scheme of a calibrated bundle from its header; its codebooks are not read.

    Raises:
        BundleError: when it is no bundle.
    """
    if not path.is_file():
        raise BundleError(f"bundle {path} does not exist; check the path, or make it first")
    try:
        metadata: dict[str, Any] = read_header(path).get("__metadata__", {})
        if metadata.get("format") != _FORMAT:
            raise ValueError("no kvqtool format")
        said = json.loads(metadata["metadata"])
        spec = parse_spec(said["spec"])
        own = {int(index): parse_spec(text) for index, text in said.get("layers", {}).items()}
        num_layers = said["model"]["num_layers"]
        if type(num_layers) is not int:
            raise ValueError("no number of layers")
    except InputError as error:
        raise BundleError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, KvqError) as error:
        raise BundleError(f"{path} is not a {_FORMAT} ({brief(error)}); make it again") from error
    return Scheme(spec, spec.name, own, num_layers)


def with_code_bits(scheme: Scheme, code_bits: float) -> Scheme:
    """Return a scheme planned with so many bits a code, where tokens choose their bits.

    Raises:
        InputError: when they do not.
    """
    spec = scheme.spec
    if spec.adaptive is None:
        raise InputError(f"{scheme.name} fixes the bits of its codes; --code-bits is for qaq specs")
    planned = replace(spec, adaptive=replace(spec.adaptive, planned_bits=code_bits))
    return replace(scheme, spec=planned)
