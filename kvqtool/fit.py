"""Codebooks from what the passes over the text collected; every fit is made once, whoever asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.collect import LossCollector, View, view_of
from kvqtool.kmeans import FloatArray, least_errors
from kvqtool.methods import fit_widths
from kvqtool.ranges import RangeCollector
from kvqtool.spec import SIDES, KvSpec

Books = dict[tuple[int, str], Codebook]
_COARSE_BINS = 256  # what predictions are made from
_Job = TypeVar("_Job")
_Done = TypeVar("_Done")


class Fitter:
    """Fits levels and feedback to the sketches of both passes, and remembers them."""

    def __init__(self, ranges: RangeCollector, losses: LossCollector) -> None:
        """Take the collectors, fed and merged."""
        self._ranges = ranges
        self._losses = losses
        self._levels: dict[tuple[View, int, bool, int], tuple[Tensor, Tensor]] = {}
        self._feedback: dict[tuple[View, int], tuple[Tensor, Tensor]] = {}
        self._predicted: dict[tuple[View, int, int], Sequence[float]] = {}

    def books(self, specs: Mapping[int, KvSpec]) -> Books:
        """Return the codebooks of layers, each with its scheme; layers are fitted side by side."""
        wanted = [(spec, side, layer) for layer, spec in specs.items() for side in SIDES]
        fitted = self._side_by_side(lambda one: self.codebook(*one), wanted)
        return {(layer, side): book for (_, side, layer), book in zip(wanted, fitted, strict=True)}

    def predict(
        self, wanted: Sequence[tuple[KvSpec, str, int]], most: int
    ) -> list[Sequence[float]]:
        """Return what rounding is predicted to cost one side of layers, (spec, side, layer) each.

        Args:
            wanted: the sides; their widths do not matter.
            most: the greatest number of levels.

        Returns:
            For 1 to `most` levels the sum of e^T H e, e being the rounding errors of all positions
            that calibration saw; half of it is nats.
        """
        return self._side_by_side(lambda one: self._predict(one, most), wanted)

    def _side_by_side(self, work: Callable[[_Job], _Done], jobs: Sequence[_Job]) -> list[_Done]:
        """Do jobs on all cores, each on one; one after another on a GPU, which each fills."""
        workers = 1 if self._losses.is_on_gpu else os.cpu_count()
        # In a new thread the setting is that thread's own.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, jobs))

    def counts(self, spec: KvSpec, side: str, layer: int, bins: int) -> FloatArray:
        """Return how many normalised values of one side of a layer calibration counted in equal
        bins over [-1, 1], all channels together, (bins,); outliers are left out.
        """
        histogram = self._losses.histogram(spec, side, layer)
        assert histogram is not None, "only fitted levels have a histogram"
        counted: FloatArray = histogram.coarse(bins).counted()[1].sum(0)
        return counted

    def _predict(self, wanted: tuple[KvSpec, str, int], most: int) -> Sequence[float]:
        spec, side, layer = wanted
        key = view_of(spec, side), layer, most
        if key in self._predicted:
            return self._predicted[key]
        histogram = self._losses.histogram(spec, side, layer)
        fisher = self._losses.fisher(spec, side, layer)
        assert histogram is not None, "only fitted levels have predicted losses"
        errors = least_errors(*histogram.coarse(_COARSE_BINS).weighted(), most, histogram.device)
        left = np.ones(len(errors))
        if fisher is not None:
            left = fisher.remaining().numpy()
            if len(errors) == 1:
                share = fisher.sensitivity.numpy()
                left = np.atleast_1d(np.average(left, weights=share if share.any() else None))
        self._predicted[key] = (left @ errors).tolist()
        return self._predicted[key]

    def codebook(self, spec: KvSpec, side: str, layer: int) -> Codebook:
        """Return one side's codebook of one layer, on the CPU."""
        quant = spec.side(side)
        view = view_of(spec, side)
        key = view, quant.bits, quant.moment_match, layer
        if key not in self._levels:
            histogram = self._losses.histogram(spec, side, layer)
            self._levels[key] = fit_widths(quant, histogram)
        ranged = self._ranges.ranges(spec, layer) if quant.per_channel else None
        ends = (ranged.lower, ranged.upper) if ranged else (None, None)
        fisher = self._losses.fisher(spec, side, layer)
        if fisher and (view, layer) not in self._feedback:
            self._feedback[view, layer] = fisher.feedback()
        feedback, order = self._feedback.get((view, layer), (None, None))
        heads = self._losses.heads[layer]
        wants_norm = spec.needs_queries and side == "key"
        norm = self._ranges.query_norm(layer, heads) if wants_norm else None
        book = Codebook(*self._levels[key], *ends, feedback, order, norm)
        return book.to(torch.device("cpu"))
