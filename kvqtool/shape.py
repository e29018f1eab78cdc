"""A model's cache shapes and weights, read from its config.json and safetensors headers alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvqtool.errors import InputError
from kvqtool.memory import LayerGeometry

BUILTIN: Final = "builtin"
# Architectures whose every layer keeps one full-attention cache of one head shape, each checked by
# a test against transformers. The set names what config.json must state, because transformers'
# default there is some model's number; what else is absent follows from the heads.
_KV: Final = "num_key_value_heads"
PLANNABLE: Final[dict[str, frozenset[str]]] = {
    "llama": frozenset(),
    "mistral": frozenset({_KV, "sliding_window"}),
    "mixtral": frozenset({_KV}),
    "qwen2": frozenset({_KV}),
    "qwen2_moe": frozenset({_KV}),
    "qwen3": frozenset({_KV, "head_dim"}),
    "qwen3_moe": frozenset({_KV}),
    "gemma": frozenset({_KV, "head_dim"}),
    "phi": frozenset(),
    "phi3": frozenset(),
    "gpt_neox": frozenset(),
    "granite": frozenset(),
    "granitemoe": frozenset(),
    "olmo": frozenset(),
    "olmo2": frozenset(),
    "olmoe": frozenset(),
    "smollm3": frozenset({_KV}),
    "stablelm": frozenset({_KV}),
    "starcoder2": frozenset({_KV}),
    "cohere": frozenset(),
    "glm": frozenset({_KV, "head_dim"}),
    "glm4": frozenset({_KV, "head_dim"}),
}
_OTHER_CACHES: Final = (
    *("kv_lora_rank", "mamba_", "ssm_", "linear_"),
    *("state_size", "conv_", "attn_layer_", "block_configs"),
)
_ONLY_FULL: Final = "this version plans plain full attention only"
_ITEM_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_FLOAT_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
_MAX_HEADER: Final = 100_000_000


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know about a model.

    Args:
        name: as the user named it.
        model_type: the config's.
        layers: the cache shapes of each layer.
        max_context: tokens the model was made for; None when the config does not say.
        dtype: the checkpoint's dtype by name; None when the config does not say.
        float_weights: floating-point numbers in the weight files; None when files are missing.
        other_weight_bytes: bytes of weights in other dtypes, which loading does not convert.
    """

    name: str
    model_type: str
    layers: tuple[LayerGeometry, ...]
    max_context: int | None
    dtype: str | None
    float_weights: int | None
    other_weight_bytes: int

    def weights_bytes(self, dtype: str) -> int | None:
        """Return the bytes of the weights in `dtype`, or None when files are missing."""
        if self.float_weights is None:
            return None
        return self.float_weights * _FLOAT_BYTES[dtype] + self.other_weight_bytes


def read_shape(name: str) -> ModelShape:
    """Read a model's shapes.

    Args:
        name: `builtin`, a folder with a config.json, or such a file. A hub name is not fetched.

    Raises:
        InputError: when there is no config, or the model keeps a cache this version cannot plan.
    """
    path = _config_path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable config ({error}); download it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object; download the model's config.json")
    geometry, layers = _geometry(config, name)
    floats, others = _weights(path.parent)
    dtype = config.get("dtype") or config.get("torch_dtype")
    context = config.get("max_position_embeddings")
    return ModelShape(
        name=name,
        model_type=config["model_type"],
        layers=(geometry,) * layers,
        max_context=context if isinstance(context, int) else None,
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else None,
        float_weights=floats,
        other_weight_bytes=others,
    )


def _config_path(name: str) -> Path:
    if name == BUILTIN:
        return Path(__file__).parent / BUILTIN / "config.json"
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        hint = "planning fetches nothing: download its config.json, or use builtin"
        raise InputError(f"no config of model {name!r} at {path}; {hint}")
    return path


def _geometry(config: dict[str, Any], name: str) -> tuple[LayerGeometry, int]:
    """Return the one geometry of all layers and their number; refuse other kinds of cache."""
    model_type = config.get("model_type")
    if model_type not in PLANNABLE:
        known = ", ".join(sorted(PLANNABLE))
        raise InputError(f"{name}: model_type {model_type!r} cannot be planned yet; known: {known}")
    _refuse_other_caches(config, name)
    missing = sorted(field for field in PLANNABLE[model_type] if field not in config)
    if missing:
        lacks = f"the config of {name} ({model_type}) lacks {', '.join(missing)}"
        raise InputError(f"{lacks}; add what the model uses")
    heads = _count(config, "num_attention_heads", name)
    kv_heads = heads if config.get(_KV) is None else _count(config, _KV, name)
    if config.get("head_dim") is not None:
        head_dim = _count(config, "head_dim", name)
    else:
        hidden = _count(config, "hidden_size", name)
        if hidden % heads:
            found = f"hidden_size {hidden} of {name} is not a multiple of its {heads} heads"
            raise InputError(f"{found}; state head_dim")
        head_dim = hidden // heads
    return LayerGeometry(kv_heads, head_dim, head_dim), _count(config, "num_hidden_layers", name)


def _refuse_other_caches(config: dict[str, Any], name: str) -> None:
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        raise InputError(f"{name} has a sliding window of {window} tokens; {_ONLY_FULL}")
    kinds = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if kinds:
        raise InputError(f"{name} has layers of type {', '.join(kinds)}; {_ONLY_FULL}")
    for field, value in config.items():
        if value and field.startswith(_OTHER_CACHES):
            raise InputError(f"{name} has {field} = {value!r}; {_ONLY_FULL}")


def _count(config: dict[str, Any], field: str, name: str) -> int:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = f"the config of {name} has {field} = {value!r}"
        raise InputError(f"{found}; expected one positive number for all layers")
    return value


def _weights(folder: Path) -> tuple[int | None, int]:
    """Return the floating-point numbers in a folder's safetensors files, and the other bytes."""
    files = _weight_files(folder)
    if not files or not all(file.is_file() for file in files):
        return None, 0
    floats = others = 0
    for file in files:
        for tensor in _tensors(file):
            count = math.prod(tensor["shape"])
            if tensor["dtype"] in _ITEM_BYTES:
                floats += count
            else:
                start, end = tensor["data_offsets"]
                others += end - start
    return floats, others


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{index} is no weight index ({error!r}); download it again") from error
    return [folder / name for name in names]


def _tensors(file: Path) -> list[dict[str, Any]]:
    """Read a safetensors header: eight bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_MAX_HEADER, file.stat().st_size):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        return [tensor for name, tensor in header.items() if name != "__metadata__"]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{file} is not a safetensors file ({error}); download it again"
        ) from error
