"""What a bundle or a saved cache must match to belong to a model."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvqtool.errors import InputError
from kvqtool.memory import LayerGeometry

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelIdentity:
    """A model, told apart by what changes its cache; every field has a JSON form.

    Args:
        name: the model as the user named it: `builtin`, a folder's name, a hub id.
        architecture: class name of the model, as its config gives it.
        num_layers: layers that own a KV cache.
        layers: shapes of each of these layers' caches.
        vocab_size: rows of the embedding.
        max_context: longest sequence the config promises.
        tokenizer_sha256: of the sorted vocabulary.
        rope_sha256: of every rotary module's frequencies and attention scaling; "" without any.
    """

    name: str
    architecture: str
    num_layers: int
    layers: tuple[LayerGeometry, ...]
    vocab_size: int
    max_context: int
    tokenizer_sha256: str
    rope_sha256: str

    def as_json(self) -> dict[str, Any]:
        """Return the identity as it comes back from a file: dicts and lists only."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}


def identify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str
) -> ModelIdentity:
    """Return the identity of a model that is in memory.

    Args:
        model: a causal language model of transformers.
        tokenizer: the tokenizer its texts are made with.
        name: what reports call it.

    Raises:
        InputError: when the config does not say how long a sequence may be.
    """
    config: Any = model.config.get_text_config(decoder=True)
    max_context = getattr(config, "max_position_embeddings", None)
    if not max_context:
        raise InputError(
            f"model {name!r} states no max_position_embeddings; add it to its config.json"
        )
    layers = _geometry(config)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return ModelIdentity(
        name=name,
        architecture=(model.config.architectures or [type(model).__name__])[0],
        num_layers=len(layers),
        layers=layers,
        vocab_size=config.vocab_size,
        max_context=max_context,
        tokenizer_sha256=hashlib.sha256(vocabulary).hexdigest(),
        rope_sha256=_rope_sha256(model),
    )


def _geometry(config: PretrainedConfig) -> tuple[LayerGeometry, ...]:
    """Return the promised shapes of each layer that transformers gives a growing KV cache."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    owners = (DynamicLayer, DynamicSlidingWindowLayer)
    num_layers = sum(type(layer) in owners for layer in DynamicCache(config=config).layers)
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return (LayerGeometry(num_kv_heads, head_dim, head_dim),) * num_layers


def _rope_sha256(model: torch.nn.Module) -> str:
    """Hash the rotary frequencies of a model, in module order.

    Frequencies are rounded to bfloat16 first: the last bit of a float32 power differs between
    processors and between a CPU and a GPU, and a bundle must fit the same model on all of them.
    """
    digest, found = hashlib.sha256(), False
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name in sorted(buffers):
            if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
                continue
            rounded = buffers[name].detach().cpu().to(torch.bfloat16).float()
            scaling = getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0)
            digest.update(name.encode() + rounded.numpy().tobytes() + struct.pack("<f", scaling))
            found = True
    return digest.hexdigest() if found else ""
