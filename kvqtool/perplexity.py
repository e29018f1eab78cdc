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

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from kvqtool.attach import Session, attached
from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.calibrate import versions
from kvqtool.council import check_protocol
from kvqtool.data import Windows
from kvqtool.errors import InputError, RunError
from kvqtool.forward import HeadOnly, head_of, hidden_states, position_chunks
from kvqtool.live import forget_peak, peak_bytes
from kvqtool.models import LoadedModel
from kvqtool.progress import Progress, silent
from kvqtool.ranks import Ranks
from kvqtool.usage import CacheUsage, kernel_of, layer_report, measure

# Tokens of a batch on a GPU; more would only take memory.
_TOKENS_AT_ONCE: Final = 16384
PROTOCOLS: Final = ("decode-exact", "true-decode", "prefill-exact")


@dataclass(frozen=True)
class PplResult:
    """What `kvqtool ppl` reports; every field is documented in docs/json.md."""

    spec: str
    ppl: float
    ppl_baseline: float
    ppl_ratio: float
    ppl_ratio_stderr: float | None
    kld_mean: float
    kld_p999: float
    same_top1: float
    effective_bits: float
    cache_bytes: int
    cache_bytes_fp16: int
    paper_bytes: float
    bundle_bytes: int
    quantized_share: float
    protocol: dict[str, Any]
    layers: list[dict[str, Any]]
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None


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
    tallies = [_Tally(len(windows.ids)) for _ in bundles]
    share = loaded.ranks.share(len(windows.ids))
    at_once = _windows_at_once(loaded, windows)
    with loaded.ranks.together():
        for start in range(0, len(share), at_once):
            progress("scoring windows", start, len(share))
            numbers = share[start : start + at_once]
            _score(loaded, windows, numbers, protocol, list(zip(bundles, tallies, strict=True)))
    progress("scoring windows", len(share), len(share))
    facts = describe_protocol(loaded, windows, protocol)
    for tally in tallies:
        tally.gather(loaded.ranks)
    return [tally.result(bundle, facts) for bundle, tally in zip(bundles, tallies, strict=True)]


def _score(
    loaded: LoadedModel,
    windows: Windows,
    numbers: range,
    protocol: str,
    runs: list[tuple[Bundle, _Tally]],
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


def _windows_at_once(loaded: LoadedModel, windows: Windows) -> int:
    """Run several windows as one batch on a GPU, where a single one leaves it waiting for the next
    launch.
    """
    return max(_TOKENS_AT_ONCE // windows.ids.shape[1], 1) if loaded.device.type == "cuda" else 1


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


class _Tally:
    """Sums for one bundle: a row per window, so that they do not depend on who ran which."""

    def __init__(self, windows: int) -> None:
        """Start empty for a number of windows."""
        # Columns: nll, nll_baseline, targets, same_top1.
        self._sums = torch.zeros(windows, 4, dtype=torch.float64)
        self._kld: list[Tensor] = [torch.empty(0)] * windows
        self._bytes = torch.zeros(2, dtype=torch.int64)  # of all windows: packed, in fp16
        self._seconds = torch.zeros(1, dtype=torch.float64)
        self._usage: CacheUsage | None = None
        self._layers: list[dict[str, Any]] = []
        self._kernel = ""
        self._peak: int | None = None

    def score(
        self, head: HeadOnly, states: tuple[Tensor, Tensor], ids: Tensor, at: tuple[int, int]
    ) -> None:
        """Compare next-token distributions of two runs over one window.

        Args:
            head: hidden states to logits.
            states: (1, tokens, hidden) of the baseline and of the run through the cache.
            ids: (tokens,) int64.
            at: the window's number, and the first target position that counts.
        """
        number, first = at
        sums = torch.zeros(4, dtype=torch.float64, device=ids.device)
        sums[2], klds = len(ids) - first, []
        for chunk in position_chunks(head.model, len(ids) - first):
            at_positions = slice(chunk.start + first - 1, chunk.stop + first - 1)
            target = ids[at_positions.start + 1 : at_positions.stop + 1, None]
            plain, packed = (
                nn.functional.log_softmax(head(run[:, at_positions])[0], -1) for run in states
            )
            target = target.to(plain.device)
            sums[0] -= packed.gather(1, target).double().sum()
            sums[1] -= plain.gather(1, target).double().sum()
            sums[3] += (plain.argmax(-1) == packed.argmax(-1)).sum()
            klds.append((plain.exp() * (plain - packed)).sum(-1).clamp_min(0.0).cpu())
        if not torch.isfinite(sums).all():
            raise RunError(
                "logits hold NaN or infinity; run in float32 or check the model's weights"
            )
        self._sums[number], self._kld[number] = sums.cpu(), torch.cat(klds)

    def measure(self, cache: KvqCache, seconds: float) -> None:
        """Note what the cache of some windows held when it was full."""
        usage = measure(cache)
        self._bytes += torch.tensor([usage.cache_bytes, usage.cache_bytes_fp16])
        self._usage = self._usage or usage
        self._layers = self._layers or layer_report(cache)
        self._kernel = self._kernel or kernel_of(cache)
        self._seconds += seconds
        self._peak = peak_bytes(cache.stores[0].window[0].device)

    def gather(self, ranks: Ranks) -> None:
        """Take in what other processes scored: every row is somebody's, so sums with zero are
        exact.
        """
        if ranks.is_alone:
            return
        self._sums = ranks.reduce(self._sums)
        self._bytes = ranks.reduce(self._bytes)
        self._seconds = ranks.reduce(self._seconds, "MAX")
        targets = self._sums[:, 2].long().tolist()
        padded = (k if len(k) else torch.zeros(n) for k, n in zip(self._kld, targets, strict=True))
        self._kld = list(ranks.reduce(torch.cat(list(padded))).split(targets))

    def result(self, bundle: Bundle, protocol: dict[str, Any]) -> PplResult:
        """Return the figures over all windows; cache figures are a window's mean."""
        usage, windows = self._usage, len(self._kld)
        assert usage is not None, "every process has a window"
        nll, nll_baseline, targets, same_top1 = (sum(column) for column in self._sums.T.tolist())
        ratio = math.exp((nll - nll_baseline) / targets)
        losses = (self._sums[:, 0] - self._sums[:, 1]) / self._sums[:, 2]
        spread = losses.std().item() if windows > 1 else None
        kld = torch.cat(self._kld).double()
        cache_bytes, cache_bytes_fp16 = self._bytes.tolist()
        return PplResult(
            spec=bundle.spec.name,
            ppl=math.exp(nll / targets),
            ppl_baseline=math.exp(nll_baseline / targets),
            ppl_ratio=ratio,
            ppl_ratio_stderr=None if spread is None else ratio * spread / math.sqrt(windows),
            kld_mean=kld.mean().item(),
            kld_p999=float(np.quantile(kld.numpy(), 0.999)),
            same_top1=same_top1 / targets,
            effective_bits=16 * cache_bytes / cache_bytes_fp16,
            cache_bytes=round(cache_bytes / windows),
            cache_bytes_fp16=usage.cache_bytes_fp16 // usage.batch,
            paper_bytes=usage.paper_bytes / usage.batch,
            bundle_bytes=bundle.bundle_bytes,
            quantized_share=usage.quantized_share,
            protocol=protocol | {"kernel": self._kernel},
            layers=self._layers,
            seconds=self._seconds.item(),
            tokens_per_second=protocol["windows"] * protocol["seq_len"] / self._seconds.item(),
            peak_bytes=self._peak,
        )
