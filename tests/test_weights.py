"""Weights: exact from headers, close from a config, divided and refused as they should be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvqtool.amounts import in_gib, parse_bytes
from kvqtool.config import parse_config
from kvqtool.errors import InputError
from kvqtool.parameters import _DENSE, _EXPERTS, active_share, estimated_weights
from kvqtool.shape import read_shape
from kvqtool.sharding import divide

CLOSE = 2e-3  # biases, and norms beside the two of a layer
TINY: dict[str, Any] = {"model_type": "llama", "dtype": "float16", "num_hidden_layers": 2}
# transformers cannot build these from their defaults.
UNBUILDABLE = ("ministral", "hunyuan_v1_dense")


def write(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> str:
    (folder / "config.json").write_text(json.dumps(TINY | fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_weights_are_read_from_headers_sharded_or_not(tmp_path: Path) -> None:
    a = {"model.layers.0.w": torch.zeros(3, 5)}
    b = {"model.embed_tokens.weight": torch.zeros(7, 1, dtype=torch.float16)}
    c = {"model.layers.1.norm.weight": torch.zeros(9, dtype=torch.int8)}
    whole = read_shape(write(tmp_path, a | b | c)).weights
    assert whole is not None
    assert whole.nbytes("float16") == 2 * (15 + 7) + 9
    assert whole.nbytes("float32") == 4 * (15 + 7) + 9
    assert (whole.layers[0].matrices, whole.embedding.matrices, whole.layers[1].stored) == (
        15,
        7,
        9,
    )
    (tmp_path / "model.safetensors").unlink()
    save_file(a, tmp_path / "one.safetensors")
    names = dict.fromkeys(b | c, "two.safetensors") | dict.fromkeys(a, "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert read_shape(str(tmp_path)).weights is None
    save_file(b | c, tmp_path / "two.safetensors")
    assert read_shape(str(tmp_path)).weights == whole


def test_a_quantized_checkpoint_counts_as_stored(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.q.qweight": torch.zeros(8, 4, dtype=torch.int32),
        "model.layers.0.q.scales": torch.zeros(8, dtype=torch.float32),
    }
    folder = write(tmp_path, tensors, quantization_config={"quant_method": "gptq"})
    shape = read_shape(folder)
    assert shape.weights_bytes("float16") == shape.weights_bytes("float32") == 32 * 4 + 8 * 4


def test_parts_that_are_no_layers_stay_where_they_are_used(tmp_path: Path) -> None:
    tensors = {
        "model.vision_tower.encoder.layers.0.w": torch.zeros(2, 2),
        "model.layers.7.w": torch.zeros(99, 1),  # past the model's layers: not loaded
        "lm_head.weight": torch.zeros(4, 2),
        "model.norm.weight": torch.zeros(3),
    }
    weights = read_shape(write(tmp_path, tensors)).weights
    assert weights is not None
    assert weights.embedding.matrices == 4
    assert (weights.head.matrices, weights.head.vectors) == (8, 3)
    assert weights.numbers == 15


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 20, b"", b"\x02" + bytes(7) + b"[]", b"\x0d" + bytes(7) + b'{"a": {"b":1}}'],
)
def test_damaged_weights_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is not a safetensors file"):
        read_shape(str(tmp_path))


@pytest.mark.parametrize("model_type", [t for t in (*_DENSE, *_EXPERTS) if t not in UNBUILDABLE])
def test_an_estimate_is_what_transformers_would_build(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    if config.num_hidden_layers > 8 and getattr(config, "layer_types", None) is None:
        config.num_hidden_layers = 8  # quicker to build
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    depth = config.num_hidden_layers
    fields = {"model_type": model_type, "num_hidden_layers": depth}
    estimate = estimated_weights(parse_config(fields, "m"), depth)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert estimate.numbers == pytest.approx(built, rel=CLOSE)


def test_what_cannot_be_estimated_says_so() -> None:
    with pytest.raises(InputError, match=r"jamba\) cannot be estimated; name a folder"):
        estimated_weights(parse_config({"model_type": "jamba"}, "m"), 32)


def test_a_token_passes_few_experts() -> None:
    mixtral = parse_config({"model_type": "mixtral"}, "m")
    assert active_share(mixtral, 32) == pytest.approx(
        12.88 / 46.7, rel=0.01
    )  # Mixtral's own figures
    assert active_share(parse_config({"model_type": "llama"}, "m"), 32) == 1.0


@pytest.mark.parametrize("model_type", ["qwen3_next", "jamba", "ernie4_5_moe", "glm_moe_dsa"])
def test_a_share_of_experts_that_are_not_counted_is_not_guessed(model_type: str) -> None:
    assert active_share(parse_config({"model_type": model_type}, "m"), 32) is None


def test_layers_that_predict_several_tokens_are_not_loaded(tmp_path: Path) -> None:
    tensors = {"model.layers.0.w": torch.zeros(4, 2), "mtp.layers.0.w": torch.zeros(9, 9)}
    weights = read_shape(write(tmp_path, tensors | {"mtp.fc.weight": torch.zeros(5, 5)})).weights
    assert weights is not None
    assert weights.numbers == 8


def test_only_the_matrix_that_is_tied_is_copied_to_the_last_stage(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(7, 2),
        "model.embed_positions.weight": torch.zeros(50, 2),
        "model.vision_tower.embed_tokens.weight": torch.zeros(30, 2),
        "model.layers.0.w": torch.zeros(4, 2),
        "model.layers.1.w": torch.zeros(4, 2),
    }
    fields = {"hidden_size": 64, "num_attention_heads": 4, "tie_word_embeddings": True}
    first, last = divide(read_shape(write(tmp_path, tensors, **fields)), 1, 2, "float16")
    assert first.weights_bytes == 2 * 2 * (7 + 50 + 30 + 4)
    assert last.weights_bytes == 2 * 2 * (7 + 4)


def test_an_estimate_ties_tokens_and_not_positions() -> None:
    gpt2 = parse_config({"model_type": "gpt2"}, "m")
    assert estimated_weights(gpt2, 12).tied.matrices == 50257 * 768


def test_weights_may_be_stated_estimated_or_left_out() -> None:
    assert read_shape("builtin", "none").weights_bytes("float16") == 0
    assert read_shape("builtin", "10MB").weights_bytes("float16") == 10_000_000
    estimate, measured = read_shape("builtin", "estimate"), read_shape("builtin")
    assert estimate.weights_bytes("bfloat16") == measured.weights_bytes("bfloat16")
    with pytest.raises(InputError, match="80GiB"):
        read_shape("builtin", "much")


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


@pytest.mark.parametrize(
    "text", ["80G", "", "GiB", "-1GiB", "1e9", "0", "80 Gbit", "9" * 5000, "1." + "9" * 5000]
)
def test_unclear_amounts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="80GiB"):
        parse_bytes(text)


def test_amounts_are_shown_in_gib() -> None:
    assert in_gib(80 * 10**9) == "74.51 GiB"
