"""Every layer the planner predicts from a config is the one transformers itself makes of it."""

from typing import Any

import pytest
import torch
import transformers
from defaults import MODEL_TYPES, class_defaults
from families import IS_OLD, RELEASE
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vectors import EXTRA, own_cache, vectors

from kvqtool.architectures import cache_layers
from kvqtool.config import known_defaults, parse_config
from kvqtool.errors import InputError
from kvqtool.layers import CacheLayer
from kvqtool.memory import LayerGeometry
from kvqtool.trunk import read_trunk

VECTORS = vectors()
TOKENS = 21
OWNERLESS = ("shared", "none")
CACHED_BY_HEAD = ("deepseek_v32", "glm_moe_dsa")
# Left to their class, the first has no attention layer and the second heads of 42 2/3 channels; old
# caches of the third list layers without attention too.
NOT_BY_DEFAULT = ("granitemoehybrid", "glm4_moe", *(["nemotron_h"] if IS_OLD else []))
_STATES = {"conv_states": "state.convolution", "recurrent_states": "state.recurrent"}
_TENSORS = {"keys": "own.key", "values": "own.value", "indexer_keys": "own.index"}


def layers_of(model_type: str, **fields: Any) -> tuple[CacheLayer, ...]:
    return cache_layers(parse_config({"model_type": model_type, **fields}, "m"))


def held_bytes(cache: Any) -> list[dict[str, int]]:
    """Return the bytes of a cache's own tensors, layer by layer, under the planner's names."""
    linear = getattr(cache, "linear_cache", [])
    rows: list[dict[str, int]] = [{} for _ in range(max(len(cache.layers), len(linear)))]
    for row, layer in zip(rows, cache.layers, strict=False):
        for name, held in vars(layer).items():
            if name in _TENSORS and held is not None:
                row[_TENSORS[name]] = held.nbytes
            if name in _STATES and isinstance(held, dict):
                tensors = [tensor for tensor in held.values() if tensor is not None]
                row |= {_STATES[name]: sum(t.nbytes for t in tensors)} if tensors else {}
    for row, held in zip(rows, linear, strict=False):
        row |= {"state.recurrent": held.nbytes} if isinstance(held, torch.Tensor) else {}
    return rows


def owners(rows: list[dict[str, int]]) -> list[dict[str, int]]:
    """Leave out layers that share another's cache: transformers 5.17 does not list them."""
    return [row for row in rows if row]


@pytest.mark.parametrize("name", VECTORS)
def test_each_layer_holds_what_transformers_makes_it_hold(name: str) -> None:
    model_type, options = VECTORS[name]
    if model_type in CACHED_BY_HEAD and IS_OLD:
        pytest.skip("transformers before 5.23 caches every head's keys beside an indexer")
    config, cache = own_cache(model_type, options, TOKENS - 1)
    expected = owners(held_bytes(cache))
    stated = cache_layers(parse_config({"model_type": model_type, **options}, name))
    assert owners([layer.own_bytes(2, TOKENS, "bfloat16") for layer in stated]) == expected
    saved = cache_layers(parse_config(config.to_dict(), name))
    assert owners([layer.own_bytes(2, TOKENS, "bfloat16") for layer in saved]) == expected


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_a_config_leaves_out_is_what_its_class_gives(model_type: str) -> None:
    installed = class_defaults(model_type)
    known = known_defaults()[model_type]
    assert {field: known.get(field) for field in installed} == installed
    if model_type in NOT_BY_DEFAULT:
        return
    stock = DynamicCache(config=CONFIG_MAPPING[model_type]()).layers
    windows = [
        getattr(x, "sliding_window", None) for x in stock if type(x).__name__ != "DummyLayer"
    ]
    planned = [layer.window for layer in layers_of(model_type) if layer.kind not in OWNERLESS]
    assert planned == windows


@pytest.mark.parametrize("model_type", sorted({model_type for model_type, _ in VECTORS.values()}))
def test_models_without_sdpa_are_known(model_type: str) -> None:
    if model_type == "gemma2" and IS_OLD:
        pytest.skip("transformers before 5.23 gives gemma2 sdpa, which leaves out its cap")
    if model_type == "gptj" and RELEASE >= (5, 24):
        pytest.skip("gptj has sdpa from transformers 5.24 on; plans keep the peak of those before")
    options = next(o for t, o in VECTORS.values() if t == model_type)
    config = CONFIG_MAPPING[model_type](**options)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    trunk = read_trunk(parse_config({"model_type": model_type, **options}, "m"))
    assert bool(trunk.score_bytes) == (model.config._attn_implementation == "eager")


def test_every_type_of_the_table_has_a_vector() -> None:
    assert {model_type for model_type, _ in VECTORS.values()} == set(MODEL_TYPES)
    assert len(EXTRA) > 25
    assert set(known_defaults()) == set(MODEL_TYPES)


@pytest.mark.parametrize(
    ("model_type", "fields", "kinds", "geometry"),
    [
        # Hand-derived from the models' published configs.
        (
            "llama",
            {
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "hidden_size": 4096,
            },
            {"full": 32},
            LayerGeometry(8, 128, 128),
        ),
        ("deepseek_v3", {}, {"latent": 61}, LayerGeometry(1, 512, 64)),
        (
            "gpt_oss",
            {"num_hidden_layers": 24},
            {"sliding": 12, "full": 12},
            LayerGeometry(8, 64, 64),
        ),
        (
            "gemma3_text",
            {"num_hidden_layers": 34, "hidden_size": 2560, "sliding_window": 1024},
            {"sliding": 29, "full": 5},
            LayerGeometry(4, 256, 256),
        ),
        ("qwen3_next", {}, {"linear": 36, "full": 12}, LayerGeometry(2, 256, 256)),
        ("llama4_text", {}, {"chunked": 36, "full": 12}, LayerGeometry(8, 128, 128)),
        ("gemma3n_text", {}, {"sliding": 16, "full": 4, "shared": 15}, LayerGeometry(2, 256, 256)),
        ("jamba", {}, {"linear": 28, "full": 4}, LayerGeometry(8, 128, 128)),
        ("falcon", {}, {"full": 32}, LayerGeometry(1, 64, 64)),
    ],
)
def test_hand_derived_vectors(
    model_type: str, fields: dict[str, Any], kinds: dict[str, int], geometry: LayerGeometry
) -> None:
    layers = layers_of(model_type, **fields)
    assert {kind: sum(layer.kind == kind for layer in layers) for kind in kinds} == kinds
    assert sum(kinds.values()) == len(layers)
    growing = [layer for layer in layers if layer.is_growing]
    assert growing[-1].geometry == geometry


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "hyena_dna"}, "'hyena_dna' cannot be planned; known: .*llama"),
        ({"model_type": None}, "None cannot be planned"),
        ({"model_type": ["llama"]}, "cannot be planned"),
        ({"model_type": "llama", "kv_lora_rank": 512}, "kv_lora_rank = 512, which no llama has"),
        ({"model_type": "llama", "mamba_d_state": 16}, "mamba_d_state = 16"),
        ({"model_type": "llama", "layer_types": ["mystery"] * 32}, "layer of type mystery"),
        ({"model_type": "llama", "layer_types": ["full_attention"]}, "lists 1 layer_types for 32"),
        ({"model_type": "llama", "layer_types": 5}, "layer_types = 5"),
        ({"model_type": "llama", "num_key_value_heads": [2, 4]}, r"num_key_value_heads = \[2, 4\]"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"model_type": "llama", "num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"model_type": "llama", "hidden_size": 66}, "not a multiple of its 32 heads"),
        ({"model_type": "mistral", "sliding_window": -3}, "sliding_window = -3"),
        ({"model_type": "mistral", "sliding_window": 1}, "sees no other token"),
        ({"model_type": "llama", "num_hidden_layers": 10**6}, "1000000 layers; more than 10000"),
        ({"model_type": "llama", "num_hidden_layers": 10**30}, "num_hidden_layers = 10000"),
        ({"model_type": "llama", "partial_rotary_factor": "x"}, "partial_rotary_factor = x"),
        ({"model_type": "lfm2", "full_attn_idxs": 3}, "full_attn_idxs = 3"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers = \[1\]"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MX"}, "layers MX"),
        ({"model_type": "granitemoehybrid"}, "no attention layer to plan for"),
        ({"model_type": "vision", "text_config": {"hidden_size": 8}}, "'vision' cannot be planned"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        cache_layers(parse_config(fields, "m"))


def test_the_text_part_of_a_larger_model_is_planned() -> None:
    text = {"num_hidden_layers": 34, "sliding_window": 1024, "hidden_size": 2560}
    config = parse_config({"model_type": "gemma3", "text_config": text, "dtype": "bfloat16"}, "m")
    assert config.model_type == "gemma3_text"
    assert config.dtype == "bfloat16"
    assert config.is_multimodal
    assert cache_layers(config) == layers_of("gemma3_text", **text)


def test_layers_may_have_their_own_heads() -> None:
    own = {"1": {"num_key_value_heads": 2, "head_dim": 64}}
    first, second = layers_of("llama", num_hidden_layers=2, per_layer_config=own)
    assert first.geometry == LayerGeometry(32, 128, 128)
    assert second.geometry == LayerGeometry(2, 64, 64)
