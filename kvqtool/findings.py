"""What a calibration has found, as a picture of it needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from kvqtool.allocate import FITTED, Place, loss_of
from kvqtool.bundle import Bundle
from kvqtool.fit import Fitter
from kvqtool.kmeans import FloatArray
from kvqtool.spec import SIDES

DENSITY_BINS: Final = 64


@dataclass(frozen=True)
class Findings:
    """What a calibration has found.

    Args:
        scheme: the scheme's name.
        layers: indices of the packed layers.
        density: square root of the share of normalised values in equal bins over [-1, 1], the
            fullest bin being 1, by layer and side, (DENSITY_BINS,); outliers left out.
        levels: the codebooks, all channels' levels together, (n,), in the same units.
        bits: width of the codes.
        losses: predicted loss of the scheme's own width, nats a position; empty where calibration
            ran no gradients.
        frontier: the trials of a budget's search, as the bundle's report holds them.
    """

    scheme: str
    layers: Sequence[int]
    density: Mapping[Place, FloatArray]
    levels: Mapping[Place, FloatArray]
    bits: Mapping[Place, int]
    losses: Mapping[Place, float]
    frontier: Sequence[Mapping[str, Any]]


def findings_of(bundle: Bundle, fitter: Fitter) -> Findings:
    """Return what was found for a bundle that calibration made with a fitter."""
    positions = bundle.provenance["samples"] * bundle.provenance["seq_len"]
    layers = sorted({layer for layer, _ in bundle.codebooks})
    places = [(layer, side) for layer in layers for side in SIDES]
    common = replace(bundle.spec, mixed=False, target_bits=None)
    losses = {}
    if all(common.side(side).needs_gradients for side in SIDES):
        errors = fitter.predict([(common, side, layer) for layer, side in places], FITTED)
        losses = {
            place: loss_of(row, common.side(place[1]).bits, positions)
            for place, row in zip(places, errors, strict=True)
        }
    return Findings(
        bundle.spec.name,
        layers,
        {
            (layer, side): _shares(fitter.counts(bundle.spec_of(layer), side, layer, DENSITY_BINS))
            for layer, side in places
        },
        {place: bundle.codebooks[place].levels.double().flatten().numpy() for place in places},
        {(layer, side): bundle.spec_of(layer).side(side).bits for layer, side in places},
        losses,
        bundle.provenance.get("allocation", {}).get("frontier", []),
    )


def _shares(counts: FloatArray) -> FloatArray:
    shares: FloatArray = np.sqrt(counts / max(counts.max(), 1.0))
    return shares
