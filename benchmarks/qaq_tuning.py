"""Find the tolerances of a family of QAQ schemes that cost given true bytes; for bench_qaq.py."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

from kvqtool.bundle import Bundle
from kvqtool.data import Windows
from kvqtool.models import LoadedModel
from kvqtool.perplexity import PplResult, evaluate

RATIOS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)  # values' tolerance to keys'
_STEPS = 10
_CLOSE = 0.01  # of the target's bits
_THERE = 0.05  # farther from its target a scheme has no such bits


@dataclass
class Tuner:
    """Finds a family's tolerances on windows of the calibration text."""

    loaded: LoadedModel
    windows: Windows

    def measure(self, bundle: Bundle) -> PplResult:
        """Score the tuning windows."""
        return evaluate(self.loaded, self.windows, [bundle], allow_calibration_text=True)[0]

    def reach(
        self, bundle: Bundle, ratio: float, target: float, start: float
    ) -> tuple[Bundle, PplResult, float]:
        """Return the bundle whose tolerances, at a ratio, cost the target's bits, its score, and
        the keys' tolerance, sought from `start` on.
        """
        scale, low, high = start, 0.0, float("inf")  # low: too many bits
        for _ in range(_STEPS):
            found = with_budgets(bundle, scale, scale * ratio)
            score, at = self.measure(found), scale
            over = score.effective_bits - target
            if abs(over) < _CLOSE * target:
                break
            low, high = (scale, high) if over > 0 else (low, scale)
            scale *= 2**over  # a doubled tolerance takes a bit
            if not low < scale < high:
                scale = (low * high) ** 0.5
        return found, score, at

    def best_ratio(self, bundle: Bundle, target: float) -> tuple[float, float]:
        """Return the ratio of least divergence at the target, climbing from the middle of RATIOS,
        and the keys' tolerance there.
        """
        scores: dict[int, tuple[float, float]] = {}

        def cost(index: int) -> float:
            if index not in scores:
                start = min(scores.values())[1] if scores else 0.03
                _, score, scale = self.reach(bundle, RATIOS[index], target, start)
                bits, is_there = score.effective_bits, abs(score.effective_bits / target - 1) < 0.03
                note(f"ratio {RATIOS[index]:g}: {bits:.3f} bits, KLD {score.kld_mean:.4f}")
                scores[index] = score.kld_mean if is_there else float("inf"), scale
            return scores[index][0]

        at = len(RATIOS) // 2
        while True:
            around = [i for i in (at, at - 1, at + 1) if 0 <= i < len(RATIOS)]
            best = min(around, key=cost)
            if best == at:
                return RATIOS[at], scores[at][1]
            at = best


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
    """Return a family's bundle at each target that it can reach; the ratio is sought at the
    first.
    """
    ratio, start = tuner.best_ratio(bundle, targets[0])
    chosen = []
    for target in targets:
        found, score, scale = tuner.reach(bundle, ratio, target, start)
        if abs(score.effective_bits / target - 1) > _THERE:
            note(f"{name} has no {target:g} bits: {score.effective_bits:.3f} are nearest")
            continue
        chosen.append(found)
        start = scale
    return chosen


def note(text: str) -> None:
    """Say something on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
