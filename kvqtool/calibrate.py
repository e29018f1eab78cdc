"""Calibrate: run text through a model twice, fit ranges and codebooks, return bundles.

Pass 1 sketches each key channel's distribution and fixes its outlier thresholds. Pass 2 runs forward and backward and
collects Fisher-weighted histograms of the normalised states. Neither keeps a state, so memory does not grow with text.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from kvqtool import __version__
from kvqtool.attach import probe
from kvqtool.bundle import SIDES, Bundle
from kvqtool.capture import KeyStates, Watcher, capture
from kvqtool.codebook import Codebook, as_half
from kvqtool.codec import normalize
from kvqtool.data import Windows
from kvqtool.errors import InputError
from kvqtool.histogram import CHANNEL_BINS, LAYER_BINS, LevelHistogram
from kvqtool.memory import outliers_per_tail
from kvqtool.methods import get_method
from kvqtool.models import LoadedModel
from kvqtool.progress import Progress, silent
from kvqtool.quantiles import ChannelQuantiles
from kvqtool.seam import Seam
from kvqtool.spec import KvSpec, QuantSpec


def calibrate(
    loaded: LoadedModel,
    windows: Windows,
    specs: Sequence[KvSpec],
    *,
    seed: int = 0,
    seam: Seam | None = None,
    progress: Progress = silent,
) -> list[Bundle]:
    """Fit a bundle per spec; all specs share the two passes over the text.

    Args:
        loaded: the model.
        windows: calibration text, cut and tokenised.
        specs: schemes, any mix.
        seed: what the windows were drawn with, for the record.
        seam: what an earlier `probe` of this model found.
        progress: told of every window.

    Raises:
        InputError: when the model or its shapes do not fit a spec.
        RunError: when activations are not finite.
    """
    seam = seam or probe(loaded.model)
    for spec in specs:
        _check_shapes(spec, seam)
    with _deterministic():
        ranges = _sketch_ranges(loaded, windows, specs, seam, progress)
        histograms = _collect_histograms(loaded, windows, specs, seam, ranges, progress)
    provenance = describe_run(loaded, windows, seed)
    identity = loaded.identity.as_json()
    bundles = []
    for number, spec in enumerate(specs):
        progress("fitting codebooks", number, len(specs))
        bundles.append(Bundle(spec, identity, histograms[number].codebooks(), provenance))
    progress("fitting codebooks", len(specs), len(specs))
    return bundles


def describe_run(loaded: LoadedModel, windows: Windows, seed: int) -> dict[str, Any]:
    """Return what a bundle says of how it was made; no dates, so that equal runs give equal files."""
    return {
        "calibrated": True,
        "dataset": windows.source.name,
        "dataset_sha256": windows.source.sha256,
        "python": windows.source.python,
        "samples": windows.ids.shape[0],
        "seq_len": windows.ids.shape[1],
        "seed": seed,
        "bos": windows.bos,
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    return {
        "kvqtool": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class _RangeKey:
    """Which keys a range sketch saw: specs that agree in these share it."""

    pre_rope: bool
    sink_tokens: int


class _RangeWatcher(Watcher):
    """Pass 1: quantile sketches of key channels, sinks left out."""

    def __init__(self, keys: set[_RangeKey], device: torch.device) -> None:
        self.sketches: dict[tuple[_RangeKey, int], ChannelQuantiles] = {}
        self._keys = sorted(keys, key=lambda key: (key.pre_rope, key.sink_tokens))
        self._device = device

    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        for which in self._keys:
            rows = states.form(which.pre_rope)[which.sink_tokens :]
            if (which, layer) not in self.sketches:
                self.sketches[which, layer] = ChannelQuantiles(rows.shape[1], rows.device)
            self.sketches[which, layer].update(rows)

    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        """Values bring their own ranges."""

    def codebook(self, spec: KvSpec, layer: int) -> Codebook:
        """Return a key codebook that has its ranges and no levels yet."""
        sketch = self.sketches[_RangeKey(spec.key.pre_rope, spec.sink_tokens), layer]
        lower, upper = sketch.minimum, sketch.maximum
        if spec.key.outlier_fraction:
            tail = spec.key.outlier_fraction / 2
            lower, upper = sketch.quantile(tail), sketch.quantile(1 - tail)
        return Codebook(torch.empty(0), torch.empty(0), as_half(lower), as_half(upper))


class _SpecHistograms:
    """Pass 2 for one spec: a histogram per layer and side, and the codebooks fitted to them."""

    def __init__(self, spec: KvSpec, ranges: _RangeWatcher | None, layers: list[int]) -> None:
        self.spec = spec
        self.layers = layers
        self._ranges = ranges
        self._histograms: dict[tuple[int, str], LevelHistogram] = {}

    def add(self, layer: int, side: str, states: Tensor, gradients: Tensor | None) -> None:
        """Count one window's rows, sinks left out, (tokens, channels) float32."""
        quant = self._quant(side)
        if quant.method != "nuq":
            return
        states = states[self.spec.sink_tokens :]
        ranged = normalize(states, self._ranged_codebook(layer, side), quant)
        kept = torch.ones_like(states, dtype=torch.bool) if ranged.outliers is None else ~ranged.outliers
        weights = None
        if quant.weighting != "none":
            assert gradients is not None
            weights = gradients[self.spec.sink_tokens :] ** 2
            if quant.weighting == "fisher-scale":
                weights = weights * ranged.scale**2  # eq. 7: the error in u is the error in x over the scale
        self._histogram(layer, side, states).update(ranged.normalized, weights, kept)

    def codebooks(self) -> dict[tuple[int, str], Codebook]:
        """Fit every layer's codebooks."""
        fitted = {}
        for layer in self.layers:
            for side in SIDES:
                quant = self._quant(side)
                levels = get_method(quant.method).fit(quant, self._histograms.get((layer, side)))
                ranged = self._ranged_codebook(layer, side)
                fitted[layer, side] = Codebook(*levels, ranged.lower, ranged.upper).to(torch.device("cpu"))
        return fitted

    def _quant(self, side: str) -> QuantSpec:
        return self.spec.key if side == "key" else self.spec.value

    def _ranged_codebook(self, layer: int, side: str) -> Codebook:
        if self._quant(side).per_channel:
            assert self._ranges is not None
            return self._ranges.codebook(self.spec, layer)
        return Codebook(torch.empty(0), torch.empty(0))

    def _histogram(self, layer: int, side: str, states: Tensor) -> LevelHistogram:
        if (layer, side) not in self._histograms:
            per_channel = self._quant(side).channel_levels
            problems, bins = (states.shape[1], CHANNEL_BINS) if per_channel else (1, LAYER_BINS)
            self._histograms[layer, side] = LevelHistogram(problems, bins, states.device)
        return self._histograms[layer, side]


class _HistogramWatcher(Watcher):
    """Pass 2: hands every layer's states and gradients to all specs."""

    def __init__(self, specs: list[_SpecHistograms]) -> None:
        self._specs = specs

    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        for each in self._specs:
            pre_rope = each.spec.key.pre_rope
            each.add(layer, "key", states.form(pre_rope), gradients and gradients.form(pre_rope))

    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        for each in self._specs:
            each.add(layer, "value", states, gradients)


def _sketch_ranges(
    loaded: LoadedModel, windows: Windows, specs: Sequence[KvSpec], seam: Seam, progress: Progress
) -> _RangeWatcher | None:
    wanted = {_RangeKey(spec.key.pre_rope, spec.sink_tokens) for spec in specs if spec.key.per_channel}
    if not wanted:
        return None
    watcher = _RangeWatcher(wanted, loaded.device)
    with capture(loaded.model, seam, watcher, gradients=False) as run:
        for number, ids in enumerate(windows.ids):
            progress("sketching key ranges", number, len(windows.ids))
            run.run(ids)
    progress("sketching key ranges", len(windows.ids), len(windows.ids))
    return watcher


def _collect_histograms(
    loaded: LoadedModel,
    windows: Windows,
    specs: Sequence[KvSpec],
    seam: Seam,
    ranges: _RangeWatcher | None,
    progress: Progress,
) -> list[_SpecHistograms]:
    layers = [layer.index for layer in seam.packed]
    collectors = [_SpecHistograms(spec, ranges, layers) for spec in specs]
    fitted = [each for each in collectors if "nuq" in (each.spec.key.method, each.spec.value.method)]
    if not fitted:
        return collectors
    gradients = any(each.spec.needs_gradients for each in fitted)
    phase = "measuring sensitivity" if gradients else "collecting histograms"
    with capture(loaded.model, seam, _HistogramWatcher(fitted), gradients=gradients) as run:
        for number, ids in enumerate(windows.ids):
            progress(phase, number, len(windows.ids))
            run.run(ids)
    progress(phase, len(windows.ids), len(windows.ids))
    return collectors


def _check_shapes(spec: KvSpec, seam: Seam) -> None:
    """Refuse outlier shares that leave nothing to quantize in a layer."""
    for layer in seam.packed:
        for quant, channels in ((spec.key, layer.geometry.key_channels), (spec.value, layer.geometry.value_channels)):
            if not quant.per_channel and 2 * outliers_per_tail(quant, channels) >= channels:
                share = f"{quant.outlier_fraction * 100:g}%"
                raise InputError(f"{share} outliers leave none of layer {layer.index}'s {channels} channels; use less")


@contextmanager
def _deterministic() -> Iterator[None]:
    """Use torch's deterministic sums on a GPU, so that equal runs give equal bundles; put the setting back after."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # Attention's backward pass has no deterministic form on a GPU; all our own sums do.
            warnings.filterwarnings("ignore", message=".*determinis.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
