"""What calibration collects while a model runs: key ranges in the first pass, histograms of levels
in the second.

A collector is fed layer by layer and keeps sketches only, whose size does not depend on how much
text there is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvqtool.capture import KeyStates, Watcher
from kvqtool.codebook import Codebook, round_range
from kvqtool.codec import Normalized, normalize
from kvqtool.compensation import BlockFisher
from kvqtool.hadamard import rotate_heads
from kvqtool.histogram import CHANNEL_BINS, LAYER_BINS, LevelHistogram
from kvqtool.quantiles import ChannelQuantiles
from kvqtool.ranks import Ranks
from kvqtool.side import QuantSpec
from kvqtool.spec import SIDES, KvSpec

NO_LEVELS = torch.empty(0)
_COUNTS, _FISHER = "view", "fisher"
Devices = Mapping[int, torch.device]
Sketch = ChannelQuantiles | LevelHistogram | BlockFisher


class Collector(Watcher):
    """A watcher whose sketches can be put aside, taken up again and merged with those of other
    processes.

    A sketch has a name that ends in its layer's index.
    """

    @property
    @abstractmethod
    def is_needed(self) -> bool:
        """Whether any spec asks for what is collected."""

    @property
    def needs_gradients(self) -> bool:
        """Whether the pass that feeds it has to run the backward."""
        return False

    @property
    @abstractmethod
    def sketches(self) -> Mapping[str, Sketch]:
        """What this process has collected."""

    @abstractmethod
    def restore(self, states: Mapping[str, dict[str, Tensor]], devices: Devices) -> None:
        """Take up sketches by their states, each on its layer's device."""

    @abstractmethod
    def merge(self, ranks: Ranks) -> None:
        """Let what was collected be that of all processes; call it once, when all are done."""


class RangeCollector(Collector):
    """Pass 1: quantile sketches of key channels, sinks left out, one for all specs that see the
    same keys.
    """

    def __init__(self, specs: Sequence[KvSpec]) -> None:
        """Prepare for the specs whose keys have calibrated ranges."""
        self.wanted = sorted({_keys_seen(spec) for spec in specs if spec.key.per_channel})
        self._sketches: dict[str, ChannelQuantiles] = {}
        self._merged: Mapping[str, ChannelQuantiles] = self._sketches

    @property
    def is_needed(self) -> bool:
        """Whether any spec has calibrated ranges."""
        return bool(self.wanted)

    @property
    def sketches(self) -> Mapping[str, ChannelQuantiles]:
        """This process's sketches; merging leaves them as they are."""
        return self._sketches

    def restore(self, states: Mapping[str, dict[str, Tensor]], devices: Devices) -> None:
        """Take up sketches by their states, each on its layer's device."""
        for name, state in states.items():
            device = devices[_layer_of(name)]
            self._sketches[name] = ChannelQuantiles.from_state(state, device)

    def merge(self, ranks: Ranks) -> None:
        """Take ranges from the sketches of all processes from now on."""
        self._merged = {name: self._sketches[name].merged(ranks) for name in sorted(self._sketches)}

    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        """Sketch a layer's keys."""
        for seen in self.wanted:
            pre_rope, sink_tokens = seen
            rows = states.form(pre_rope)[sink_tokens:]
            name = _range_name(seen, layer)
            if name not in self._sketches:
                self._sketches[name] = ChannelQuantiles(rows.shape[1], rows.device)
            self._sketches[name].update(rows)

    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        """Ignore values: each token brings its own range."""

    def ranges(self, spec: KvSpec, layer: int) -> Codebook:
        """Return a key codebook with a layer's ranges and no levels yet."""
        sketch = self._merged[_range_name(_keys_seen(spec), layer)]
        lower, upper = sketch.minimum, sketch.maximum
        if spec.key.outlier_fraction:
            tail = spec.key.outlier_fraction / 2
            lower, upper = sketch.quantile(tail), sketch.quantile(1 - tail)
        return Codebook(NO_LEVELS, NO_LEVELS, *round_range(lower, upper))


@dataclass(frozen=True)
class View:
    """What the second pass depends on: schemes that differ in bits or Q-Norm only share it."""

    side: str
    quant: QuantSpec
    sink_tokens: int


class LossCollector(Collector):
    """Pass 2: for every distinct way the specs look at keys and values, a histogram per layer, and
    the block Fisher where rounding is compensated.
    """

    def __init__(
        self, specs: Sequence[KvSpec], ranges: RangeCollector, heads: Mapping[int, int]
    ) -> None:
        """Prepare for the specs whose levels are fitted or whose rounding is compensated.

        Args:
            specs: the schemes.
            ranges: the first pass.
            heads: KV heads of every layer.
        """
        self._ranges = ranges
        self._heads = heads
        self._views: dict[View, KvSpec] = {}
        for spec in specs:
            for side in SIDES:
                if spec.side(side).fits_levels or spec.side(side).compensated:
                    self._views.setdefault(view_of(spec, side), spec)
        self._numbers = {view: number for number, view in enumerate(self._views)}
        self._histograms: dict[str, LevelHistogram] = {}
        self._fishers: dict[str, BlockFisher] = {}

    @property
    def is_needed(self) -> bool:
        """Whether any spec fits levels or compensates."""
        return bool(self._views)

    @property
    def sketches(self) -> Mapping[str, LevelHistogram | BlockFisher]:
        """Histograms and Fisher matrices: this process's until they are merged."""
        return {**self._histograms, **self._fishers}

    def restore(self, states: Mapping[str, dict[str, Tensor]], devices: Devices) -> None:
        """Take up sketches by their states, each on its layer's device."""
        for name, state in states.items():
            device = devices[_layer_of(name)]
            if name.startswith(_FISHER):
                self._fishers[name] = BlockFisher.from_state(state, device)
            else:
                self._histograms[name] = LevelHistogram.from_state(state, device)

    def merge(self, ranks: Ranks) -> None:
        """Replace every sketch by that of all processes."""
        for name in sorted(self.sketches):
            self.sketches[name].merge(ranks)

    @property
    def needs_gradients(self) -> bool:
        """Whether any fit weighs by Fisher information, or compensation needs it."""
        return any(view.quant.needs_gradients for view in self._views)

    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        """Take a layer's keys in every view of keys."""
        for view, spec in self._views.items():
            if view.side == "key":
                pre_rope = view.quant.pre_rope
                slopes = gradients.form(pre_rope) if gradients else None
                self._add((view, layer), spec, states.form(pre_rope), slopes)

    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        """Take a layer's values in every view of values."""

        def turned(rows: Tensor) -> Tensor:
            by_head = rows.view(len(rows), self._heads[layer], -1)
            return rotate_heads(by_head).view(rows.shape)

        for view, spec in self._views.items():
            if view.side == "value":
                form: Callable[[Tensor], Tensor] = turned if view.quant.rotated else _as_it_is
                slopes = None if gradients is None else form(gradients)
                self._add((view, layer), spec, form(states), slopes)

    def histogram(self, spec: KvSpec, side: str, layer: int) -> LevelHistogram | None:
        """Return what was counted for a spec; None where its levels are not fitted."""
        return self._histograms.get(self._name(_COUNTS, view_of(spec, side), layer))

    def fisher(self, spec: KvSpec, side: str, layer: int) -> BlockFisher | None:
        """Return what was summed for a spec; None where its rounding is not compensated."""
        return self._fishers.get(self._name(_FISHER, view_of(spec, side), layer))

    def _name(self, kind: str, view: View, layer: int) -> str:
        return f"{kind}{self._numbers.get(view)}.{layer}"

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
        slopes = None
        if quant.needs_gradients:
            assert gradients is not None, "the pass that feeds this runs the backward"
            slopes = gradients[view.sink_tokens :]
        if quant.fits_levels:
            self._count(self._name(_COUNTS, view, layer), quant, ranged, slopes)
        if quant.compensated:
            assert slopes is not None, "compensation needs gradients"
            name, heads = self._name(_FISHER, view, layer), self._heads[layer]
            if name not in self._fishers:
                self._fishers[name] = BlockFisher(heads, states.shape[1] // heads, states.device)
            self._fishers[name].update(slopes * ranged.scale)

    def _count(
        self, name: str, quant: QuantSpec, ranged: Normalized, slopes: Tensor | None
    ) -> None:
        states = ranged.normalized
        kept = (
            torch.ones_like(states, dtype=torch.bool)
            if ranged.outliers is None
            else ~ranged.outliers
        )
        weights = None
        if quant.weighting != "none":
            assert slopes is not None, "the pass that feeds this runs the backward"
            weights = slopes**2
            if quant.weighting == "fisher-scale":
                weights = (
                    weights * ranged.scale**2
                )  # eq. 7: an error in u is the error in x over the scale
        if name not in self._histograms:
            problems, bins = (
                (states.shape[1], CHANNEL_BINS) if quant.channel_levels else (1, LAYER_BINS)
            )
            self._histograms[name] = LevelHistogram(problems, bins, states.device)
        self._histograms[name].update(states, weights, kept)


def _as_it_is(states: Tensor) -> Tensor:
    return states


def view_of(spec: KvSpec, side: str) -> View:
    """Return the view a spec's side has of the states; bits and Q-Norm do not matter to it."""
    quant = spec.side(side)
    is_seen = quant.fits_levels or quant.compensated
    least = replace(quant, bits=2, moment_match=False) if is_seen else quant
    return View(side, least, spec.sink_tokens)


def _keys_seen(spec: KvSpec) -> tuple[bool, int]:
    """Return what a key range depends on, beside the outlier share: the form of the keys, and the
    sinks left out.
    """
    return spec.key.pre_rope, spec.sink_tokens


def _range_name(seen: tuple[bool, int], layer: int) -> str:
    pre_rope, sink_tokens = seen
    return f"{'before' if pre_rope else 'after'}_rope_sink{sink_tokens}.{layer}"


def _layer_of(name: str) -> int:
    return int(name.rpartition(".")[2])
