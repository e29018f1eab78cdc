"""Watch key and value states, and what the loss is sensitive to, layer by layer while a model runs.

Weights are frozen and no activation is kept for us: a cache that stores nothing is given every
layer's keys and values and hands them on, and hooks on the two tensors hand on their gradients as
they are computed. Keys and their gradients are taken back before RoPE where the layer's rotation is
known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from kvqtool.forward import head_of, hidden_states, position_chunks
from kvqtool.probe import call_arguments, rotary_tables
from kvqtool.queries import watch_queries
from kvqtool.seam import LayerSeam, Seam

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Above this estimate of one window's activations, layers are recomputed in the backward pass
# instead of kept.
_ACTIVATION_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class KeyStates:
    """One layer's keys in both forms, each (tokens, channels) float32; the same tensor where
    nothing rotates.
    """

    before_rope: Tensor
    after_rope: Tensor

    def form(self, pre_rope: bool) -> Tensor:
        """Return the form a scheme quantizes."""
        return self.before_rope if pre_rope else self.after_rope


class Watcher(ABC):
    """Takes what a capture sees; tokens are those of one window, in order, channels all KV heads of
    the layer.
    """

    @abstractmethod
    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        """Take a layer's keys, with the loss's gradients in both forms if they were asked for."""

    @abstractmethod
    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        """Take a layer's values (tokens, channels) float32, with gradients if they were asked
        for.
        """

    @property
    def needs_queries(self) -> bool:
        """Whether `query` is to be called."""
        return False

    def query(self, layer: int, norms: Tensor) -> None:
        """Take a layer's squared query norms, softmax scale included, (1, num_heads, tokens)."""
        raise NotImplementedError(f"{type(self).__name__} asks for no queries")


@contextmanager
def capture(
    model: PreTrainedModel, seam: Seam, watcher: Watcher, *, gradients: bool
) -> Iterator[Capture]:
    """Let a watcher see the states of every packed layer while windows run inside the block.

    Args:
        model: a causal language model in eval mode; it is put back as it was.
        seam: what `attach.probe` found.
        watcher: takes the states.
        gradients: whether to run the backward pass and hand on gradients too.
    """
    run = Capture(model, seam, watcher, gradients=gradients)
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        if watcher.needs_queries:
            stack.enter_context(watch_queries(model, seam, watcher.query))
        for layer in seam.packed:
            if layer.module is not None:
                handle = layer.module.register_forward_pre_hook(run.enter, with_kwargs=True)
                stack.callback(handle.remove)
        yield run


class Capture:
    """Runs windows through a model and hands what its cache would be given to a watcher."""

    def __init__(
        self, model: PreTrainedModel, seam: Seam, watcher: Watcher, *, gradients: bool
    ) -> None:
        """Prepare; use `capture`."""
        self.model = model
        self.watcher = watcher
        self.gradients = gradients
        self._layers = {layer.module: layer for layer in seam.packed}
        self._by_index = {layer.index: layer for layer in seam.packed}
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, ids: Tensor) -> None:
        """Run one window, (tokens,) int64, and hand all its layers' states to the watcher."""
        inputs = {"input_ids": ids[None].to(self.model.device)}
        cache = _PassingCache(self)
        if not self.gradients:
            with torch.no_grad():
                hidden_states(self.model, inputs, cache)
            return
        embedding = self.model.get_input_embeddings()
        # Weights are frozen, so the graph starts at the embedded tokens.
        handle = embedding.register_forward_hook(lambda *call: call[2].requires_grad_())
        try:
            with torch.enable_grad(), _checkpointed(self.model, len(ids), cache):
                self._backward(hidden_states(self.model, inputs, cache), ids.to(self.model.device))
        finally:
            handle.remove()

    def _backward(self, hidden: Tensor, ids: Tensor) -> None:
        """Backpropagate the summed next-token loss, head and loss in chunks of positions."""
        leaf = hidden.detach().requires_grad_()
        with head_of(self.model) as head:
            for chunk in position_chunks(self.model, len(ids) - 1):
                logits = head(leaf[:, chunk])
                targets = ids[chunk.start + 1 : chunk.stop + 1].to(logits.device)
                nn.functional.cross_entropy(logits[0], targets, reduction="sum").backward()
        hidden.backward(leaf.grad)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of the angles a layer's keys are rotated by (a forward pre-hook)."""
        layer = self._layers[module]
        tables = rotary_tables(call_arguments(module, args, kwargs).get("position_embeddings"))
        if layer.rotation is not None and tables is not None:
            cos, sin = (part[0, :, None] for part in layer.rotation.angles(*tables))
            self._angles[layer.index] = cos, sin

    def see(self, index: int, key: Tensor, value: Tensor) -> None:
        """Hand on one layer's states, or ask for their gradients and hand on both.

        Args:
            index: the cache layer's index.
            key: (1, num_kv_heads, tokens, key_dim) after RoPE.
            value: (1, num_kv_heads, tokens, value_dim).
        """
        layer = self._by_index.get(index)
        if layer is None:
            return
        both = partial(self._forms, layer, self._angles.get(index))
        if not self.gradients:
            self.watcher.key(index, both(key, "unrotate"), None)
            self.watcher.value(index, _rows(value).flatten(1), None)
            return
        plain_key, plain_value = key.detach(), value.detach()
        key.register_hook(
            lambda g: self.watcher.key(index, both(plain_key, "unrotate"), both(g, "pull_back"))
        )
        value.register_hook(
            lambda g: self.watcher.value(index, _rows(plain_value).flatten(1), _rows(g).flatten(1))
        )

    @staticmethod
    def _forms(
        layer: LayerSeam, angles: tuple[Tensor, Tensor] | None, states: Tensor, turn: str
    ) -> KeyStates:
        """Return keys or their gradients in both forms; `turn` is how to get before RoPE."""
        rows = _rows(states)
        if layer.rotation is None or angles is None:
            return KeyStates(rows.flatten(1), rows.flatten(1))
        turned = getattr(layer.rotation, turn)(rows, *(part.to(rows.device) for part in angles))
        return KeyStates(turned.flatten(1), rows.flatten(1))


class _PassingCache(DynamicCache):
    """A cache that stores nothing: it shows states to a capture and returns them as they came."""

    def __init__(self, run: Capture) -> None:
        super().__init__(config=run.model.config)
        self._run = run

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        # When a checkpointed layer is recomputed its states pass by again, outside the graph.
        if key_states.requires_grad or not self._run.gradients:
            self._run.see(layer_idx, key_states, value_states)
        return key_states, value_states


def _rows(states: Tensor) -> Tensor:
    """(1, H, T, D) -> (T, H, D) float32."""
    return states[0].transpose(0, 1).float()


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Compute no gradient for any weight inside the block."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _checkpointed(model: PreTrainedModel, tokens: int, cache: DynamicCache) -> Iterator[None]:
    """Recompute layers in the backward pass where keeping their activations would take too much.

    transformers' own checkpointing takes the cache away and needs training mode; this neither.
    """
    config = model.config.get_text_config(decoder=True)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = 16 * config.hidden_size + 4 * (max(inner) if isinstance(inner, list) else inner)
    depth = config.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    has_state = any(not isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    if depth * tokens * width * 4 < _ACTIVATION_BYTES or not stacks or has_state:
        yield
        return
    # A spread model's layers have a forward of their own, accelerate's, which moves what they take.
    before = [layer.__dict__.get("forward") for layer in stacks[0]]
    for layer in stacks[0]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, own in zip(stacks[0], before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own
