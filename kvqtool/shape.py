"""What planning needs of a model: its cache layers, widths and weights, from a config alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from kvqtool.amounts import parse_bytes
from kvqtool.architectures import cache_layers
from kvqtool.config import ModelConfig, parse_config, read_config
from kvqtool.errors import InputError
from kvqtool.layers import CacheLayer
from kvqtool.parameters import active_share, estimated_weights
from kvqtool.trunk import Trunk, read_trunk
from kvqtool.weights import Part, Weights, measured_weights, weight_headers

BUILTIN: Final = "builtin"


@dataclass(frozen=True)
class ModelShape:
    """A model as planning sees it.

    Args:
        config: what its config says.
        layers: each layer's cache.
        trunk: its widths.
        weights: its weights by part; None where they are unknown.
        active: share of the weights that one token passes; below 1 for experts, None where it is
            not known.
    """

    config: ModelConfig
    layers: tuple[CacheLayer, ...]
    trunk: Trunk
    weights: Weights | None
    active: float | None = 1.0

    @property
    def name(self) -> str:
        """The model as the user named it."""
        return self.config.name

    @property
    def max_context(self) -> int | None:
        """Tokens the model was made for; None when the config does not say."""
        context = self.config.get("max_position_embeddings")
        return context if type(context) is int and context > 0 else None

    @property
    def dtype(self) -> str | None:
        """The checkpoint's dtype by name; None when the config does not say."""
        return self.config.dtype

    def weights_bytes(self, dtype: str) -> int | None:
        """Return the bytes of the weights in `dtype`, or None where they are unknown."""
        return self.weights.nbytes(dtype) if self.weights else None


def read_shape(
    name: str,
    weights: str = "auto",
    headers: list[tuple[Path, dict[str, Any]]] | None = None,
    shown: str | None = None,
) -> ModelShape:
    """Read a model's shape.

    Args:
        name: `builtin`, a folder with a config.json, such a file, or a well-known model's name.
        weights: `auto` for what safetensors files beside the config hold, and for a well-known
            model an estimate; `estimate` to count them from the config; `none` to leave them out;
            or an amount of memory.
        headers: of the weight files, where they do not lie beside the config.
        shown: what reports call the model; None for `name`.

    Raises:
        InputError: when there is no config, or the model cannot be planned.
    """
    known = None if Path(name).exists() else known_models().get(name.lower())
    path, shown = None if known else _config_path(name), shown or name
    config = read_config(path, shown) if path else parse_config((known or {})["config"], shown)
    layers = cache_layers(config)
    if weights == "auto" and path is not None and headers is None:
        headers = weight_headers(path.parent)
    return ModelShape(
        config=config,
        layers=layers,
        trunk=read_trunk(config),
        weights=_weights(config, len(layers), headers, weights),
        active=active_share(config, len(layers)),
    )


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Return the well-known models by name: source, published number of parameters, config."""
    path = Path(__file__).with_name("known_models.json")
    models: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return models


def _weights(
    config: ModelConfig,
    depth: int,
    headers: list[tuple[Path, dict[str, Any]]] | None,
    wanted: str,
) -> Weights | None:
    if wanted == "none":
        return Weights("none", Part(), (Part(),) * depth, Part())
    if wanted == "estimate":
        return estimated_weights(config, depth)
    if wanted != "auto":
        each, rest = divmod(parse_bytes(wanted), depth)
        return Weights("stated", Part(stored=rest), (Part(stored=each),) * depth, Part())
    if headers is not None:
        return measured_weights(config, depth, headers) if headers else None
    try:
        return estimated_weights(config, depth)
    except InputError:
        return None  # a well-known model of parts that are not counted; the plan says so


def _config_path(name: str) -> Path:
    if name == BUILTIN:
        return Path(__file__).parent / BUILTIN / "config.json"
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        hint = "name a folder, builtin, a hub id, or one of: " + ", ".join(known_models())
        raise InputError(f"no config of model {name!r} at {path}; download its config.json; {hint}")
    return path
