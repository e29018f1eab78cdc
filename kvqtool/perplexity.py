"""Measure what a compressed cache costs: perplexity, divergence and bytes, against the same model
on its own cache.

Protocols, all with the baseline in the same run and on the same positions:

- `decode-exact`: one forward; every query attends to what decoding would have stored by then, its
own token included.
- `true-decode`: token by token through the cache; the definition the first is tested against.
- `prefill-exact`: the first half of a window attends to exact states and is packed, the second half
is scored on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from kvqtool.attach import Session, attached
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.calibrate import versions
from kvqtool.data import Windows
from kvqtool.errors import InputError
from kvqtool.forward import head_of, hidden_states
from kvqtool.live import forget_peak
from kvqtool.models import LoadedModel
from kvqtool.progress import Progress, silent
from kvqtool.stepwise import check_protocol
from kvqtool.tally import PplResult, Tally

# Tokens of a batch on a GPU; more would only take memory.
_TOKENS_AT_ONCE: Final = 16384
PROTOCOLS: Final = ("decode-exact", "true-decode", "prefill-exact")


@torch.no_grad()
def evaluate(
    loaded: LoadedModel,
    windows: Windows,
    bundles: Sequence[Bundle],
    *,
    protocol: str = "decode-exact",
    allow_calibration_text: bool = False,
    progress: Progress = silent,
) -> list[PplResult]:
    """Score windows with each bundle's cache and without.

    Args:
        loaded: the model; its `ranks` share the windows, and each gets the same results, but for
            figures of a first window, which are its own.
        windows: evaluation text.
        bundles: schemes with their codebooks, each made for this model.
        protocol: one of PROTOCOLS.
        allow_calibration_text: score also text a bundle was calibrated on.
        progress: told of every window.

    Raises:
        InputError: unknown protocol, or evaluation on calibration text.
        BundleError: when a bundle belongs to another model.
        RunError: when logits are not finite.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is unknown; use one of: {', '.join(PROTOCOLS)}")
    for bundle in bundles:
        check_protocol(bundle.spec, protocol)
        _check_bundle(bundle, loaded, windows, allow_calibration_text)
    tallies = [Tally(len(windows.ids)) for _ in bundles]
    batches = _batches(loaded, windows)
    share, done = [batches[i] for i in loaded.ranks.share(len(batches))], 0
    total = sum(map(len, share))
    with loaded.ranks.together():
        for numbers in share:
            progress("scoring windows", done, total)
            _score(loaded, windows, numbers, protocol, list(zip(bundles, tallies, strict=True)))
            done += len(numbers)
    progress("scoring windows", total, total)
    facts = describe_protocol(loaded, windows, protocol)
    for tally in tallies:
        tally.gather(loaded.ranks)
    return [tally.result(bundle, facts) for bundle, tally in zip(bundles, tallies, strict=True)]


def _score(
    loaded: LoadedModel,
    windows: Windows,
    numbers: range,
    protocol: str,
    runs: list[tuple[Bundle, Tally]],
) -> None:
    """Run some windows, as one batch, without a cache and with each bundle's."""
    batch = windows.ids[numbers.start : numbers.stop : numbers.step].to(loaded.device)
    exact = hidden_states(loaded.model, {"input_ids": batch})
    for bundle, tally in runs:
        forget_peak(loaded.device)
        started = time.perf_counter()
        with attached(loaded, bundle) as session:
            hidden, first, cache = _run(session, bundle, batch, protocol)
        with head_of(loaded.model) as head:
            for row, number in enumerate(numbers):
                states = exact[row : row + 1], hidden[row : row + 1]
                scored_from = max(first, int(windows.scored_from[number]))
                tally.score(head, states, batch[row], (number, scored_from))
        tally.measure(cache, time.perf_counter() - started)


def _check_bundle(
    bundle: Bundle, loaded: LoadedModel, windows: Windows, allow_calibration_text: bool
) -> None:
    """Refuse a bundle of another model, and text it was calibrated on."""
    bundle.check_model(loaded.identity.as_json())
    if (
        bundle.provenance.get("dataset_sha256") == windows.source.sha256
        and not allow_calibration_text
    ):
        raise InputError(
            f"the bundle was calibrated on this very text ({windows.source.name}); "
            "name another --dataset, "
            "or pass --allow-calibration-text"
        )


def _batches(loaded: LoadedModel, windows: Windows) -> list[range]:
    """Cut the windows into batches, for one process or several to run.

    On a GPU several windows are one batch, for a single one leaves it waiting for the next launch.
    A window's states depend on its batch in their last bits, and codes on those. So all processes
    together run the very batches that one would, unless these are fewer than the processes.
    """
    count, tokens = windows.ids.shape
    batches = count
    if loaded.device.type == "cuda":
        whole = -(-count * tokens // _TOKENS_AT_ONCE)
        batches = min(max(whole, loaded.ranks.world_size), count)
    return [range(count * i // batches, count * (i + 1) // batches) for i in range(batches)]


def describe_protocol(loaded: LoadedModel, windows: Windows, protocol: str) -> dict[str, Any]:
    """Return all that a perplexity depends on besides model and bundle."""
    return {
        "name": protocol,
        "seq_len": windows.ids.shape[1],
        "windows": windows.ids.shape[0],
        "stride": windows.stride,
        "bos": windows.bos,
        "dataset": windows.source.name,
        "dataset_sha256": windows.source.sha256,
        "python": windows.source.python,
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def _run(
    session: Session, bundle: Bundle, window: Tensor, protocol: str
) -> tuple[Tensor, int, KvqCache]:
    """Return hidden states of a window run through a cache, the first target that may be scored,
    and the cache.
    """
    model, tokens = session.model, window.shape[1]
    if protocol == "decode-exact":
        cache = session.new_cache(bundle, prefill="decode-exact")
        return hidden_states(model, {"input_ids": window}, cache), 1, cache
    if protocol == "true-decode":
        cache = session.new_cache(bundle, prefill="decode-exact")
        steps = [
            hidden_states(model, {"input_ids": window[:, i : i + 1]}, cache) for i in range(tokens)
        ]
        return torch.cat(steps, dim=1), 1, cache
    half = tokens // 2
    cache = session.new_cache(bundle, prefill="exact")
    parts = [
        hidden_states(model, {"input_ids": part}, cache)
        for part in (window[:, :half], window[:, half:])
    ]
    return torch.cat(parts, dim=1), half + 1, cache
