"""Let a model feed compressed caches: hooks that tell a cache how keys are rotated and padded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from kvqtool.attention import BAND, register_band_attention
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.context_parallel import ContextParallelCache
from kvqtool.errors import InputError
from kvqtool.forward import layers_of
from kvqtool.models import LoadedModel
from kvqtool.probe import call_arguments, hooked, probe, rotary_tables
from kvqtool.read_path import READ_PATHS, Place, ReadPath, unreadable
from kvqtool.seam import LayerSeam, Seam
from kvqtool.spec import KvSpec
from kvqtool.steady import SteadyCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NO_CAP: Final = "sdpa of transformers before 5.23 leaves out the model's cap on scores"


class Session:
    """A model whose attention layers feed compressed caches; made by `attach`."""

    def __init__(
        self,
        model: PreTrainedModel,
        seam: Seam,
        read_path: str = "materialise",
        obstacle: str | None = None,
    ) -> None:
        """Keep the model and what the probe learned of it.

        Args:
            model: the model.
            seam: its layers.
            read_path: how caches shall be read, one of `READ_PATHS`.
            obstacle: why kernels cannot attend for this model, or None where they can.
        """
        self.model = model
        self.seam = seam
        self.read_path = read_path
        self.obstacle = obstacle

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
        if bundle.spec.has_window and self.model.config._attn_implementation != BAND:
            raise InputError(
                f"{bundle.spec} keeps a recent window; pass the spec to attach(model, "
                "bundle) to use it"
            )
        paths = {
            layer.index: ReadPath(layer.index, self.read_path, self.unfused(layer, bundle))
            for layer in self.seam.packed
        }
        return KvqCache(self.seam, bundle, self.model.config, prefill, paths)

    def unfused(self, layer: LayerSeam, bundle: Bundle) -> str | None:
        """Return why a layer's caches are not read by the fused kernel, or None where they are."""
        place = place_of(self.model, layer)
        if self.read_path == "auto" and place.device.type != "cuda":
            return "no CUDA device"
        return self.obstacle or unreadable(layer, bundle.spec_of(layer.index), place)


@contextmanager
def attach(
    model: PreTrainedModel,
    bundle: Bundle | None = None,
    *,
    seam: Seam | None = None,
    read_path: str = "auto",
) -> Iterator[Session]:
    """Let a model feed compressed caches inside a `with` block; everything is put back afterwards.

    Args:
        model: a causal language model of transformers, in eval mode.
        bundle: what caches of this session will be made with; a spec with a recent window needs it
            here.
        seam: what an earlier `probe` of this model found; None to probe now.
        read_path: `auto` reads every layer by the fused kernel where that can, which is on CUDA,
            and through torch elsewhere; `fused` refuses where it cannot, and runs its torch
            reference on a CPU; `materialise` reads through torch.

    Raises:
        InputError: when the model's attention cannot be replaced and the spec's recent window needs
            that; when `read_path` is unknown, or asks for the kernel where that cannot attend.
    """
    if read_path not in READ_PATHS:
        raise InputError(f"read path {read_path!r} is unknown; use one of: {', '.join(READ_PATHS)}")
    seam = seam or probe(model)
    layers = {layer.module: layer for layer in seam.packed if layer.rotation is not None}

    def announce_angles(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = call_arguments(module, args, kwargs)
        tables = rotary_tables(arguments.get("position_embeddings"))
        if tables is not None:
            for cache in _caches(arguments):
                layer = layers[module]
                cache.announce(layer.index, *tables, arguments.get("position_ids"))

    def announce_padding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = call_arguments(module, args, kwargs)
        for cache in _caches(arguments):
            cache.announce_mask(arguments.get("attention_mask"))

    rotated = [module for module in layers if module is not None]
    wants_fused = read_path == "fused" or (read_path == "auto" and model.device.type == "cuda")
    with (
        _own_attention(model, bundle.spec if bundle else None, wants_fused) as obstacle,
        hooked(rotated, announce_angles),
        hooked([layers_of(model)], announce_padding),
    ):
        yield Session(model, seam, read_path, obstacle)


def attached(loaded: LoadedModel, bundle: Bundle | None = None) -> AbstractContextManager[Session]:
    """Attach a loaded model, probed once, with the read path it was loaded for."""
    return attach(loaded.model, bundle, seam=loaded.seam, read_path=loaded.read_path)


def place_of(model: PreTrainedModel, layer: LayerSeam) -> Place:
    """Return where a layer of a model runs."""
    weights = None if layer.module is None else next(layer.module.parameters(), None)
    device = model.device if weights is None else weights.device
    return Place(device, model.dtype, model.config.get_text_config().num_attention_heads)


def _caches(
    arguments: dict[str, Any],
) -> list[KvqCache | SteadyCache | ContextParallelCache]:
    """Return the compressed cache among a call's arguments, whatever its name there."""
    kinds = KvqCache, SteadyCache, ContextParallelCache
    return [value for value in arguments.values() if isinstance(value, kinds)]


@contextmanager
def _own_attention(
    model: PreTrainedModel, spec: KvSpec | None, wants_fused: bool
) -> Iterator[str | None]:
    """Run on the attention function that knows recent windows and pages, where that is needed;
    yield why kernels cannot attend, or None.

    Raises:
        InputError: when a recent window needs it and the model keeps its own attention;
            transformers would only log a warning.
    """
    before, has_window = model.config._attn_implementation, bool(spec and spec.has_window)
    reason = _unlike_sdpa(model)
    if has_window and reason == _NO_CAP:
        raise InputError(f"{reason}; use transformers 5.23, or a spec without -r")
    if not has_window and (not wants_fused or reason):
        yield reason
        return
    register_band_attention()
    model.set_attn_implementation(BAND)
    is_replaced = model.config._attn_implementation == BAND
    name = type(model).__name__
    try:
        if has_window and not is_replaced:
            raise InputError(
                f"{name} does not let its attention be replaced; use a spec without -r"
            )
        yield reason if is_replaced else f"{name} does not let its attention be replaced"
    finally:
        model.set_attn_implementation(before)


def _unlike_sdpa(model: PreTrainedModel) -> str | None:
    """Return why ours cannot stand for a model's own attention, or None where it can: for sdpa, and
    for eager attention that differs from it by a cap on scores alone.
    """
    kind, config = model.config._attn_implementation, model.config.get_text_config()
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    if kind == "sdpa":
        return _NO_CAP if is_capped else None
    if kind == "eager" and is_capped:
        return None
    return f"the model runs on {kind} attention, not on sdpa"
