"""A planned cache is the allocated one, byte for byte, in every family and scheme."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, RELEASE, build, tokens
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vectors import vectors

from kvqtool.architectures import cache_layers
from kvqtool.attach import attach
from kvqtool.cache import KvqCache
from kvqtool.config import parse_config
from kvqtool.errors import InputError
from kvqtool.layers import Angles, CacheLayer, CacheModel
from kvqtool.memory import LayerGeometry, Outliers, layer_buffers, position_buffer
from kvqtool.probe import probe
from kvqtool.seam import Seam
from kvqtool.spec import parse_spec
from kvqtool.synthetic import synthetic_bundle

# Latent attention in every layer, or in the layers that are there: nothing for kvqtool to pack.
NOT_PACKED = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa")
SPECS = ("fp", "nuq3-5%-sink1", "int4-g16-sink2-r5", "nuq2-9%-cap3-postrope", "nf4-1%-pertoken")
# Past a page of 128 and the windows of 8, so that pages are dropped; in two calls and one token.
LENGTHS = (140, 7, 1)
ADDED = ("gemma4", "gemma4 (shared)", "jamba", "lfm2", "ministral", "qwen3_5", "falcon (new)")


@cache
def probed(name: str) -> tuple[PreTrainedModel, Seam]:
    if name in FAMILIES:
        model = build(name)
    else:
        model_type, options = vectors()[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = CONFIG_MAPPING[model_type](**options)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model, probe(model)


def planned(name: str, spec: str, batch: int) -> CacheModel:
    model_type, options = vectors()[name]
    layers = cache_layers(parse_config({"model_type": model_type, **options}, name))
    return CacheModel(layers, parse_spec(spec), batch, "float32")


@torch.no_grad()
def filled(name: str, spec: str, lengths: tuple[int, ...]) -> KvqCache:
    model, seam = probed(name)
    bundle = synthetic_bundle(parse_spec(spec), {x.index: x.geometry for x in seam.packed})
    ids = tokens(2, sum(lengths))
    with attach(model, bundle, seam=seam) as session:
        held = session.new_cache(bundle)
        for part in ids.split(lengths, dim=1):
            model(part, past_key_values=held, use_cache=True)
    return held


def packed_bytes(cached: CacheModel, held: KvqCache, length: int) -> int:
    """Return the plan for packed layers and angles, given each layer's outliers."""
    counts = [Outliers(*(body.outliers for body in store.bodies)) for store in held.stores]
    return cached.bytes_given(length, counts)


@pytest.mark.parametrize("name", [*FAMILIES, *ADDED])
def test_planned_bytes_are_the_allocated_ones(name: str) -> None:
    if name == "gptj" and RELEASE >= (5, 24):
        pytest.skip("gptj shows its angles from transformers 5.24 on; plans count none")
    if any(name.startswith(family) for family in NOT_PACKED):
        with pytest.raises(InputError, match="latent attention"):
            probed(name)
        return
    number = [*FAMILIES, *ADDED].index(name)
    for spec in (SPECS[number % len(SPECS)], SPECS[(number + 2) % len(SPECS)]):
        if "-r" in spec and name in ("bloom", "falcon", "falcon (new)", "gemma2", "gptj"):
            continue  # attention of their own, or scores capped: no recent window
        if "-r" in spec and name == "gpt_oss":
            continue
        held = filled(name, spec, LENGTHS)
        assert packed_bytes(planned(name, spec, 2), held, sum(LENGTHS)) == held.nbytes, spec


@pytest.mark.parametrize("spec", [*SPECS, "int8", "nuq8-1%/nuq3-0.5%", "nuq4-1%-pc", "int2-r200"])
@pytest.mark.parametrize("length", [1, 127, 128, 300])
def test_planned_bytes_hold_at_every_length(spec: str, length: int) -> None:
    for name in ("llama", "gemma3", "qwen3_next"):
        held = filled(name, spec, (length,))
        assert packed_bytes(planned(name, spec, 2), held, length) == held.nbytes, name


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next", "mistral (window)"])
def test_a_probed_model_gives_the_layers_that_its_config_gives(name: str) -> None:
    held = filled(name, "int4-g16-sink2", (300,))
    plan = planned(name, "int4-g16-sink2", 2)
    probed_layers = tuple(held.seam.cache_layers.values())
    assert packed_bytes(replace(plan, layers=probed_layers), held, 300) == held.nbytes


@pytest.mark.parametrize("name", ["phi3 (longrope)", "llama (dynamic NTK)"])
@pytest.mark.parametrize("length", [60, 600])
def test_angles_become_a_table_where_positions_no_longer_give_them(name: str, length: int) -> None:
    held = filled(name, "int4", (length,))
    assert packed_bytes(planned(name, "int4", 2), held, length) == held.nbytes


def test_layers_of_one_kind_are_the_memory_table() -> None:
    geometry = LayerGeometry(3, 64, 64)
    layers = (CacheLayer("full", geometry, angles=Angles("a", 64)),) * 2
    spec = parse_spec("nuq3-1%-sink1")
    cached = CacheModel(layers, spec, 2, "float16")
    counts = [layer.outliers(spec, 199 * 2, bound=False) for layer in layers]
    tables = [layer_buffers(spec, geometry, 2, 200, count, "float16") for count in counts]
    expected = sum(buffer.nbytes for table in tables for buffer in table.values())
    expected += position_buffer(2, 200).nbytes
    assert cached.nbytes(200) == sum(cached.breakdown(200).values()) == expected
    assert cached.fp16_bytes(200) == 2 * 2 * 2 * 384 * 200


def test_a_window_bounds_what_grows() -> None:
    layer = CacheLayer("sliding", LayerGeometry(2, 16, 16), window=100)
    cached = CacheModel((layer,), parse_spec("int4-pertoken"), 1, "float16")
    assert cached.nbytes(100_000) == cached.nbytes(100_000 + 128)
    assert cached.fp16_bytes(100_000) == 2 * 99 * 64
    assert layer.parts(parse_spec("fp"), 100_000)[1] <= 99 + 128


def test_states_do_not_grow_and_shared_layers_hold_nothing() -> None:
    config = parse_config({"model_type": "qwen3_next"}, "m")
    linear = next(layer for layer in cache_layers(config) if layer.kind == "linear")
    assert linear.own_bytes(3, 1, "bfloat16") == linear.own_bytes(3, 9999, "bfloat16")
    assert CacheLayer("shared").own_bytes(3, 99, "float16") == {}


def test_a_layer_may_have_its_own_scheme() -> None:
    plain = CacheLayer("full", LayerGeometry(2, 16, 16))
    own: Any = CacheLayer("full", LayerGeometry(2, 16, 16), own_spec=parse_spec("int2-pertoken"))
    mixed = CacheModel((plain, own), parse_spec("int8-pertoken"), 1, "float16")
    single = [CacheModel((plain,), parse_spec(f"int{b}-pertoken"), 1, "float16") for b in (8, 2)]
    assert mixed.nbytes(500) == sum(model.nbytes(500) for model in single)


def test_angles_are_stored_once_a_group() -> None:
    layers = cache_layers(parse_config({"model_type": "gemma3_text"}, "m"))
    cached = CacheModel(layers, parse_spec("int4"), 4, "float16")
    assert cached.breakdown(1000)["angles"] == 2 * position_buffer(4, 1000).nbytes
    assert "angles" not in CacheModel(layers, parse_spec("int4-postrope"), 4, "float16").breakdown(
        9
    )
