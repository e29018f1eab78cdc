"""Watch key and value states, and what the loss is sensitive to, layer by layer while a model runs.

Weights are frozen and no activation is kept for us: an attention function that transformers calls
with every layer's keys and values hands them on, and hooks on the two tensors hand on their
gradients as they are computed. Keys and their gradients are taken back before RoPE where the
layer's rotation is known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvqtool.attach import replaced_attention
from kvqtool.forward import head_of, hidden_states, position_chunks
from kvqtool.seam import LayerSeam, Seam

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAPTURE: Final = "kvqtool_capture"
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

    Raises:
        InputError: when the model does not let its attention be replaced.
    """
    run = Capture(model, seam, watcher, gradients=gradients)
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        stack.enter_context(replaced_attention(model, CAPTURE, _register))
        for layer in seam.packed:
            assert layer.module is not None
            handle = layer.module.register_forward_pre_hook(run.enter, with_kwargs=True)
            stack.callback(handle.remove)
        yield run


class Capture:
    """Runs windows through a model and hands what attention sees to a watcher."""

    def __init__(
        self, model: PreTrainedModel, seam: Seam, watcher: Watcher, *, gradients: bool
    ) -> None:
        """Prepare; use `capture`."""
        self.model = model
        self.watcher = watcher
        self.gradients = gradients
        self._layers = {layer.module: layer for layer in seam.packed}

    def run(self, ids: Tensor) -> None:
        """Run one window, (tokens,) int64, and hand all its layers' states to the watcher."""
        embedded = self.model.get_input_embeddings()(ids[None].to(self.model.device))
        if not self.gradients:
            with torch.no_grad():
                hidden_states(self.model, {"inputs_embeds": embedded})
            return
        with _checkpointed(self.model, len(ids)):
            self._backward(embedded.detach().requires_grad_(), ids.to(self.model.device))

    def _backward(self, embedded: Tensor, ids: Tensor) -> None:
        """Backpropagate the summed next-token loss, head and loss in chunks of positions."""
        hidden = hidden_states(self.model, {"inputs_embeds": embedded})
        leaf = hidden.detach().requires_grad_()
        with head_of(self.model) as head:
            for chunk in position_chunks(self.model, len(ids) - 1):
                logits = head(leaf[:, chunk])
                targets = ids[chunk.start + 1 : chunk.stop + 1]
                nn.functional.cross_entropy(logits[0], targets, reduction="sum").backward()
        hidden.backward(leaf.grad)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Leave a note for the attention function: which layer it is called for, and its angles (a
        forward hook).
        """
        layer = self._layers[module]
        angles = None
        if layer.rotation is not None:
            given = kwargs["position_embeddings"]
            tables = (given.real, given.imag) if isinstance(given, Tensor) else given
            angles = tuple(part[0, :, None] for part in layer.rotation.angles(*tables))
        module._kvqtool_capture = (self, layer, angles)  # type: ignore[assignment]  # read by capture_attention

    def see(
        self, layer: LayerSeam, angles: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor
    ) -> None:
        """Hand on one layer's states, or ask for their gradients and hand on both."""

        def key_states(states: Tensor, turn: str) -> KeyStates:
            rows = _rows(states)
            if angles is None or layer.rotation is None:
                return KeyStates(rows.flatten(1), rows.flatten(1))
            return KeyStates(
                getattr(layer.rotation, turn)(rows, *angles).flatten(1), rows.flatten(1)
            )

        if not self.gradients:
            self.watcher.key(layer.index, key_states(key, "unrotate"), None)
            self.watcher.value(layer.index, _rows(value).flatten(1), None)
            return
        plain_key, plain_value = key.detach(), value.detach()
        key.register_hook(
            lambda g: self.watcher.key(
                layer.index, key_states(plain_key, "unrotate"), key_states(g, "pull_back")
            )
        )
        value.register_hook(
            lambda g: self.watcher.value(
                layer.index, _rows(plain_value).flatten(1), _rows(g).flatten(1)
            )
        )


def capture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend by sdpa, showing keys (1, num_kv_heads, tokens, head_dim) and values to the running
    capture.
    """
    run, layer, angles = getattr(module, "_kvqtool_capture", (None, None, None))
    if run is not None and (key.requires_grad or not run.gradients):
        run.see(layer, angles, key, value)
        module._kvqtool_capture = (None, None, None)  # type: ignore[assignment]  # one look per forward
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _register() -> None:
    AttentionInterface.register(CAPTURE, capture_attention)
    AttentionMaskInterface.register(CAPTURE, sdpa_mask)


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
def _checkpointed(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Recompute layers in the backward pass where keeping their activations would take too much
    memory.
    """
    config = model.config.get_text_config()
    width = 16 * config.hidden_size + 4 * (
        getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    )
    if (
        config.num_hidden_layers * tokens * width * 4 < _ACTIVATION_BYTES
        or not model.supports_gradient_checkpointing
    ):
        yield
        return
    # transformers 5.17 has only the older names, later versions warn about them.
    is_new = hasattr(model, "activation_checkpointing_enable")
    verb = "activation_checkpointing" if is_new else "gradient_checkpointing"
    with _without_dropout(model):
        getattr(model, f"{verb}_enable")({"use_reentrant": False})
        model.train()
        try:
            yield
        finally:
            model.eval()
            getattr(model, f"{verb}_disable")()


@contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Set every dropout to zero inside the block: checkpointing needs training mode, we do not."""
    rates: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        names = ("p",) if isinstance(module, nn.Dropout) else ("attention_dropout",)
        for name in names:
            rate = getattr(module, name, None)
            if isinstance(rate, float):
                rates.append((module, name, rate))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
