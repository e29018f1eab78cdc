"""What calibration collects while a model runs: key ranges in the first pass, histograms of levels
in the second.

A collector is fed layer by layer and keeps sketches only, whose size does not depend on how much
text there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvqtool.capture import KeyStates, Watcher
from kvqtool.codebook import Codebook, round_range
from kvqtool.codec import normalize
from kvqtool.histogram import CHANNEL_BINS, LAYER_BINS, LevelHistogram
from kvqtool.quantiles import ChannelQuantiles
from kvqtool.spec import KvSpec, QuantSpec

NO_LEVELS = torch.empty(0)


class RangeCollector(Watcher):
    """Pass 1: quantile sketches of key channels, sinks left out, one for all specs that see the
    same keys.
    """

    def __init__(self, specs: Sequence[KvSpec]) -> None:
        """Prepare for the specs whose keys have calibrated ranges."""
        self.wanted = sorted({_keys_seen(spec) for spec in specs if spec.key.per_channel})
        self._sketches: dict[tuple[tuple[bool, int], int], ChannelQuantiles] = {}

    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        """Sketch a layer's keys."""
        for seen in self.wanted:
            pre_rope, sink_tokens = seen
            rows = states.form(pre_rope)[sink_tokens:]
            if (seen, layer) not in self._sketches:
                self._sketches[seen, layer] = ChannelQuantiles(rows.shape[1], rows.device)
            self._sketches[seen, layer].update(rows)

    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        """Ignore values: each token brings its own range."""

    def ranges(self, spec: KvSpec, layer: int) -> Codebook:
        """Return a key codebook with a layer's ranges and no levels yet."""
        sketch = self._sketches[_keys_seen(spec), layer]
        lower, upper = sketch.minimum, sketch.maximum
        if spec.key.outlier_fraction:
            tail = spec.key.outlier_fraction / 2
            lower, upper = sketch.quantile(tail), sketch.quantile(1 - tail)
        return Codebook(NO_LEVELS, NO_LEVELS, *round_range(lower, upper))


@dataclass(frozen=True)
class View:
    """What a histogram depends on: schemes that differ in bits or Q-Norm only share it."""

    side: str
    quant: QuantSpec
    sink_tokens: int


class HistogramCollector(Watcher):
    """Pass 2: a histogram per layer for every distinct way the specs look at keys and values."""

    def __init__(self, specs: Sequence[KvSpec], ranges: RangeCollector) -> None:
        """Prepare for the specs whose levels are fitted."""
        self._ranges = ranges
        self._views: dict[View, KvSpec] = {}
        for spec in specs:
            for side, quant in (("key", spec.key), ("value", spec.value)):
                if quant.fits_levels:
                    self._views.setdefault(view_of(spec, side), spec)
        self._histograms: dict[tuple[View, int], LevelHistogram] = {}

    @property
    def is_needed(self) -> bool:
        """Whether any spec fits levels."""
        return bool(self._views)

    @property
    def needs_gradients(self) -> bool:
        """Whether any fit weighs by Fisher information."""
        return any(view.quant.needs_gradients for view in self._views)

    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        """Count a layer's keys in every view of keys."""
        for view, spec in self._views.items():
            if view.side == "key":
                pre_rope = view.quant.pre_rope
                slopes = gradients.form(pre_rope) if gradients else None
                self._add((view, layer), spec, states.form(pre_rope), slopes)

    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        """Count a layer's values in every view of values."""
        for view, spec in self._views.items():
            if view.side == "value":
                self._add((view, layer), spec, states, gradients)

    def histogram(self, spec: KvSpec, side: str, layer: int) -> LevelHistogram | None:
        """Return what was counted for a spec; None where its levels are not fitted."""
        return self._histograms.get((view_of(spec, side), layer))

    def _add(
        self, at: tuple[View, int], spec: KvSpec, states: Tensor, gradients: Tensor | None
    ) -> None:
        view, layer = at
        quant, states = view.quant, states[view.sink_tokens :]
        book = (
            self._ranges.ranges(spec, layer)
            if quant.per_channel
            else Codebook(NO_LEVELS, NO_LEVELS)
        )
        ranged = normalize(states, book, quant)
        kept = (
            torch.ones_like(states, dtype=torch.bool)
            if ranged.outliers is None
            else ~ranged.outliers
        )
        weights = None
        if quant.needs_gradients:
            assert gradients is not None, "the pass that feeds this runs the backward"
            weights = gradients[view.sink_tokens :] ** 2
            if quant.weighting == "fisher-scale":
                weights = (
                    weights * ranged.scale**2
                )  # eq. 7: an error in u is the error in x over the scale
        if at not in self._histograms:
            problems, bins = (
                (states.shape[1], CHANNEL_BINS) if quant.channel_levels else (1, LAYER_BINS)
            )
            self._histograms[at] = LevelHistogram(problems, bins, states.device)
        self._histograms[at].update(ranged.normalized, weights, kept)


def view_of(spec: KvSpec, side: str) -> View:
    """Return the view a spec's side has of the states; bits and Q-Norm do not matter to it."""
    quant = spec.key if side == "key" else spec.value
    least = quant if not quant.fits_levels else replace(quant, bits=2, moment_match=False)
    return View(side, least, spec.sink_tokens)


def _keys_seen(spec: KvSpec) -> tuple[bool, int]:
    """Return what a key range depends on, beside the outlier share: the form of the keys, and the
    sinks left out.
    """
    return spec.key.pre_rope, spec.sink_tokens
