"""A model's config.json, and what it leaves to its class: stated, known, or refused; never guessed.

`defaults.json` beside this file holds the defaults of transformers' config classes, one line for
each model type that can be planned; a test compares it with transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from kvqtool.errors import InputError, brief

# Other spellings of the same field, in the order they are looked for.
_ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "hidden_size": ("n_embd", "n_embed"),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "max_position_embeddings": ("n_positions",),
    "intermediate_size": ("ffn_dim", "ffn_hidden_size", "n_inner"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
}
# The text part of a model that also sees or hears, where its own config does not name its type.
_TEXT_TYPES: Final = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
# Fields of caches that are not plain attention; a class that does not know them is another model's.
_OTHER_CACHES: Final = (
    *("kv_lora_rank", "mamba_", "ssm_state", "linear_num_", "index_head_dim", "state_size"),
    *("num_kv_shared_layers", "conv_", "attn_layer_", "block_configs", "attention_chunk_size"),
)


_MOST: Final = 1 << 40  # of anything a model has


@dataclass(frozen=True)
class ModelConfig:
    """The fields of one model's config.

    Args:
        name: as the user named the model.
        model_type: the architecture.
        stated: what its config.json says, the text part's of a multimodal one.
        dtype: the checkpoint's dtype by name; None when the config does not say.
        is_multimodal: whether this is the text part of a larger model.
    """

    name: str
    model_type: str
    stated: dict[str, Any]
    dtype: str | None = None
    is_multimodal: bool = False
    known: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """Return a field's value: as stated, or its class's default; None where there is none."""
        names = (name, *_ALIASES.get(name, ()))
        for source in (self.stated, self.known):
            found = [source[other] for other in names if other in source]
            if found:
                return next((value for value in found if value is not None), None)
        return None

    def count(self, name: str) -> int:
        """Return a field that is a positive number.

        Raises:
            InputError: when it is something else, naming the field.
        """
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
            found = f"the config of {self.name} ({self.model_type}) has {name} = {brief(value)}"
            raise InputError(f"{found}; expected a positive number, add what the model uses")
        return value

    def optional(self, name: str) -> int | None:
        """Return a field that is a positive number or None."""
        return None if self.get(name) is None else self.count(name)

    def at_least_zero(self, name: str) -> int:
        """Return a field that is a positive number, 0 or None, which counts as 0."""
        return 0 if self.get(name) in (None, 0) else self.count(name)


def read_config(path: Path, name: str) -> ModelConfig:
    """Read a config.json.

    Raises:
        InputError: when it is no config, or of a model type that cannot be planned.
    """
    try:
        outer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a readable config ({brief(error)}); download it again"
        ) from error
    if not isinstance(outer, dict):
        raise InputError(f"{path} holds no JSON object; download the model's config.json")
    return parse_config(outer, name)


def parse_config(outer: dict[str, Any], name: str) -> ModelConfig:
    """Return the fields of a config that is read already; see `read_config`."""
    inner = outer.get("text_config")
    stated = inner if isinstance(inner, dict) else outer
    model_type = stated.get("model_type") or _TEXT_TYPES.get(str(outer.get("model_type")))
    model_type = _TEXT_TYPES.get(str(model_type), model_type)
    table = known_defaults()
    if not isinstance(model_type, str) or model_type not in table:
        given = model_type or outer.get("model_type")
        known = ", ".join(sorted(table))
        raise InputError(f"{name}: model_type {given!r} cannot be planned; known: {known}")
    for key, value in stated.items():
        if value and _is_foreign(key, model_type):
            what = f"{name} has {key} = {brief(value)}, which no {model_type} has"
            raise InputError(f"{what}; its cache would be guessed, so it is not planned")
    dtype = next(
        (d[k] for d in (stated, outer) for k in ("dtype", "torch_dtype") if d.get(k)), None
    )
    return ModelConfig(
        name=name,
        model_type=model_type,
        stated=stated,
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else None,
        is_multimodal=stated is not outer,
        known=table[model_type],
    )


@cache
def known_defaults() -> dict[str, dict[str, Any]]:
    """Return the defaults of every model type that can be planned."""
    path = Path(__file__).with_name("defaults.json")
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: row for name, row in table.items() if isinstance(row, dict)}


def _is_foreign(field_name: str, model_type: str) -> bool:
    """Whether a field speaks of a kind of cache that the type's class knows nothing of."""
    prefixes = [prefix for prefix in _OTHER_CACHES if field_name.startswith(prefix)]
    own = known_defaults()[model_type]
    return any(not any(known.startswith(prefix) for known in own) for prefix in prefixes)
