"""Llamas of published shapes with random weights, and caches filled without running them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.layer import KvqLayer
from kvqtool.probe import probe
from kvqtool.seam import Seam
from kvqtool.spec import parse_spec
from kvqtool.synthetic import synthetic_bundle

LLAMA3_ROPE: Final = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    rope: dict[str, object] | None = None


SHAPES: Final = {
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 14336, 128256, LLAMA3_ROPE),
    "llama-7b": Shape(32, 4096, 32, 32, 11008, 32000),
    "tiny": Shape(2, 256, 4, 2, 512, 1000),  # to see on a CPU that a benchmark runs
}


@torch.no_grad()
def random_llama(
    name: str, dtype: torch.dtype, device: torch.device, layers: int | None = None
) -> tuple[PreTrainedModel, Seam]:
    """Return a model of a shape, normal weights of 0.02, and what the probe finds of it."""
    shape = SHAPES[name]
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2**21,
        rope_parameters=shape.rope or {"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="sdpa",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return model, probe(model)


def bundle_of(model: PreTrainedModel, seam: Seam, spec: str) -> Bundle:
    """Return codebooks for a random model: its keys are normal, as wide as their weights."""
    layers = {layer.index: layer.geometry for layer in seam.packed}
    weights = [layer.self_attn.k_proj.weight for layer in model.model.layers]
    spreads = {index: weights[index].float().norm(dim=1).cpu() for index in layers}
    return synthetic_bundle(parse_spec(spec), layers, spreads)


@torch.no_grad()
def fill(cache: KvqCache, seam: Seam, shape: tuple[int, int], chunk: int, like: Tensor) -> None:
    """Put synthetic tokens into an empty cache, as if a prompt had been read: normal keys and
    values of unit variance, every 32nd key channel four times as wide.

    Args:
        cache: the cache.
        seam: the model's layers.
        shape: (sequences, tokens).
        chunk: tokens of a piece.
        like: any tensor of the states' dtype and device.
    """
    (batch, tokens), device = shape, like.device
    random = torch.Generator(device).manual_seed(0)
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        positions = torch.arange(start, start + count, device=device).expand(batch, -1)
        for number, angles in cache.angles.items():
            layer = next(s for s in seam.packed if s.group == number)
            assert layer.formula is not None and layer.rotation is not None
            tables = layer.rotation.model_tables(*layer.formula.tables(positions))
            angles.extend(*tables, positions, batch)
        for held in cache.layers:
            assert isinstance(held, KvqLayer)
            geometry = seam.layers[held.store.layer].geometry
            size = batch, geometry.num_kv_heads, count, geometry.key_dim
            key, value = (
                torch.empty(size, dtype=like.dtype, device=device).normal_(generator=random)
                for _ in range(2)
            )
            key[..., ::32] *= 4
            held.store.append(key, value, held.read_angles)
            held.path.is_offered = held.path.is_witnessed = True
