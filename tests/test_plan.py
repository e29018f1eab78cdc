"""Planned bytes are the memory table's, summed; shapes are those of the real caches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvqtool.errors import InputError
from kvqtool.memory import LayerGeometry, Outliers, planned_bytes
from kvqtool.plan import parse_bytes, plan
from kvqtool.shape import PLANNABLE, ModelShape, read_shape
from kvqtool.spec import parse_spec

SHAPE = ModelShape("m", "llama", (LayerGeometry(3, 64, 64),) * 2, 2048, "bfloat16", 1000, 0)
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
STATED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": None}


def write_config(folder: Path, **fields: Any) -> Path:
    """Write a llama config with some fields replaced."""
    config = {"model_type": "llama", "dtype": "float16", **TINY, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", sorted(PLANNABLE))
def test_planned_shapes_are_those_of_the_real_cache(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**TINY, **{field: STATED[field] for field in PLANNABLE[model_type]}}
    shape = read_shape(str(write_config(tmp_path, **fields, model_type=model_type)))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    with torch.no_grad():
        cache = model(torch.zeros((1, 5), dtype=torch.int64), use_cache=True).past_key_values
    assert len(cache.layers) == len(shape.layers)
    for layer, geometry in zip(cache.layers, shape.layers, strict=True):
        assert layer.keys.shape == (1, geometry.num_kv_heads, 5, geometry.key_dim)
        assert layer.values.shape == (1, geometry.num_kv_heads, 5, geometry.value_dim)
        assert type(layer).__name__ == "DynamicLayer"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "jamba"}, "'jamba' cannot be planned yet; known: .*llama"),
        ({"model_type": None}, "cannot be planned"),
        ({"sliding_window": 4096}, "sliding window of 4096"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding window of 4096"),
        (
            {"layer_types": ["full_attention", "linear_attention"]},
            "layers of type linear_attention",
        ),
        ({"kv_lora_rank": 512}, "kv_lora_rank = 512"),
        ({"mamba_d_state": 16}, "mamba_d_state = 16"),
        ({"model_type": "mistral"}, "lacks num_key_value_heads, sliding_window"),
        ({"num_key_value_heads": [2, 4]}, r"num_key_value_heads = \[2, 4\]"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"hidden_size": 66}, "not a multiple of its 4 heads"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(
    fields: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=complaint):
        read_shape(str(write_config(tmp_path, **fields)))


def test_a_window_that_is_switched_off_is_no_window(tmp_path: Path) -> None:
    fields = {
        "sliding_window": 4096,
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * 2,
    }
    assert len(read_shape(str(write_config(tmp_path, **fields))).layers) == 2


def test_a_folder_and_its_config_file_name_the_same_model(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    assert replace(read_shape(str(folder / "config.json")), name=str(folder)) == read_shape(
        str(folder)
    )


def test_a_missing_or_broken_config_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"download its config\.json"):
        read_shape("meta-llama/Llama-3.1-8B")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a readable config"):
        read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        read_shape(str(tmp_path))


def test_weights_are_read_from_headers_sharded_or_not(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_config(tmp_path)
    assert read_shape(str(tmp_path)).weights_bytes("float16") is None
    a, b = (
        {"a": torch.zeros(3, 5)},
        {"b": torch.zeros(7, dtype=torch.float16), "c": torch.zeros(9, dtype=torch.int8)},
    )
    save_file(a | b, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = read_shape(str(tmp_path))
    assert whole.weights_bytes("float16") == 2 * (15 + 7) + 9
    assert whole.weights_bytes("float32") == 4 * (15 + 7) + 9
    (tmp_path / "model.safetensors").unlink()
    save_file(a, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_shape(str(tmp_path)).weights_bytes("float16") is None
    save_file(b, tmp_path / "two.safetensors")
    assert read_shape(str(tmp_path)) == whole


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match=r"model\.safetensors is not a safetensors file"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize(
    "spec", ["fp", "nuq4-1%-sink1", "nuq3-1%-cap4-r128", "int4-g64", "nf3-sink4"]
)
@pytest.mark.parametrize(("context", "batch"), [(1, 1), (129, 1), (1000, 3)])
def test_totals_are_the_memory_tables(spec: str, context: int, batch: int) -> None:
    made = plan(SHAPE, parse_spec(spec), context, batch, "auto", None)
    body = max(context - parse_spec(spec).sink_tokens - parse_spec(spec).residual_length, 0) * batch
    scheme = parse_spec(spec)
    share = scheme.key.outlier_fraction
    values = 2 * 1 * body if share else 0  # 192 channels: ceil(0.005 * 192) = 1 a tail
    expected = [Outliers(-(-192 * body // 100) if share else 0, values)] * 2
    most = [Outliers((scheme.key.outlier_cap or 192) * body if share else 0, values)] * 2
    assert made.cache_bytes == planned_bytes(
        scheme, SHAPE.layers, batch, context, expected, "bfloat16"
    )
    assert made.cache_bytes_bound == planned_bytes(
        scheme, SHAPE.layers, batch, context, most, "bfloat16"
    )
    assert made.cache_bytes == sum(made.breakdown.values())
    assert made.cache_bytes_fp16 == 2 * 2 * 384 * context * batch
    assert made.effective_bits == pytest.approx(8 * made.cache_bytes / (2 * 384 * context * batch))
    assert made.total_bytes == made.cache_bytes + 2000
    assert made.fits is None
    assert made.largest_context is None


def test_one_more_page_costs_its_tokens_times_bytes_per_token() -> None:
    now = plan(SHAPE, parse_spec("int4-g64"), 1000, 2, "auto", None)
    later = plan(SHAPE, parse_spec("int4-g64"), 1128, 2, "auto", None)
    assert later.cache_bytes - now.cache_bytes == now.bytes_per_token * 128 * 2


@pytest.mark.parametrize("spec", ["fp", "nuq3-1%-sink1", "int4-g64-r200"])
@pytest.mark.parametrize("memory", [2000, 40_000, 500_000, 5_000_001])
def test_the_largest_context_fits_and_the_next_does_not(spec: str, memory: int) -> None:
    scheme = parse_spec(spec)
    largest = plan(SHAPE, scheme, 1, 1, "auto", memory).largest_context
    assert largest is not None
    assert plan(SHAPE, scheme, largest + 1, 1, "auto", memory).fits is False
    if largest:
        assert plan(SHAPE, scheme, largest, 1, "auto", memory).fits is True


def test_assumptions_name_what_is_not_counted() -> None:
    bare = replace(SHAPE, float_weights=None)
    said = " | ".join(plan(bare, parse_spec("nuq3-1%"), 4096, 1, "float16", None).assumptions)
    for words in (
        "held in float16",
        "activations",
        "total is the cache alone",
        "1% outliers",
        "beyond the 2048",
    ):
        assert words in said


def test_a_dtype_is_never_guessed() -> None:
    with pytest.raises(InputError, match=r"names no dtype; state .* --dtype"):
        plan(replace(SHAPE, dtype=None), parse_spec("fp"), 8, 1, "auto", None)
    with pytest.raises(InputError, match="'int8' is unknown"):
        plan(SHAPE, parse_spec("fp"), 8, 1, "int8", None)
    with pytest.raises(InputError, match="at least 1"):
        plan(SHAPE, parse_spec("fp"), 0, 1, "auto", None)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("80GiB", 80 * 2**30),
        ("80GB", 80 * 10**9),
        ("81559MiB", 81559 * 2**20),
        ("123", 123),
        ("1.5 kib", 1536),
    ],
)
def test_amounts_of_memory(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["80G", "", "GiB", "-1GiB", "1e9", "0", "80 Gbit"])
def test_unclear_amounts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="80GiB"):
        parse_bytes(text)
