"""The figures of one bundle's perplexity run: a row per window, and what they come to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvqtool.bundle import Bundle
from kvqtool.cache import KvqCache
from kvqtool.errors import RunError
from kvqtool.forward import HeadOnly, position_chunks
from kvqtool.live import peak_bytes
from kvqtool.ranks import Ranks
from kvqtool.usage import CacheUsage, kernel_of, layer_report, measure


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


class Tally:
    """Sums for one bundle: a row per window, so that they do not depend on who ran which."""

    def __init__(self, windows: int) -> None:
        """Start empty for a number of windows."""
        # Columns: nll, nll_baseline, targets, same_top1.
        self._sums = torch.zeros(windows, 4, dtype=torch.float64)
        self._kld: list[Tensor] = [torch.empty(0)] * windows
        self._bytes = torch.zeros(2, dtype=torch.int64)  # of all windows: packed, in fp16
        self._seconds = torch.zeros(1, dtype=torch.float64)
        self._usage: CacheUsage | None = None
        self._peak: int | None = None
        self._layers: list[dict[str, Any]] = []
        self._kernel = ""

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
        # Where the states are, which of a spread model is not where its token ids go.
        sums = torch.zeros(4, dtype=torch.float64, device=states[0].device)
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
