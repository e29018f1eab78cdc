"""Probing and attaching: rotations found, stock results reproduced, the model left as it was."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from kvqtool.attach import attach
from kvqtool.bundle import Bundle, uncalibrated_bundle
from kvqtool.errors import BundleError, InputError, RunError
from kvqtool.models import LoadedModel
from kvqtool.probe import probe
from kvqtool.seam import Seam
from kvqtool.spec import parse_spec

# Logits of two ways to compute the same thing in float32.
CLOSE = 1e-4
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 128},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}


def rope(kind: str) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama-{kind}": ("Llama", rope(kind)) for kind in ROPES},
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "cohere": ("Cohere", {}),
    "glm": ("Glm", {"attention_bias": False}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "hunyuan": ("HunYuanDenseV1", {}),
}
SAME = [*(f"llama-{kind}" for kind in ROPES), "qwen2", "qwen3"]
ROTATED = [*SAME, "cohere", "glm", "gpt_neox"]


@cache
def model_of(family: str) -> Any:
    name, options = FAMILIES[family]
    ending = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**(SIZES | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}{ending}")(config).eval()
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                # Norms of equal weights commute with rotations; trained ones do not.
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        return model


@cache
def seam_of(family: str) -> Seam:
    return probe(model_of(family))


def bundle_of(seam: Seam, spec: str) -> Bundle:
    return uncalibrated_bundle(parse_spec(spec), {}, [layer.index for layer in seam.packed])


def ids_of(batch: int, tokens: int, vocabulary: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + tokens)
    return torch.randint(2, vocabulary, (batch, tokens), generator=generator)


def hooks_of(model: Any) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


class TestProbe:
    @pytest.mark.parametrize(
        ("family", "layout", "width"),
        [
            *((family, "half", 16) for family in SAME),
            ("cohere", "interleaved", 16),
            ("glm", "interleaved", 8),
            ("gpt_neox", "half", 4),
        ],
    )
    def test_it_finds_how_keys_rotate(self, family: str, layout: str, width: int) -> None:
        layers = seam_of(family).packed
        assert [layer.index for layer in layers] == [0, 1]
        for layer in layers:
            assert layer.rotation is not None
            assert (layer.rotation.layout, layer.rotation.width) == (layout, width)
            assert (layer.rotation.offset, layer.rotation.sign) == (0, 1)
            assert layer.note == f"{layout} {width} of 16"

    @pytest.mark.parametrize("family", ROTATED)
    def test_angles_are_a_function_of_position(self, family: str) -> None:
        assert all(layer.formula is not None for layer in seam_of(family).packed)

    @pytest.mark.parametrize("family", ROTATED)
    def test_layers_that_rotate_alike_share_their_angles(self, family: str) -> None:
        assert {layer.group for layer in seam_of(family).packed} == {0}

    @pytest.mark.parametrize(
        ("family", "note"),
        [
            ("gpt2", "the module is given no rotary tables"),  # positions are in the embedding
            ("hunyuan", "no rotation verified"),  # keys are normalised after they are rotated
        ],
    )
    def test_layers_it_cannot_undo_are_named_and_left(self, family: str, note: str) -> None:
        for layer in seam_of(family).packed:
            assert layer.rotation is None
            assert note in layer.note

    def test_sliding_layers_are_packed_with_their_window(self) -> None:
        options = {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        }
        model: Any = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(SIZES | options)))
        seam = probe(model.eval())
        assert [layer.is_packed for layer in seam.layers] == [True, True]
        assert [layer.window for layer in seam.layers] == [None, 8]

    def test_it_leaves_no_hook_behind(self) -> None:
        model = model_of("llama-default")
        before = hooks_of(model)
        probe(model)
        assert hooks_of(model) == before


@pytest.fixture(params=[*ROTATED, "gpt2", "hunyuan", "builtin"])
def stock(request: pytest.FixtureRequest, builtin: LoadedModel) -> tuple[Any, Seam, int]:
    """Return a model, what the probe found, and its vocabulary."""
    if request.param == "builtin":
        return builtin.model, probe(builtin.model), 8192
    return model_of(request.param), seam_of(request.param), 256


@torch.no_grad()
def fed(model: Any, cache: Any, ids: Tensor, steps: list[int], **options: Any) -> Tensor:
    parts = [
        model(input_ids=part, past_key_values=cache, use_cache=True, **options).logits
        for part in ids.split(steps, 1)
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("prefill", ("exact", "decode-exact"))
@pytest.mark.parametrize("batch", (1, 2))
class TestOff:
    """Quantization off: the cache alone changes nothing."""

    def test_logits_are_those_of_stock_transformers(
        self, stock: tuple[Any, Seam, int], batch: int, prefill: str
    ) -> None:
        model, seam, vocabulary = stock
        ids = ids_of(batch, 30, vocabulary)
        expected = fed(model, transformers.DynamicCache(config=model.config), ids, [20, 7, 1, 1, 1])
        bundle = bundle_of(seam, "fp")
        with attach(model, bundle, seam=seam) as session:
            found = fed(model, session.new_cache(bundle, prefill=prefill), ids, [20, 7, 1, 1, 1])
        assert (found - expected).abs().max() < CLOSE

    def test_greedy_tokens_are_those_of_stock_transformers(
        self, stock: tuple[Any, Seam, int], batch: int, prefill: str
    ) -> None:
        model, seam, vocabulary = stock
        ids = ids_of(batch, 12, vocabulary)
        options = {
            "max_new_tokens": 8,
            "do_sample": False,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(ids),
        }
        expected = model.generate(ids, **options)
        bundle = bundle_of(seam, "fp")
        with attach(model, bundle, seam=seam) as session:
            cache = session.new_cache(bundle, prefill=prefill)
            found = model.generate(ids, past_key_values=cache, **options)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("spec", ("fp", "fp-sink3", "fp-r5", "fp-sink2-r4"))
@pytest.mark.parametrize("family", ("llama-yarn", "qwen3"))
def test_sinks_and_windows_change_nothing_either(family: str, spec: str) -> None:
    model, seam, ids = model_of(family), seam_of(family), ids_of(2, 30)
    expected = fed(model, transformers.DynamicCache(config=model.config), ids, [20, 7, 1, 1, 1])
    bundle = bundle_of(seam, spec)
    with attach(model, bundle, seam=seam) as session:
        cache = session.new_cache(bundle, prefill="decode-exact")
        found = fed(model, cache, ids, [20, 7, 1, 1, 1])
    assert (found - expected).abs().max() < CLOSE


@pytest.mark.parametrize("spec", ("fp", "fp-r5"))
def test_padding_on_the_left_changes_nothing(spec: str) -> None:
    model, seam = model_of("llama-llama3"), seam_of("llama-llama3")
    ids = ids_of(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    bundle = bundle_of(seam, spec)
    with attach(model, bundle, seam=seam) as session:
        found = model.generate(ids, past_key_values=session.new_cache(bundle), **options)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_models_are_understood_too(
    dtype: torch.dtype, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama().to(dtype)
    seam = probe(model)
    assert all(layer.rotation and layer.formula for layer in seam.packed)


class TestPutBack:
    @pytest.fixture(params=("after the block", "after an error"))
    def leave(self, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
        model, seam = model_of("qwen2"), seam_of("qwen2")

        def run(spec: str) -> Any:
            bundle = bundle_of(seam, spec)
            try:
                with attach(model, bundle, seam=seam) as session:
                    fed(model, session.new_cache(bundle), ids_of(1, 4), [4])
                    if request.param == "after an error":
                        raise KeyError
            except KeyError:
                pass
            return model

        yield run

    @pytest.mark.parametrize("spec", ("fp", "fp-r4"))
    def test_hooks_are_gone(self, leave: Callable[[str], Any], spec: str) -> None:
        before = hooks_of(model_of("qwen2"))
        assert hooks_of(leave(spec)) == before

    @pytest.mark.parametrize("spec", ("fp", "fp-r4"))
    def test_attention_is_the_models_own(self, leave: Callable[[str], Any], spec: str) -> None:
        before = model_of("qwen2").config._attn_implementation
        assert leave(spec).config._attn_implementation == before


class TestMisuse:
    def test_a_cache_outside_the_block_says_so(self) -> None:
        model, seam = model_of("qwen2"), seam_of("qwen2")
        bundle = bundle_of(seam, "fp")
        with attach(model, bundle, seam=seam) as session:
            cache = session.new_cache(bundle)
        with pytest.raises(RunError, match="outside `with attach"):
            fed(model, cache, ids_of(1, 4), [4])

    def test_a_window_the_session_was_not_made_for_says_so(self) -> None:
        model, seam = model_of("qwen2"), seam_of("qwen2")
        with (
            attach(model, bundle_of(seam, "fp"), seam=seam) as session,
            pytest.raises(
                InputError, match=r"fp-r4 keeps a recent window; pass the spec to attach"
            ),
        ):
            session.new_cache(bundle_of(seam, "fp-r4"))

    def test_an_unknown_prefill_says_which_there_are(self) -> None:
        model, seam = model_of("qwen2"), seam_of("qwen2")
        with (
            attach(model, seam=seam) as session,
            pytest.raises(InputError, match="'fast' is unknown; use exact or decode-exact"),
        ):
            session.new_cache(bundle_of(seam, "fp"), prefill="fast")

    def test_a_bundle_of_fewer_layers_says_so(self) -> None:
        model, seam = model_of("qwen2"), seam_of("qwen2")
        bundle = uncalibrated_bundle(parse_spec("fp"), {}, [0])
        with (
            attach(model, bundle, seam=seam) as session,
            pytest.raises(BundleError, match="no codebook for layer 1"),
        ):
            session.new_cache(bundle)
