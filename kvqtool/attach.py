"""Let a model feed compressed caches: hooks that tell a cache how keys are rotated and padded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from kvqtool.attention import BAND, register_band_attention
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.errors import InputError
from kvqtool.forward import layers_of
from kvqtool.probe import call_arguments, hooked, probe, rotary_tables
from kvqtool.seam import Seam
from kvqtool.spec import KvSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        if bundle.spec.has_window and self.model.config._attn_implementation != BAND:
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
    with (
        _band_attention(model, bundle.spec if bundle else None),
        hooked(rotated, announce_angles),
        hooked([layers_of(model)], announce_padding),
    ):
        yield Session(model, seam)


def _caches(arguments: dict[str, Any]) -> list[KvqCache]:
    """Return the compressed cache among a call's arguments, whatever its name there."""
    return [value for value in arguments.values() if isinstance(value, KvqCache)]


@contextmanager
def _band_attention(model: PreTrainedModel, spec: KvSpec | None) -> Iterator[None]:
    """Run on the attention function that knows recent windows, for specs that have one.

    Raises:
        InputError: when the model keeps its own attention; transformers would only log a warning.
    """
    if spec is None or not spec.has_window:
        yield
        return
    register_band_attention()
    before = model.config._attn_implementation
    model.set_attn_implementation(BAND)
    try:
        if model.config._attn_implementation != BAND:
            raise InputError(
                f"{type(model).__name__} does not let its attention be replaced; "
                "use a spec without -r"
            )
        yield
    finally:
        model.set_attn_implementation(before)
