"""Codebooks from what the passes over the text collected; every fit is made once, whoever asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.collect import LossCollector, View, view_of
from kvqtool.compensation import BlockFisher
from kvqtool.histogram import LevelHistogram
from kvqtool.kmeans import FloatArray, least_errors
from kvqtool.methods import fit_widths
from kvqtool.ranges import RangeCollector
from kvqtool.side import QuantSpec
from kvqtool.spec import SIDES, KvSpec

Books = dict[tuple[int, str], Codebook]
_COARSE_BINS: Final = 256  # what predictions are made from
_MOST_POINTS: Final = 1 << 23  # that one search on a GPU takes; about 2 GiB
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class _Job:
    """Levels to be fitted, or their errors to be predicted."""

    histogram: LevelHistogram
    quant: QuantSpec

    @property
    def points(self) -> int:
        return self.histogram.problems * self.histogram.bins


class Fitter:
    """Fits levels and feedback to the sketches of both passes, and remembers them."""

    def __init__(self, ranges: RangeCollector, losses: LossCollector) -> None:
        """Take the collectors, fed and merged."""
        self._ranges = ranges
        self._losses = losses
        self._levels: dict[tuple[View, int, bool, int], tuple[Tensor, Tensor]] = {}
        self._books: dict[tuple[View, int, bool, bool, int], Codebook] = {}
        self._feedback: dict[tuple[View, int], tuple[Tensor, Tensor]] = {}
        self._predicted: dict[tuple[View, int, int], Sequence[float]] = {}

    def books(self, specs: Mapping[int, KvSpec]) -> Books:
        """Return the codebooks of layers, each with its scheme."""
        wanted = [(spec, side, layer) for layer, spec in specs.items() for side in SIDES]
        self._fit_levels(wanted)
        return {(layer, side): self.codebook(spec, side, layer) for spec, side, layer in wanted}

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
        keys = [(view_of(spec, side), layer, most) for spec, side, layer in wanted]
        new = {
            key: _Job(self._histogram(*one), key[0].quant)
            for key, one in zip(keys, wanted, strict=True)
            if key not in self._predicted
        }

        def errors(whole: _Job) -> Tensor:
            points = whole.histogram.coarse(_COARSE_BINS).weighted()
            return torch.from_numpy(least_errors(*points, most, whole.histogram.device))

        solved = _solve(new, errors)
        for key, (spec, side, layer) in zip(keys, wanted, strict=True):
            if key in solved:
                fisher = self._losses.fisher(spec, side, layer)
                self._predicted[key] = _remaining(solved[key].numpy(), fisher)
        return [self._predicted[key] for key in keys]

    def counts(self, spec: KvSpec, side: str, layer: int, bins: int) -> FloatArray:
        """Return how many normalised values of one side of a layer calibration counted in equal
        bins over [-1, 1], all channels together, (bins,); outliers are left out.
        """
        counted: FloatArray = self._histogram(spec, side, layer).coarse(bins).counted()[1].sum(0)
        return counted

    def codebook(self, spec: KvSpec, side: str, layer: int) -> Codebook:
        """Return one side's codebook of one layer, on the CPU."""
        quant, view = spec.side(side), view_of(spec, side)
        wants_norm = spec.needs_queries and side == "key"
        key = view, quant.bits, quant.moment_match, wants_norm, layer
        if key not in self._books:
            self._books[key] = self._new_book(spec, side, layer)
        return self._books[key]

    def _histogram(self, spec: KvSpec, side: str, layer: int) -> LevelHistogram:
        histogram = self._losses.histogram(spec, side, layer)
        assert histogram is not None, "only fitted levels have a histogram"
        return histogram

    def _fit_levels(self, wanted: Sequence[tuple[KvSpec, str, int]]) -> None:
        """Fit the levels of sides that were not asked for before."""
        new = {}
        for spec, side, layer in wanted:
            quant, key = spec.side(side), _level_key(spec, side, layer)
            if key not in self._levels and quant.fits_levels:
                new[key] = _Job(self._histogram(spec, side, layer), quant)

        def fit(whole: _Job) -> Tensor:
            fitted = fit_widths(whole.quant, whole.histogram)
            return torch.stack([part.view(whole.histogram.problems, -1) for part in fitted], 1)

        for key, found in _solve(new, fit).items():
            rows = found if new[key].quant.channel_levels else found[0]
            self._levels[key] = rows[..., 0, :].clone(), rows[..., 1, :].clone()

    def _new_book(self, spec: KvSpec, side: str, layer: int) -> Codebook:
        quant, view, key = spec.side(side), view_of(spec, side), _level_key(spec, side, layer)
        self._fit_levels([(spec, side, layer)])
        levels = self._levels[key] if quant.fits_levels else fit_widths(quant, None)
        ranged = self._ranges.ranges(spec, layer) if quant.per_channel else None
        ends = (ranged.lower, ranged.upper) if ranged else (None, None)
        fisher = self._losses.fisher(spec, side, layer)
        if fisher and (view, layer) not in self._feedback:
            self._feedback[view, layer] = fisher.feedback()
        feedback, order = self._feedback.get((view, layer), (None, None))
        wants_norm = spec.needs_queries and side == "key"
        norm = self._ranges.query_norm(layer, self._losses.heads[layer]) if wants_norm else None
        return Codebook(*levels, *ends, feedback, order, norm).to(torch.device("cpu"))


def _level_key(spec: KvSpec, side: str, layer: int) -> tuple[View, int, bool, int]:
    """Return what the levels of one side of a layer depend on."""
    quant = spec.side(side)
    return view_of(spec, side), quant.bits, quant.moment_match, layer


def _solve(jobs: Mapping[_Key, _Job], work: Callable[[_Job], Tensor]) -> dict[_Key, Tensor]:
    """Return what `work` finds for each job's problems, (problems, ...) each.

    On a GPU jobs that are alike are one, for calls cost more there than what they do; on a CPU each
    has a core of its own.
    """
    alike: dict[tuple[QuantSpec, int, torch.device], list[list[_Key]]] = {}
    for key, job in jobs.items():
        batches = alike.setdefault((job.quant, job.histogram.bins, job.histogram.device), [[]])
        points = sum(jobs[each].points for each in batches[-1]) + job.points
        if batches[-1] and (job.histogram.device.type == "cpu" or points > _MOST_POINTS):
            batches.append([])
        batches[-1].append(key)
    batched = [batch for batches in alike.values() for batch in batches]

    def one(batch: list[_Key]) -> list[Tensor]:
        parts = [jobs[key].histogram for key in batch]
        found = work(_Job(LevelHistogram.joined(parts), jobs[batch[0]].quant))
        return list(torch.split(found, [part.problems for part in parts]))

    on_gpu = any(job.histogram.device.type != "cpu" for job in jobs.values())
    workers = 1 if on_gpu else os.cpu_count()
    # In a new thread the number of threads is that thread's own.
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(one, batched))
    return {
        key: rows
        for batch, each in zip(batched, found, strict=True)
        for key, rows in zip(batch, each, strict=True)
    }


def _remaining(errors: FloatArray, fisher: BlockFisher | None) -> Sequence[float]:
    """Return the sum of channels' errors, (channels or 1, levels), that compensation leaves."""
    left = np.ones(len(errors))
    if fisher is not None:
        left = fisher.remaining().numpy()
        if len(errors) == 1:
            share = fisher.sensitivity.numpy()
            left = np.atleast_1d(np.average(left, weights=share if share.any() else None))
    total: list[float] = (left @ errors).tolist()
    return total
