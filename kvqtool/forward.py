"""Run a model in two halves: the layers once, the output head on as many positions at a time as
memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvqtool.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of a chunk stay below this many bytes in float32.
_CHUNK_BYTES: Final = 128 << 20
_CACHE_NAMES: Final = ("past_key_values", "cache")  # the latter from transformers 5.24 on


def hidden_states(
    model: PreTrainedModel, inputs: dict[str, Tensor], cache: Cache | None = None
) -> Tensor:
    """Run the layers without the head.

    Args:
        model: a causal language model.
        inputs: `input_ids` (batch, tokens) int64, and what else the model's forward takes.
        cache: written and attended to; None to run without one.

    Returns:
        (batch, tokens, hidden) after the last norm.
    """
    layers = layers_of(model)
    given = {} if cache is None else {cache_name(layers) or _CACHE_NAMES[0]: cache}
    output: Tensor = layers(**inputs, **given, use_cache=cache is not None).last_hidden_state
    return output


def cache_name(module: nn.Module) -> str | None:
    """Return what a module's forward calls its cache, None where it takes none."""
    return _cache_name(type(module).forward)


@lru_cache
def _cache_name(forward: Callable[..., Any]) -> str | None:
    parameters = signature(forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


def next_logits(
    model: PreTrainedModel, ids: Tensor, cache: Cache, positions: Tensor | None = None
) -> Tensor:
    """Run tokens through a model and its cache and return what comes after the last one.

    Args:
        model: a causal language model.
        ids: (batch, tokens) int64.
        cache: written and attended to.
        positions: (batch, tokens) int64; None where the model counts by its cache.

    Returns:
        (batch, vocabulary) float32 logits.
    """
    inputs = {"input_ids": ids} | ({} if positions is None else {"position_ids": positions})
    hidden = hidden_states(model, inputs, cache)[:, -1:]
    with head_of(model) as head:
        return head(hidden)[:, 0]


@dataclass(frozen=True)
class Reading:
    """How a prompt is read.

    Args:
        prefill: `exact` or `decode-exact`, see `Session.new_cache`.
        chunk: tokens that one call reads; None for all of them. Tokens of the first call attend to
            what `prefill` says, later ones to what is stored, themselves included.
    """

    prefill: str = "exact"
    chunk: int | None = None


def read_prompt(model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int | None) -> Tensor:
    """Return what `next_logits` does, reading at most `chunk` tokens of each sequence a call."""
    last = (ids.shape[1] - 1) // chunk * chunk if chunk else 0
    for start in range(0, last, chunk or 1):
        hidden_states(model, {"input_ids": ids[:, start : start + (chunk or 1)]}, cache)
    return next_logits(model, ids[:, last:], cache)


def position_chunks(model: PreTrainedModel, positions: int) -> Iterator[slice]:
    """Cut positions into runs whose logits fit a fixed amount of memory."""
    size = max(_CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size), 1)
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


def layers_of(model: PreTrainedModel) -> nn.Module:
    """Return the module that holds a model's layers: all of it but the output head.

    Raises:
        InputError: when the model does not tell the two apart.
    """
    layers = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if layers is not None and layers is not model:
        return layers
    takers = [m for m in model.children() if "inputs_embeds" in signature(m.forward).parameters]
    if len(takers) != 1:
        name = type(model).__name__
        raise InputError(f"{name} does not say which part of it is the output head; not supported")
    return takers[0]


@contextmanager
def head_of(model: PreTrainedModel) -> Iterator[HeadOnly]:
    """Give the model's own output head inside the block: all that its forward does after the
    layers.

    The layers are swapped for a module that returns what it is given, so scaling, soft-capping and
    whatever else a family puts behind them is the model's own code.
    """
    layers = layers_of(model)
    name = next(name for name, module in model.named_modules() if module is layers)
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, attribute, _Given())
    try:
        yield HeadOnly(model)
    finally:
        setattr(parent, attribute, layers)


class HeadOnly:
    """Hidden states to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Keep the model, whose layers pass through what they are given."""
        self.model = model

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits (batch, positions, vocabulary) in float32 for hidden states (batch,
        positions, hidden).
        """
        logits: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        return logits.float()


class _Given(nn.Module):
    """Stands in for a model's layers: returns its input embeddings as the last hidden state."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _GivenOutput:
        return _GivenOutput(last_hidden_state=inputs_embeds)


class _GivenOutput(BaseModelOutputWithPast):
    """An output that has nothing but the last hidden state, whatever a family's head asks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
