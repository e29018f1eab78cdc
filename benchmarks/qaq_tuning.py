"""Find the tolerances of a family of QAQ schemes that cost given true bytes; for bench_qaq.py."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace

import torch

from kvqtool.attach import attached
from kvqtool.bundle import Bundle
from kvqtool.data import Windows
from kvqtool.forward import hidden_states
from kvqtool.models import LoadedModel
from kvqtool.perplexity import evaluate
from kvqtool.stepwise import is_stepwise
from kvqtool.usage import measure

RATIOS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)  # values' tolerance to keys'
_STEPS = 10
_GREATEST = 1e6  # of a tolerance; past it only the formula's least bits are left
_LEAP = 6.0  # doublings of a tolerance at once
_CLOSE = 0.01  # of the target's bits
_THERE = 0.05  # farther from its target a scheme is said to have no such bits


@dataclass
class Tuner:
    """Finds a family's tolerances on windows of the calibration text."""

    loaded: LoadedModel
    windows: Windows
    ratios: tuple[float, ...] = RATIOS
    start: float = 0.03

    @torch.no_grad()
    def bits_of(self, bundle: Bundle) -> float:
        """Return the effective bits of the tuning windows, which are not scored."""
        held = []
        with attached(self.loaded, bundle) as session:
            for window in self.windows.ids.to(self.loaded.device).split(1):
                cache = session.new_cache(bundle, prefill="decode-exact")
                for piece in window.split(1 if is_stepwise(bundle.spec) else window.shape[1], 1):
                    hidden_states(session.model, {"input_ids": piece}, cache)
                usage = measure(cache)
                held.append((usage.cache_bytes, usage.cache_bytes_fp16))
        nbytes, nbytes_fp16 = (sum(column) for column in zip(*held, strict=True))
        return 16 * nbytes / nbytes_fp16

    def loss_of(self, bundle: Bundle) -> float:
        """Return the divergence on the tuning windows, nats."""
        (score,) = evaluate(
            self.loaded,
            self.windows,
            [bundle],
            protocol=protocol_of(bundle),
            allow_calibration_text=True,
        )
        return score.kld_mean

    def reach(
        self, bundle: Bundle, ratio: float, target: float, start: float
    ) -> tuple[Bundle, float, float]:
        """Return the bundle whose tolerances, at a ratio, cost the target's bits, those it does
        cost, and the keys' tolerance, sought from `start` on.
        """
        scale, low, high = start, 0.0, float("inf")  # low: too many bits
        last: tuple[float, float] | None = None
        for _ in range(_STEPS):
            found = with_budgets(bundle, scale, scale * ratio)
            bits, at = self.bits_of(found), scale
            over = bits - target
            note(f"tolerance {scale:.3g}: {bits:.3f} bits")
            if abs(over) < _CLOSE * target:
                break
            low, high = (scale, high) if over > 0 else (low, scale)
            # A doubled tolerance takes a bit, or what the last step did: the released formula less.
            rate = (last[1] - bits) / math.log2(at / last[0]) if last else 1.0
            last = at, bits
            scale *= 2 ** max(min(over / rate, _LEAP), -_LEAP) if rate > 0 else 2**over
            if not low < scale < high:
                scale = (low * high) ** 0.5
            scale = min(scale, _GREATEST / ratio)
            if scale == at:
                break
        return found, bits, at

    def best_ratio(self, bundle: Bundle, target: float) -> tuple[float, float]:
        """Return the ratio of least divergence at the target, climbing from the middle of the
        ratios, and the keys' tolerance there.
        """
        scores: dict[int, tuple[float, float]] = {}

        def cost(index: int) -> float:
            if index not in scores:
                start = min(scores.values())[1] if scores else self.start
                found, bits, scale = self.reach(bundle, self.ratios[index], target, start)
                loss = self.loss_of(found) if abs(bits / target - 1) < 0.03 else float("inf")
                note(f"ratio {self.ratios[index]:g}: {bits:.3f} bits, KLD {loss:.4f}")
                scores[index] = loss, scale
            return scores[index][0]

        if len(self.ratios) == 1:
            return self.ratios[0], self.start
        at = len(self.ratios) // 2
        while True:
            around = [i for i in (at, at - 1, at + 1) if 0 <= i < len(self.ratios)]
            best = min(around, key=cost)
            if best == at:
                return self.ratios[at], scores[at][1]
            at = best


def around(ratio: float) -> tuple[float, ...]:
    """Return ratios whose middle is a given one."""
    return tuple(ratio * factor for factor in (0.1, 1 / 3, 1.0, 3.0, 10.0))


def protocol_of(bundle: Bundle) -> str:
    """Return how a bundle is scored: at once where that stores what decoding would."""
    return "true-decode" if is_stepwise(bundle.spec) else "decode-exact"


def with_budgets(bundle: Bundle, key: float, value: float) -> Bundle:
    """Return a bundle with other tolerances; its codebooks do not depend on them."""
    key, value = float(f"{key:.3g}"), float(f"{value:.3g}")
    spec = bundle.spec
    return replace(
        bundle,
        spec=replace(
            spec,
            key=replace(spec.key, error_budget=key),
            value=replace(spec.value, error_budget=value),
        ),
    )


def tune(tuner: Tuner, name: str, bundle: Bundle, targets: list[float]) -> list[Bundle]:
    """Return a family's bundle at each target, or the nearest to it that there is; the ratio is
    sought at the first.
    """
    ratio, start = tuner.best_ratio(bundle, targets[0])
    chosen: dict[float, Bundle] = {}
    for target in targets:
        found, bits, scale = tuner.reach(bundle, ratio, target, start)
        if abs(bits / target - 1) < _THERE:
            start = scale
        else:
            note(f"{name} has no {target:g} bits: {bits:.3f} are nearest")
        if all(abs(bits / known - 1) > _CLOSE for known in chosen):
            chosen[bits] = found
    return list(chosen.values())


def note(text: str) -> None:
    """Say something on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
