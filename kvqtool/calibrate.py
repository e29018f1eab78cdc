"""Calibrate: run text through a model twice, fit ranges and codebooks, return bundles.

Pass 1 sketches each key channel's distribution and fixes its outlier thresholds. Pass 2 runs
forward and backward and collects Fisher-weighted histograms of the normalised states. Neither keeps
a state, so memory does not grow with text. Several processes can share the windows of a pass, and a
run that was stopped can go on.
"""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Final

import torch

from kvqtool import __version__
from kvqtool.allocate import OUTLIER_MARGIN, Ground, allocate, options, variants
from kvqtool.bundle import Bundle
from kvqtool.capture import capture
from kvqtool.collect import LossCollector
from kvqtool.data import Windows
from kvqtool.errors import InputError
from kvqtool.fit import Fitter
from kvqtool.memory import MAX_CHANNELS, groups_per_token
from kvqtool.models import LoadedModel
from kvqtool.partial import Journal, Partial
from kvqtool.progress import Progress, silent
from kvqtool.ranges import RangeCollector
from kvqtool.seam import Seam
from kvqtool.spec import KvSpec

MIXED_AT: Final = 8192  # tokens at which a mixed scheme counts its bytes


def calibrate(
    loaded: LoadedModel,
    windows: Windows,
    specs: Sequence[KvSpec],
    *,
    seed: int = 0,
    progress: Progress = silent,
    partial: Partial | None = None,
) -> list[Bundle]:
    """Fit a bundle per spec; all specs share the two passes over the text.

    Args:
        loaded: the model; its `ranks` share the windows, and each gets the same bundles.
        windows: calibration text, cut and tokenised.
        specs: schemes, any mix.
        seed: what the windows were drawn with, for the record.
        progress: told of every window of this process.
        partial: where to keep the statistics in the meantime; the caller removes the file once
            the bundles are safe. None to keep none.

    Raises:
        BundleError: when `partial` is of another run.
        InputError: when the model or its shapes do not fit a spec.
        RunError: when activations are not finite.
    """
    fitter = observe(loaded, windows, specs, seed=seed, progress=progress, partial=partial)
    return fit(loaded, windows, specs, fitter, seed=seed, progress=progress)


def fit(
    loaded: LoadedModel,
    windows: Windows,
    specs: Sequence[KvSpec],
    fitter: Fitter,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Bundle]:
    """Do the rest of `calibrate` with what `observe` has returned for the specs."""
    provenance, identity = describe_run(loaded, windows, seed), loaded.identity.as_json()
    bundles = []
    for number, spec in enumerate(specs):
        progress("fitting codebooks", number, len(specs))
        if spec.mixed:
            layers = spend_by_loss(loaded, spec, fitter, windows.ids.numel())
            bundles.append(Bundle(spec, identity, fitter.books(layers), provenance, layers))
        else:
            books = fitter.books({layer.index: spec for layer in loaded.seam.packed})
            bundles.append(Bundle(spec, identity, books, provenance))
    progress("fitting codebooks", len(specs), len(specs))
    return bundles


def observe(
    loaded: LoadedModel,
    windows: Windows,
    specs: Sequence[KvSpec],
    *,
    seed: int = 0,
    progress: Progress = silent,
    partial: Partial | None = None,
) -> Fitter:
    """Run both passes over the text, and return what fits the codebooks of any of the specs, at any
    width; of a mixed one, also at any of its outlier shares. See `calibrate`.
    """
    seen = _forms(specs)
    for spec in seen:
        _check_shapes(spec, loaded.seam)
    ranges = RangeCollector(seen)
    heads = {layer.index: layer.geometry.num_kv_heads for layer in loaded.seam.packed}
    losses = LossCollector(seen, ranges, heads)
    journal = Journal(
        partial,
        fingerprint(loaded, windows, specs, seed),
        {"ranges": ranges, "losses": losses},
    )
    with loaded.ranks.together():
        journal.resume(_layer_devices(loaded))
    phase = "measuring sensitivity" if losses.needs_gradients else "collecting histograms"
    with _deterministic():
        _feed(loaded, windows, "ranges", journal, ("sketching key ranges", progress))
        _feed(loaded, windows, "losses", journal, (phase, progress))
    return Fitter(ranges, losses)


def spend_by_loss(
    loaded: LoadedModel, scheme: KvSpec, fitter: Fitter, positions: int
) -> dict[int, KvSpec]:
    """Return a scheme for each layer that spends a mixed scheme's bytes by predicted loss."""
    uniform = replace(scheme, mixed=False, target_bits=None)
    ground = ground_of(loaded, uniform, MIXED_AT)
    budget = ground.nbytes(dict.fromkeys(ground.layers, uniform))
    if scheme.target_bits is not None:
        ground = replace(ground, key_excess=OUTLIER_MARGIN)
        budget = int(scheme.target_bits * ground.elements / 8)
    found = allocate(ground, options(ground, fitter, positions), budget)
    if found is None:
        raise InputError(
            f"{scheme.target_bits:g} bits are too few for {uniform} at {MIXED_AT} tokens; "
            "ask for more, or drop outliers or sinks"
        )
    return found


def ground_of(loaded: LoadedModel, scheme: KvSpec, tokens: int) -> Ground:
    """Return what an allocation for a model stands on, bytes counted at a context of `tokens`."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    return Ground(scheme, loaded.seam.cache_layers, tokens, dtype)


def describe_run(loaded: LoadedModel, windows: Windows, seed: int) -> dict[str, Any]:
    """Return what a bundle says of how it was made; no dates, so that equal runs give equal
    files.
    """
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


def fingerprint(
    loaded: LoadedModel, windows: Windows, specs: Sequence[KvSpec], seed: int
) -> dict[str, Any]:
    """Return all that statistics depend on, as it comes back from a file."""
    return describe_run(loaded, windows, seed) | {
        "model": loaded.identity.as_json(),
        "specs": [str(spec) for spec in _forms(specs)],
        "windows_sha256": digest(windows),
        "process": f"{loaded.ranks.rank} of {loaded.ranks.world_size}",
    }


def _forms(specs: Sequence[KvSpec]) -> list[KvSpec]:
    """Return the specs, and for a mixed one all that it may choose from."""
    return [each for spec in specs for each in (variants(spec) if spec.mixed else [spec])]


def digest(windows: Windows) -> str:
    """Return the SHA-256 of windows' tokens."""
    return hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest()


def _layer_devices(loaded: LoadedModel) -> dict[int, torch.device]:
    """Return where each packed layer's states are: with its weights."""
    devices = {}
    for layer in loaded.seam.packed:
        weight = next(layer.module.parameters(), None) if layer.module is not None else None
        devices[layer.index] = loaded.device if weight is None else weight.device
    return devices


def _feed(
    loaded: LoadedModel,
    windows: Windows,
    name: str,
    journal: Journal,
    report: tuple[str, Progress],
) -> None:
    """Let a collector see this process's windows, from where it was; then merge with the others."""
    phase, progress = report
    collector = journal.collectors[name]
    if not collector.is_needed:
        return
    share = loaded.ranks.share(len(windows.ids))
    with (
        loaded.ranks.together(),
        capture(loaded.model, loaded.seam, collector, gradients=collector.needs_gradients) as run,
    ):
        for number in range(journal.done[name], len(share)):
            progress(phase, number, len(share))
            run.run(windows.ids[share[number]])
            journal.step(name)
        journal.finish()
    progress(phase, len(share), len(share))
    collector.merge(loaded.ranks)


def _check_shapes(spec: KvSpec, seam: Seam) -> None:
    """Refuse layers too wide to index, and groups that do not divide a layer's channels."""
    for layer in seam.packed:
        for quant, channels in (
            (spec.key, layer.geometry.key_channels),
            (spec.value, layer.geometry.value_channels),
        ):
            groups_per_token(quant, channels)
            if channels > MAX_CHANNELS:
                raise InputError(
                    f"layer {layer.index} has {channels} channels; "
                    f"kvqtool indexes {MAX_CHANNELS} at most"
                )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Use torch's deterministic sums on a GPU, so that equal runs give equal bundles; put the
    setting back after.
    """
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # Attention's backward pass has no deterministic form on a GPU; all our own sums do.
            warnings.filterwarnings("ignore", message=".*determinis.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
