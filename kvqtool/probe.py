"""Learn a model's attention layers by running it: which are stored, how each rotates its keys.

Nothing is looked up by model family. The model runs once on a few tokens; which module wrote which
cache layer is noted, and each such module runs again with its rotation replaced by the identity.
That hands over the true pre-RoPE keys, against which every possible rotation is tried. A layer none
of them fits is quantized as it comes, and named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kvqtool.errors import InputError, RunError
from kvqtool.forward import cache_name, hidden_states, layers_of
from kvqtool.memory import LayerGeometry
from kvqtool.rope import AngleFormula, Rotation, candidate_rotations
from kvqtool.seam import LayerSeam, Seam
from kvqtool.split import explain_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS: Final = 32
# Un-rotating reproduces the true key to rounding; a wrong rotation is off by tens of percent.
# Kinds of rotation whose frequencies change with the length.
_CHANGING: Final = ("dynamic", "longrope")
_TOLERANCE: Final = {
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
    torch.float64: 1e-8,
}
# A token that others may not see moves their states by rounding only: 2e-7 at most in float32 over
# all of docs/models.md, where a small BERT with random weights moves them by 1e-4.
_CAUSAL_TOLERANCE: Final = {torch.float32: 5e-5, torch.float64: 5e-5}
_CAUSAL_TOLERANCE_HALF: Final = 1e-2
_NO_STATES: Final = LayerGeometry(0, 0, 0)


class _RecordingCache(DynamicCache):
    """A stock cache that remembers what each layer was given and which module gave it."""

    def __init__(self, callers: list[nn.Module], **options: Any) -> None:
        super().__init__(**options)
        self.callers = callers
        self.seen: dict[int, tuple[nn.Module | None, Tensor, Tensor]] = {}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        caller = self.callers[-1] if self.callers else None
        self.seen[layer_idx] = caller, key_states.detach(), value_states.detach()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def probe(model: PreTrainedModel) -> Seam:
    """Learn where a model's cache is written and how its keys are rotated.

    Args:
        model: a causal language model of transformers, in eval mode.

    Raises:
        InputError: when the model keeps no cache that can be compressed, or is not causal.
    """
    name = type(model).__name__
    if cache_name(layers_of(model)) is None:
        raise InputError(f"{name} keeps no key-value cache, so there is nothing to compress")
    callers: list[nn.Module] = []
    calls: dict[nn.Module, dict[str, Any]] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        callers.append(module)
        calls[module] = call_arguments(module, args, kwargs)

    def leave(module: nn.Module, *_: Any) -> None:
        callers.pop()

    ids = (torch.arange(_PROBE_TOKENS) * 7919 + 11) % model.config.get_text_config().vocab_size
    cache = _RecordingCache(callers, config=model.config)
    with hooked(_layer_modules(model), enter, leave), explain_split(model):
        before = hidden_states(model, {"input_ids": ids[None].to(model.device)}, cache)
    if not torch.isfinite(before).all():
        raise RunError(f"{name} produced NaN or infinite states; run in float32 or check the model")
    if not cache.seen:
        raise InputError(f"{name} wrote no key-value cache, so there is nothing to compress")
    _check_causal(model, ids, before)
    layers = tuple(
        _probe_layer(model, index, cache, calls)
        if index in cache.seen
        else LayerSeam(index, _NO_STATES, None, False, None, None, _unseen_note(layer))
        for index, layer in enumerate(cache.layers)
    )
    if not any(layer.is_packed for layer in layers):
        notes = sorted({layer.note for layer in layers})
        raise InputError(f"{name} has no cache layer to compress ({'; '.join(notes)})")
    return Seam(_number_groups(layers))


def call_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return a forward call's arguments by name, positional ones included."""
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


def rotary_tables(position_embeddings: Any) -> tuple[Tensor, Tensor] | None:
    """Return (cos, sin), each (batch, tokens, width), from what a module is given; None where that
    is not angles.
    """
    if isinstance(position_embeddings, Tensor) and position_embeddings.is_complex():
        tables = position_embeddings.real, position_embeddings.imag
    elif isinstance(position_embeddings, tuple) and len(position_embeddings) == 2:
        tables = position_embeddings
    else:
        return None
    if not all(isinstance(part, Tensor) and part.dim() in (2, 3) for part in tables):
        return None
    cos, sin = (part if part.dim() == 3 else part[None] for part in tables)
    return cos, sin


@contextmanager
def hooked(
    modules: list[nn.Module], before: Callable[..., None], after: Callable[..., None] | None = None
) -> Iterator[None]:
    """Call `before` (and `after`) around the forward of modules inside the block."""
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    if after is not None:
        handles += [module.register_forward_hook(after, always_call=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that know their layer's index: the innermost to run writes the cache."""
    modules = model.modules()
    return [module for module in modules if isinstance(getattr(module, "layer_idx", None), int)]


def _check_causal(model: PreTrainedModel, ids: Tensor, before: Tensor) -> None:
    """Refuse a model whose earlier states change when only the last token does."""
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % model.config.get_text_config().vocab_size
    cache = DynamicCache(config=model.config)
    after = hidden_states(model, {"input_ids": changed[None].to(model.device)}, cache)
    moved = (after - before)[:, :-1].float().norm() / before[:, :-1].float().norm()
    if moved > _CAUSAL_TOLERANCE.get(before.dtype, _CAUSAL_TOLERANCE_HALF):
        name = type(model).__name__
        raise InputError(f"{name} is not causal: earlier tokens see later ones; use a decoder")


def _unseen_note(layer: Any) -> str:
    """Say what a cache layer is that no attention module wrote to."""
    kind = type(layer).__name__
    if kind == "DummyLayer":
        return "no cache of its own: it shares another layer's"
    if not isinstance(layer, CacheLayerMixin):
        return f"left as it is: linear attention or state space ({kind})"
    return f"left as it is: nothing wrote to it ({kind})"


def _probe_layer(
    model: PreTrainedModel, index: int, cache: _RecordingCache, calls: dict[nn.Module, Any]
) -> LayerSeam:
    module, key, value = cache.seen[index]
    stock = cache.layers[index]
    geometry = LayerGeometry(key.shape[1], key.shape[3], value.shape[3])
    window = stock.sliding_window if type(stock) is DynamicSlidingWindowLayer else None
    is_packed = type(stock) in (DynamicLayer, DynamicSlidingWindowLayer)
    seam = LayerSeam(index, geometry, module, is_packed, None, None, "", window=window)
    if not is_packed:
        return replace(seam, note=f"left as it is: {type(stock).__name__}")
    if module is None:
        return replace(seam, note="keys as they come: no attention module found")
    arguments = calls[module]
    tables = rotary_tables(arguments.get("position_embeddings"))
    if tables is None:
        return replace(seam, note="keys as they come: the module is given no rotary tables")
    true_key, true_value = _replay_without_rotation(model, module, index, arguments)
    if not torch.equal(true_value, value):
        return replace(seam, is_packed=False, note="left as it is: latent attention (MLA)")
    if torch.equal(true_key, key):
        return replace(seam, note="keys are not rotated (NoPE)")
    rotation = _fit_rotation(key, true_key, tables)
    if rotation is None:
        return replace(seam, note="keys post-RoPE: no rotation verified")
    formula = _fit_formula(model, rotation, tables, arguments.get("position_ids"))
    note = f"{rotation.layout} {rotation.width} of {geometry.key_dim}"
    return replace(seam, rotation=rotation, formula=formula, note=note, tables=tables)


def _replay_without_rotation(
    model: PreTrainedModel, module: nn.Module, index: int, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Run one attention module again with cos = 1 and sin = 0 and return what it writes."""
    given = arguments["position_embeddings"]
    if isinstance(given, Tensor):
        identity: Any = torch.ones_like(given)
    else:
        identity = torch.ones_like(given[0]), torch.zeros_like(given[1])
    recorder = _RecordingCache([module], config=model.config)
    (cache_name,) = (n for n, value in arguments.items() if isinstance(value, DynamicCache))
    module(**{**arguments, "position_embeddings": identity, cache_name: recorder})
    _, key, value = recorder.seen[index]
    return key, value


def _fit_rotation(key: Tensor, true_key: Tensor, tables: tuple[Tensor, Tensor]) -> Rotation | None:
    """Return the rotation that takes `key` back to `true_key`, both (1, H, T, D); None if none
    does.
    """
    target = true_key.float()
    tolerance = _TOLERANCE[key.dtype] * target.norm()
    best: tuple[Tensor, Rotation] | None = None
    for rotation in candidate_rotations(key.shape[-1], tables[0].shape[-1]):
        cos, sin = (part[:, None] for part in rotation.angles(*tables))
        error = (rotation.unrotate(key.float(), cos, sin) - target).norm()
        if error <= tolerance and (best is None or error < best[0]):
            best = error, rotation
    return best[1] if best else None


def _fit_formula(
    model: PreTrainedModel,
    rotation: Rotation,
    tables: tuple[Tensor, Tensor],
    positions: Tensor | None,
) -> AngleFormula | None:
    """Return the frequencies whose angles equal the model's tables bit for bit; None if no module
    has them.
    """
    if positions is None or positions.dim() != 2:
        return None
    cos, sin = rotation.angles(*tables)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or buffer.numel() != rotation.width // 2:
                continue
            scaling = float(getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0))
            is_fixed = not any(word in str(getattr(module, "rope_type", "")) for word in _CHANGING)
            inv_freq = buffer.detach().float().clone()
            formula = AngleFormula(inv_freq, scaling, tables[0].dtype, is_fixed)
            made_cos, made_sin = formula.tables(positions.to(torch.int32))
            if torch.equal(made_cos.float(), cos) and torch.equal(
                rotation.sign * made_sin.float(), sin
            ):
                return formula
    return None


def _number_groups(layers: tuple[LayerSeam, ...]) -> tuple[LayerSeam, ...]:
    """Give layers that were handed the same angles the same group, so that angles are stored
    once.
    """
    leaders: list[LayerSeam] = []
    numbered = []
    for layer in layers:
        if layer.rotation is not None:
            same = [i for i, leader in enumerate(leaders) if leader.shares_angles_with(layer)]
            if not same:
                leaders.append(layer)
            layer = replace(layer, group=same[0] if same else len(leaders) - 1)
        numbered.append(replace(layer, tables=None))
    return tuple(numbered)
