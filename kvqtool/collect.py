"""What the second pass of calibration collects: histograms of levels, and the block Fisher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvqtool.capture import KeyStates
from kvqtool.codebook import Codebook
from kvqtool.codec import Normalized, normalize
from kvqtool.compensation import BlockFisher
from kvqtool.hadamard import rotate_heads
from kvqtool.histogram import CHANNEL_BINS, LAYER_BINS, LevelHistogram
from kvqtool.ranges import NO_LEVELS, Collector, Devices, RangeCollector, layer_of
from kvqtool.ranks import Ranks
from kvqtool.side import QuantSpec
from kvqtool.spec import SIDES, KvSpec

_COUNTS, _FISHER = "view", "fisher"


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
        self.heads = heads
        self._views: dict[View, KvSpec] = {}
        for spec in specs:
            for side in SIDES:
                if spec.side(side).fits_levels or spec.side(side).compensated:
                    self._views.setdefault(view_of(spec, side), spec)
        self._numbers = {view: number for number, view in enumerate(self._views)}
        self._ends: dict[tuple[View, int], Codebook] = {}  # the first pass is over: they are fixed
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
            device = devices[layer_of(name)]
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
            by_head = rows.view(len(rows), self.heads[layer], -1)
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
        if at not in self._ends:
            self._ends[at] = (
                self._ranges.ranges(spec, layer)
                if quant.per_channel
                else Codebook(NO_LEVELS, NO_LEVELS)
            )
        ranged = normalize(states, self._ends[at], quant)
        slopes = None
        if quant.needs_gradients:
            assert gradients is not None, "the pass that feeds this runs the backward"
            slopes = gradients[view.sink_tokens :]
        if quant.fits_levels:
            self._count(self._name(_COUNTS, view, layer), quant, ranged, slopes)
        if quant.compensated:
            assert slopes is not None, "compensation needs gradients"
            name, heads = self._name(_FISHER, view, layer), self.heads[layer]
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
    least = replace(quant, bits=2, moment_match=False, error_budget=None) if is_seen else quant
    return View(side, least, spec.sink_tokens)
