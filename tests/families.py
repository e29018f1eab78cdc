"""Tiny random models of every family kvqtool is verified on, and the check each goes through.

tests/test_families.py runs it family by family, tests/models_page.py writes docs/models.md from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvqtool.attach import attach
from kvqtool.bundle import uncalibrated_bundle
from kvqtool.calibrate import calibrate
from kvqtool.data import Text, Windows
from kvqtool.errors import InputError
from kvqtool.models import LoadedModel, ModelIdentity
from kvqtool.seam import Seam
from kvqtool.spec import parse_spec

VOCABULARY: Final = 256
RELEASE: Final = tuple(map(int, transformers.__version__.split(".")[:2]))
# transformers that gives gemma2 sdpa, which leaves out the cap on its scores, among others.
IS_OLD: Final = RELEASE < (5, 23)
PROMPT: Final = 20
SIZES: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 255,
}
HEADED: Final = SIZES | {"head_dim": 16}
MOE: Final[dict[str, Any]] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MIXED: Final = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
MLA: Final = SIZES | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def rope(kind: str, **options: Any) -> dict[str, Any]:
    """Return rope parameters of a kind."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}


LONG: Final = {"original_max_position_embeddings": 64}
LONGROPE: Final = rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, **LONG)
# family -> (config class, options); the model class follows from the config.
FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("LlamaConfig", HEADED),
    "llama (llama3 rope)": (
        "LlamaConfig",
        HEADED | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **LONG),
    ),
    "llama (yarn)": ("LlamaConfig", HEADED | rope("yarn", factor=4.0, **LONG)),
    "llama (linear rope)": ("LlamaConfig", HEADED | rope("linear", factor=4.0)),
    "llama (dynamic NTK)": ("LlamaConfig", HEADED | rope("dynamic", factor=4.0)),
    "mistral (window)": ("MistralConfig", HEADED | {"sliding_window": 8}),
    "mixtral": ("MixtralConfig", HEADED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        SIZES | MOE | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "qwen3": ("Qwen3Config", HEADED),
    "qwen3_moe": ("Qwen3MoeConfig", HEADED | MOE | {"decoder_sparse_step": 1}),
    "qwen3_next": (
        "Qwen3NextConfig",
        HEADED
        | MOE
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 32,
            "decoder_sparse_step": 1,
        },
    ),
    "gemma": ("GemmaConfig", HEADED),
    # A cap that scores of a random model reach.
    "gemma2": ("Gemma2Config", HEADED | MIXED | {"attn_logit_softcapping": 0.1}),
    "gemma3": ("Gemma3TextConfig", HEADED | MIXED),
    "gemma3n": (
        "Gemma3nTextConfig",
        HEADED
        | {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "intermediate_size": [96] * 4,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "phi": ("PhiConfig", SIZES),
    "phi3": ("Phi3Config", SIZES),
    "phi3 (longrope)": ("Phi3Config", SIZES | LONGROPE | LONG),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "glm4": ("Glm4Config", HEADED),
    "cohere": ("CohereConfig", SIZES),
    "cohere2": ("Cohere2Config", HEADED | MIXED),
    "olmo2": ("Olmo2Config", SIZES),
    "olmo3": ("Olmo3Config", SIZES | MIXED),
    "granite": ("GraniteConfig", SIZES),
    "smollm3": ("SmolLM3Config", SIZES | {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLmConfig", SIZES),
    "starcoder2": ("Starcoder2Config", SIZES),
    "ernie4_5": ("Ernie4_5Config", HEADED),
    "exaone4": ("Exaone4Config", SIZES | MIXED),
    "llama4 (text)": (
        "Llama4TextConfig",
        HEADED
        | {
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 0],
            "interleave_moe_layer_step": 2,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        HEADED | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v2": ("DeepseekV2Config", MLA | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", MLA),
    "falcon": ("FalconConfig", SIZES | {"new_decoder_architecture": False, "multi_query": True}),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    ),
    "opt": ("OPTConfig", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    ),
    "nanochat": ("NanoChatConfig", SIZES),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", HEADED),
}


def build(family: str) -> PreTrainedModel:
    """Return a family's tiny random model, the same weights each time."""
    return build_from(*FAMILIES[family])


def build_from(config_class: str, options: dict[str, Any]) -> PreTrainedModel:
    """Return the random model of a config class and its options, the same weights each time."""
    config = getattr(transformers, config_class)(**options)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
        # Fresh weights are too tame: flat distributions, and norms of weight one that commute with
        # a rotation.
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(3.0) if weight.dim() > 1 else weight.add_(
                    0.2 * torch.randn_like(weight)
                )
    return model.eval()


@dataclass(frozen=True)
class Verdict:
    """What the check found of a family; figures are None where it was refused.

    Args:
        refusal: why, or None.
        seam: what the probe found.
        logits_error: greatest difference from stock logits with quantization off, float32.
        tokens_are_equal: whether greedy tokens are those of the stock cache, quantization off.
        kld: mean divergence of next-token distributions at 8 bits, nats.
    """

    refusal: str | None
    seam: Seam | None = None
    logits_error: float | None = None
    tokens_are_equal: bool | None = None
    kld: float | None = None

    @property
    def layers(self) -> list[str]:
        """A short line per cache layer."""
        if self.seam is None:
            return []
        return [
            f"{'sliding' if layer.window else 'full' if layer.is_packed else 'stock'}: {layer.note}"
            for layer in self.seam.layers
        ]


@cache
def check(family: str) -> Verdict:
    """Probe a family, run it exactly and at 8 bits, and compare with its stock cache."""
    model = build(family)
    loaded = loaded_model(family, model)
    try:
        seam = loaded.seam
    except InputError as refusal:
        return Verdict(str(refusal))
    specs = [parse_spec(text) for text in ("int8-sink1", "nuq4-1%-sink1")]
    eight, _ = calibrate(loaded, learned(), specs)
    layers = [layer.index for layer in seam.packed]
    exact = uncalibrated_bundle(parse_spec("fp"), loaded.identity.as_json(), layers)
    ids = tokens(2, PROMPT)
    with torch.no_grad(), attach(model, seam=seam) as session:
        stock = logits(model, ids, None)
        found = logits(model, ids, session.new_cache(exact, prefill="decode-exact"))
        packed = logits(model, ids, session.new_cache(eight, prefill="decode-exact"))
        ours, theirs = greedy(model, ids, session.new_cache(exact)), greedy(model, ids, None)
    return Verdict(
        None,
        seam,
        (found - stock).abs().max().item(),
        torch.equal(ours, theirs),
        divergence(stock, packed),
    )


def loaded_model(name: str, model: PreTrainedModel) -> LoadedModel:
    """Wrap a model in memory; nothing here needs a tokenizer."""
    identity = ModelIdentity(name, type(model).__name__, 0, (), VOCABULARY, 512, "", "")
    return LoadedModel(identity, model, None, torch.device("cpu"), model.dtype)  # type: ignore[arg-type]


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids (batch, length) that are no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY - 1, (batch, length), generator=generator)


def learned() -> Windows:
    """Return calibration windows of random tokens."""
    text = Text("", "random tokens", "")
    return Windows(tokens(4, 64, seed=1), torch.ones(4, dtype=torch.int64), text, "", 64)


def logits(model: PreTrainedModel, ids: Tensor, cache: Cache | None) -> Tensor:
    """Return float32 logits (batch, tokens, vocabulary) of one forward."""
    return model(ids, past_key_values=cache, use_cache=cache is not None).logits.float()


def greedy(model: PreTrainedModel, ids: Tensor, cache: Cache | None) -> Tensor:
    """Return twelve greedy tokens of transformers' own generate."""
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


def divergence(stock: Tensor, packed: Tensor) -> float:
    """Return the mean KL divergence of two runs' next-token distributions, nats."""
    plain, other = stock.log_softmax(-1), packed.log_softmax(-1)
    return (plain.exp() * (plain - other)).sum(-1).mean().item()
