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
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from kvqtool.attach import Session, attach
from kvqtool.bundle import Bundle
from kvqtool.cache import KERNEL, CacheUsage, KvqCache
from kvqtool.calibrate import versions
from kvqtool.data import Windows
from kvqtool.errors import InputError, RunError
from kvqtool.forward import HeadOnly, head_of, hidden_states, position_chunks
from kvqtool.models import LoadedModel
from kvqtool.progress import Progress, silent

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
        loaded: the model.
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
        _check_bundle(bundle, loaded, windows, allow_calibration_text)
    tallies = [_Tally() for _ in bundles]
    count, at_once = len(windows.ids), _windows_at_once(loaded, windows)
    for start in range(0, count, at_once):
        progress("scoring windows", start, count)
        batch = windows.ids[start : start + at_once].to(loaded.device)
        scored_from = windows.scored_from[start : start + at_once]
        exact = hidden_states(loaded.model, {"input_ids": batch})
        for bundle, tally in zip(bundles, tallies, strict=True):
            started = time.perf_counter()
            with attach(loaded.model, bundle, seam=loaded.seam) as session:
                hidden, first, cache = _run(session, bundle, batch, protocol)
            with head_of(loaded.model) as head:
                for row, ids in enumerate(batch):
                    states = exact[row : row + 1], hidden[row : row + 1]
                    tally.score(head, states, ids, max(first, int(scored_from[row])))
            tally.measure(cache, time.perf_counter() - started)
    progress("scoring windows", count, count)
    facts = describe_protocol(loaded, windows, protocol)
    return [tally.result(bundle, facts) for bundle, tally in zip(bundles, tallies, strict=True)]


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
        "kernel": KERNEL,
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


@dataclass
class _Tally:
    """Sums over windows for one bundle."""

    nll: list[float] = field(default_factory=list)
    nll_baseline: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    kld: list[Tensor] = field(default_factory=list)
    same_top1: int = 0
    usages: list[CacheUsage] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def score(self, head: HeadOnly, states: tuple[Tensor, Tensor], ids: Tensor, first: int) -> None:
        """Compare next-token distributions of two runs over one window.

        Args:
            head: hidden states to logits.
            states: (1, tokens, hidden) of the baseline and of the run through the cache.
            ids: (tokens,) int64.
            first: first target position that counts.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=ids.device)
        for chunk in position_chunks(head.model, len(ids) - first):
            at = slice(chunk.start + first - 1, chunk.stop + first - 1)
            target = ids[at.start + 1 : at.stop + 1]
            plain, packed = (nn.functional.log_softmax(head(run[:, at])[0], -1) for run in states)
            sums[0] -= packed.gather(1, target[:, None]).double().sum()
            sums[1] -= plain.gather(1, target[:, None]).double().sum()
            sums[2] += (plain.argmax(-1) == packed.argmax(-1)).sum()
            self.kld.append((plain.exp() * (plain - packed)).sum(-1).clamp_min(0.0).cpu())
        nll, nll_baseline, same = sums.tolist()
        if not math.isfinite(nll + nll_baseline):
            raise RunError(
                "logits hold NaN or infinity; run in float32 or check the model's weights"
            )
        self.nll.append(nll)
        self.nll_baseline.append(nll_baseline)
        self.targets.append(len(ids) - first)
        self.same_top1 += int(same)

    def measure(self, cache: KvqCache, seconds: float) -> None:
        """Note what a window's cache held when it was full."""
        self.usages.append(cache.usage())
        self.layers = cache.layer_report()
        self.seconds += seconds

    def result(self, bundle: Bundle, protocol: dict[str, Any]) -> PplResult:
        """Return the figures over all windows; cache figures are a window's mean."""
        targets, windows = sum(self.targets), len(self.targets)
        ratio = math.exp((sum(self.nll) - sum(self.nll_baseline)) / targets)
        losses = [
            (a - b) / n for a, b, n in zip(self.nll, self.nll_baseline, self.targets, strict=True)
        ]
        spread = torch.tensor(losses, dtype=torch.float64).std().item() if windows > 1 else None
        kld = torch.cat(self.kld).double()
        return PplResult(
            spec=str(bundle.spec),
            ppl=math.exp(sum(self.nll) / targets),
            ppl_baseline=math.exp(sum(self.nll_baseline) / targets),
            ppl_ratio=ratio,
            ppl_ratio_stderr=None if spread is None else ratio * spread / math.sqrt(windows),
            kld_mean=kld.mean().item(),
            kld_p999=float(np.quantile(kld.numpy(), 0.999)),
            same_top1=self.same_top1 / targets,
            effective_bits=16
            * sum(u.cache_bytes for u in self.usages)
            / sum(u.cache_bytes_fp16 for u in self.usages),
            cache_bytes=round(sum(usage.cache_bytes for usage in self.usages) / windows),
            cache_bytes_fp16=self.usages[0].cache_bytes_fp16 // self.usages[0].batch,
            paper_bytes=self.usages[0].paper_bytes / self.usages[0].batch,
            bundle_bytes=bundle.bundle_bytes,
            quantized_share=self.usages[0].quantized_share,
            protocol=protocol,
            layers=self.layers,
            seconds=self.seconds,
        )
