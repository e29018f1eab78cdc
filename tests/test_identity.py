"""Identity: equal for the same model wherever it runs, different where its cache would be."""

import dataclasses
import json
from typing import Any

import pytest
from conftest import TinyLlama

from kvqtool.errors import InputError
from kvqtool.identity import ModelIdentity, identify
from kvqtool.memory import LayerGeometry
from kvqtool.models import LoadedModel
from kvqtool.shape import read_shape


class Vocabulary:
    """A tokenizer that is only asked for its vocabulary."""

    def __init__(self, **tokens: int) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return self.tokens


def identity_of(model: Any, **tokens: int) -> ModelIdentity:
    tokenizer: Any = Vocabulary(**(tokens or {"a": 0, "b": 1}))
    return identify(model, tokenizer, name="tiny")


@pytest.mark.parametrize(("gqa", "heads"), [(True, 2), (False, 4)])
def test_geometry_is_the_configs(tiny_llama: TinyLlama, gqa: bool, heads: int) -> None:
    assert identity_of(tiny_llama(gqa=gqa)).layers == (LayerGeometry(heads, 16, 16),) * 2


def test_head_dim_may_follow_from_the_hidden_size(tiny_llama: TinyLlama) -> None:
    assert identity_of(tiny_llama(head_dim=None)).layers[0].key_dim == 16


def test_the_planner_reads_the_same_geometry_without_torch(builtin: LoadedModel) -> None:
    planned = tuple(layer.geometry for layer in read_shape("builtin").layers)
    assert planned == builtin.identity.layers


def test_dtype_and_weights_do_not_matter(tiny_llama: TinyLlama) -> None:
    import torch

    expected = identity_of(tiny_llama())
    assert identity_of(tiny_llama(seed=1)) == expected
    assert identity_of(tiny_llama().to(torch.bfloat16)) == expected


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_another_rotation_is_another_model(tiny_llama: TinyLlama, rope: dict[str, Any]) -> None:
    plain = identity_of(tiny_llama())
    other = identity_of(tiny_llama(rope_parameters=rope))
    assert other.rope_sha256 != plain.rope_sha256
    assert dataclasses.replace(other, rope_sha256=plain.rope_sha256) == plain


def test_running_a_model_does_not_change_it(tiny_llama: TinyLlama) -> None:
    import torch

    model = tiny_llama()
    before = identity_of(model)
    model(torch.arange(300)[None] % 256)
    assert identity_of(model) == before


def test_a_model_without_rotation_has_no_fingerprint() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=8, n_positions=64)
    )
    identity = identity_of(model)
    assert identity.rope_sha256 == ""
    assert identity.layers == (LayerGeometry(2, 16, 16),) * 2
    assert identity.max_context == 64


def test_vocabulary_is_compared_not_its_order(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    first = identity_of(model, a=0, b=1).tokenizer_sha256
    assert identity_of(model, b=1, a=0).tokenizer_sha256 == first
    assert identity_of(model, a=1, b=0).tokenizer_sha256 != first


def test_json_form_survives_json(builtin: LoadedModel) -> None:
    plain = builtin.identity.as_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["layers"][0] == {"num_kv_heads": 2, "key_dim": 64, "value_dim": 64}
    assert set(plain) == {field.name for field in dataclasses.fields(ModelIdentity)}


def test_a_config_must_say_its_context(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    model.config.max_position_embeddings = 0
    with pytest.raises(InputError, match=r"'tiny' states no max_position_embeddings; add it"):
        identity_of(model)
