"""The caches of well-known models by this planner and by two public calculators' formulas.

    python benchmarks/calculators.py

One 16-bit sequence of 131,072 tokens, GiB; the table of docs/memory-plan.md. The formulas are those
that the calculators publish, applied to what the models' configs state:

- hf-mem (github.com/alvarobartt/hf-mem, src/hf_mem/safetensors/kv_cache.py, read at 37d26e2):
  2 x full layers x key/value heads x head_dim; full layers by `sliding_window_pattern` or
  `layer_types`, else all of them.
- the kv-cache-calculator space (huggingface.co/spaces/gaunernst/kv-cache-calculator, app.py): all
  layers x key/value heads x head_dim x 2, and for DeepSeek V2 and V3 all layers x (kv_lora_rank +
  qk_rope_head_dim).
"""

from __future__ import annotations

from typing import Final

from kvqtool.config import ModelConfig
from kvqtool.layers import CacheModel
from kvqtool.shape import ModelShape, read_shape
from kvqtool.spec import parse_spec

TOKENS: Final = 131072
MODELS: Final = (
    *("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "mixtral-8x7b", "command-r-35b"),
    *("qwen2.5-7b", "mistral-7b-v0.1", "gemma-2-27b", "gemma-3-27b", "gpt-oss-120b"),
    *("llama-4-scout", "qwen3-next-80b-a3b", "deepseek-v3"),
)


def main() -> None:
    """Print the table as TSV."""
    print("model\tkvqtool, fp16\tkvqtool, nuq3-1%-sink1\thf-mem\tkv-cache-calculator")
    for name in MODELS:
        shape = read_shape(name)
        three = CacheModel(shape.layers, parse_spec("nuq3-1%-sink1"), 1, "bfloat16")
        figures = (
            three.fp16_bytes(TOKENS),
            three.nbytes(TOKENS),
            hf_mem(shape),
            kv_cache_calculator(shape),
        )
        print("\t".join([name, *(f"{figure / 2**30:.2f}" for figure in figures)]))


def hf_mem(shape: ModelShape) -> int:
    """Return hf-mem's bytes."""
    config, layers = shape.config, len(shape.layers)
    if config.get("sliding_window_pattern"):
        layers //= config.count("sliding_window_pattern")
    elif config.model_type == "gpt_oss":  # its config lists layer_types
        layers = sum(layer.kind == "full" for layer in shape.layers)
    heads = config.count("num_attention_heads")
    width = config.stated.get("head_dim") or config.count("hidden_size") // heads
    return 2 * layers * _kv_heads(config) * width * TOKENS * 2


def kv_cache_calculator(shape: ModelShape) -> int:
    """Return the bytes of the kv-cache-calculator space."""
    config, layers = shape.config, len(shape.layers)
    if config.model_type in ("deepseek_v2", "deepseek_v3"):
        numbers = config.count("kv_lora_rank") + config.count("qk_rope_head_dim")
    else:
        heads = config.count("num_attention_heads")
        width = config.get("head_dim") or config.count("hidden_size") // heads
        numbers = 2 * _kv_heads(config) * width
    return layers * numbers * TOKENS * 2


def _kv_heads(config: ModelConfig) -> int:
    return config.optional("num_key_value_heads") or config.count("num_attention_heads")


if __name__ == "__main__":
    main()
