"""Find a model's attention layers, learn how each rotates its keys, and feed a compressed cache
from them.

Nothing is looked up by model family. `probe` runs the model once on a few tokens, notes which
module wrote which cache layer, and runs each such module again with its rotation replaced by the
identity: that hands over the true pre-RoPE keys, against which every possible rotation is tried. A
layer none of them fits is quantized as it comes, and named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvqtool.attention import BAND, register_band_attention
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.errors import InputError
from kvqtool.memory import LayerGeometry
from kvqtool.rope import AngleFormula, Rotation, candidate_rotations
from kvqtool.seam import LayerSeam, Seam
from kvqtool.spec import KvSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS: Final = 32
# How attention modules name the cache; the second is what GPT-NeoX, Falcon and their age say.
_CACHE_NAMES: Final = ("past_key_values", "layer_past")
# Un-rotating reproduces the true key to rounding; a wrong rotation is off by tens of percent.
_TOLERANCE: Final = {
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
    torch.float64: 1e-8,
}


class _RecordingCache(DynamicCache):
    """A stock cache that remembers what each layer was given and which module gave it."""

    def __init__(self, callers: list[nn.Module], **options: Any) -> None:
        super().__init__(**options)
        self.callers = callers
        self.seen: dict[int, tuple[nn.Module | None, Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
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
        InputError: when the model keeps no cache that can be compressed.
    """
    callers: list[nn.Module] = []
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        callers.append(module)
        calls[module] = args, kwargs

    def leave(module: nn.Module, *_: Any) -> None:
        callers.pop()

    with _hooked(_layer_modules(model), enter, leave):
        cache = _RecordingCache(callers, config=model.config)
        ids = (torch.arange(_PROBE_TOKENS) * 7919 + 11) % model.config.get_text_config().vocab_size
        model(input_ids=ids[None].to(model.device), past_key_values=cache, use_cache=True)
        layers = tuple(_probe_layer(model, index, cache, calls) for index in sorted(cache.seen))
    if not any(layer.is_packed for layer in layers):
        raise InputError(f"{type(model).__name__} has no full-attention cache layer to compress")
    return Seam(_number_groups(layers))


def _probe_layer(
    model: PreTrainedModel,
    index: int,
    cache: _RecordingCache,
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]],
) -> LayerSeam:
    module, key, value = cache.seen[index]
    stock = type(cache.layers[index])
    geometry = LayerGeometry(key.shape[1], key.shape[3], value.shape[3])
    seam = LayerSeam(
        index, geometry, module, stock is DynamicLayer, None, None, f"cache layer {stock.__name__}"
    )
    if not seam.is_packed:
        return replace(seam, note=f"left as it is: {stock.__name__}")
    if module is None:
        return replace(seam, note="keys post-RoPE: no attention module found")
    args, kwargs = calls[module]
    tables = _tables(kwargs.get("position_embeddings"))
    if tables is None:
        return replace(seam, note="keys as they come: the module is given no rotary tables")
    true_key = _replay_without_rotation(model, module, index, args, kwargs)
    rotation = _fit_rotation(key, true_key, tables)
    if rotation is None:
        return replace(seam, note="keys post-RoPE: no rotation verified")
    formula = _fit_formula(model, rotation, tables, kwargs.get("position_ids"))
    note = f"{rotation.layout} {rotation.width} of {geometry.key_dim}"
    return replace(seam, rotation=rotation, formula=formula, note=note, tables=tables)


def _replay_without_rotation(
    model: PreTrainedModel,
    module: nn.Module,
    index: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Run one attention module again with cos = 1 and sin = 0 and return the key it writes."""
    given = kwargs["position_embeddings"]
    if isinstance(given, Tensor):
        identity: Any = torch.ones_like(given)
    else:
        identity = torch.ones_like(given[0]), torch.zeros_like(given[1])
    recorder = _RecordingCache([module], config=model.config)
    module(*args, **{**kwargs, "position_embeddings": identity, _cache_name(kwargs): recorder})
    return recorder.seen[index][1]


def _tables(position_embeddings: Any) -> tuple[Tensor, Tensor] | None:
    """Return (cos, sin), each (batch, tokens, width), from what a module is given; None where that
    is not angles.
    """
    if isinstance(position_embeddings, Tensor) and position_embeddings.is_complex():
        return position_embeddings.real, position_embeddings.imag
    if isinstance(position_embeddings, tuple) and len(position_embeddings) == 2:
        cos, sin = position_embeddings
        if isinstance(cos, Tensor) and isinstance(sin, Tensor) and cos.dim() == 3:
            return cos, sin
    return None


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
            formula = AngleFormula(buffer.detach().float().clone(), scaling, tables[0].dtype)
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


class Session:
    """A model whose attention layers feed compressed caches; made by `attach`."""

    def __init__(self, model: PreTrainedModel, seam: Seam) -> None:
        """Keep the model and what the probe learned of it."""
        self.model = model
        self.seam = seam

    def new_cache(self, bundle: Bundle, *, prefill: str = "exact") -> KvqCache:
        """Return an empty cache for one batch of sequences, to be passed as `past_key_values`.

        Args:
            bundle: scheme and codebooks.
            prefill: `exact` lets the first call attend to exact states and packs them afterwards;
                `decode-exact` lets every token attend to what is stored, itself included.
        """
        if prefill not in ("exact", "decode-exact"):
            raise InputError(f"prefill {prefill!r} is unknown; use exact or decode-exact")
        bundle.check_layers(
            {layer.index: layer.geometry for layer in self.seam.layers if layer.is_packed}
        )
        if bundle.spec.residual_length and self.model.config._attn_implementation != BAND:
            raise InputError(
                f"{bundle.spec} keeps a recent window; pass the spec to attach(model, "
                "bundle) to use it"
            )
        return KvqCache(self.seam, bundle, self.model.config, prefill)


@contextmanager
def attach(
    model: PreTrainedModel, bundle: Bundle | None = None, *, seam: Seam | None = None
) -> Iterator[Session]:
    """Let a model feed compressed caches inside a `with` block; everything is put back afterwards.

    Args:
        model: a causal language model of transformers, in eval mode.
        bundle: what caches of this session will be made with; a spec with a recent window needs it
            here.
        seam: what an earlier `probe` of this model found; None to probe now.

    Raises:
        InputError: when the model's attention cannot be replaced and the spec's recent window needs
            that.
    """
    seam = seam or probe(model)
    modules = {
        layer.module: layer for layer in seam.layers if layer.module is not None and layer.is_packed
    }

    def announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get(_cache_name(kwargs))
        layer = modules[module]
        tables = _tables(kwargs.get("position_embeddings"))
        if isinstance(cache, KvqCache) and layer.rotation is not None and tables is not None:
            cache.announce(layer.index, *tables, kwargs.get("position_ids"))

    with _band_attention(model, bundle.spec if bundle else None), _hooked(list(modules), announce):
        yield Session(model, seam)


@contextmanager
def _band_attention(model: PreTrainedModel, spec: KvSpec | None) -> Iterator[None]:
    """Use the attention function that knows recent windows, for specs that have one."""
    if spec is None or not spec.residual_length:
        yield
        return
    with replaced_attention(model, BAND, register_band_attention):
        yield


@contextmanager
def replaced_attention(
    model: PreTrainedModel, name: str, register: Callable[[], None]
) -> Iterator[None]:
    """Run a model on a registered attention function, and on its own again afterwards.

    Raises:
        InputError: when the model keeps its own attention; transformers would only log a warning.
    """
    register()
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        if model.config._attn_implementation != name:
            raise InputError(
                f"{type(model).__name__} does not let its attention be replaced; "
                "use a spec without -r"
            )
        yield
    finally:
        model.set_attn_implementation(before)


def _cache_name(names: Container[str]) -> str:
    """Return what a module calls the cache it is given, or was called with."""
    return next((name for name in _CACHE_NAMES if name in names), _CACHE_NAMES[0])


def _layer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that know their layer's index and take a cache: attention modules among
    them.
    """
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and any(name in inspect.signature(module.forward).parameters for name in _CACHE_NAMES)
    ]


@contextmanager
def _hooked(
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
