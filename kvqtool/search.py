"""Find the scheme of every layer that keeps a budget of bytes, or of loss, by measuring.

`allocate` proposes from predicted losses; candidates run on held-out windows of the calibration
text, and what they cost there decides. Nothing is drawn at random, so equal inputs give equal
bundles.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from typing import Any, Final

from kvqtool.allocate import OUTLIER_MARGIN, Place, Specs, allocate, options
from kvqtool.budget import MARGIN, Budget, Trial
from kvqtool.bundle import Bundle
from kvqtool.calibrate import describe_run, digest, fingerprint, ground_of, observe
from kvqtool.data import Windows
from kvqtool.errors import InputError
from kvqtool.fit import Fitter
from kvqtool.models import LoadedModel
from kvqtool.partial import Partial
from kvqtool.perplexity import evaluate
from kvqtool.progress import Progress, silent
from kvqtool.side import METHOD_BITS
from kvqtool.spec import SIDES, KvSpec
from kvqtool.trials import Measured, TrialJournal

_BISECTIONS: Final = 7
_FACTORS: Final = (2.0, 0.5)
_DEPTHS: Final = 3  # parts of the stack whose predictions are corrected apart
_RECORDED: Final = (2, 3, 4)  # widths that uniform schemes are measured at, for the record
MEASUREMENTS: Final = 40  # at most


def spend(
    loaded: LoadedModel,
    texts: tuple[Windows, Windows],
    goal: tuple[KvSpec, Budget],
    *,
    seed: int = 0,
    progress: Progress = silent,
    partial: Partial | None = None,
) -> Bundle:
    """Calibrate a bundle whose layers share a budget.

    Args:
        loaded: the model.
        texts: windows to calibrate on, and held-out ones to measure on.
        goal: what layers have in common, a scheme that fits levels by Fisher information; and the
            limit.
        seed: what the windows were drawn with, for the record.
        progress: told of every window and every measurement.
        partial: where to keep statistics and measurements in the meantime, as in `calibrate`.
            Measurements of another limit are taken up too: they hold for any.

    Raises:
        BundleError: when `partial` is of another run.
        InputError: when the scheme cannot be allocated, or the limit cannot be kept.
    """
    fitter = observe_for(loaded, texts[0], goal[0], seed=seed, progress=progress, partial=partial)
    return search(loaded, texts, goal, (fitter, partial), seed=seed, progress=progress)


def observe_for(
    loaded: LoadedModel,
    windows: Windows,
    scheme: KvSpec,
    *,
    seed: int = 0,
    progress: Progress = silent,
    partial: Partial | None = None,
) -> Fitter:
    """Do the first half of `spend`: collect what every width and outlier share of a scheme is
    fitted to, and keep it, for measuring takes long.
    """
    mixed = replace(scheme, mixed=True, target_bits=None)
    kept = partial and replace(partial, at_end=True)
    return observe(loaded, windows, [mixed], seed=seed, progress=progress, partial=kept)


def search(
    loaded: LoadedModel,
    texts: tuple[Windows, Windows],
    goal: tuple[KvSpec, Budget],
    known: tuple[Fitter, Partial | None],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Bundle:
    """Do the second half of `spend`, with what `observe_for` has returned.

    Args:
        loaded: the model.
        texts: as in `spend`.
        goal: as in `spend`.
        known: the fitter, and where measurements are kept.
        seed: as in `spend`.
        progress: told of every measurement.
    """
    mixed, budget = replace(goal[0], mixed=True, target_bits=None), goal[1]
    run = fingerprint(loaded, texts[0], [mixed], seed) | {"held_out_sha256": digest(texts[1])}
    journal = TrialJournal(known[1], run, loaded.ranks)
    aim = replace(mixed, mixed=False), budget
    found = _Search(loaded, texts, aim, (known[0], journal), progress)
    found.prepare()
    chosen = found.by_bits() if budget.target_bits is not None else found.by_loss()
    progress("measuring schemes", len(found.trials), len(found.trials))
    provenance = describe_run(loaded, texts[0], seed) | {"allocation": found.record(chosen)}
    return found.bundle(chosen.specs, provenance)


class _Search:
    """One search: its ground, its options, and all it has measured."""

    def __init__(
        self,
        loaded: LoadedModel,
        texts: tuple[Windows, Windows],
        goal: tuple[KvSpec, Budget],
        known: tuple[Fitter, TrialJournal],
        progress: Progress,
    ) -> None:
        self.loaded, self.texts, self.progress = loaded, texts, progress
        self.fitter, self.journal = known
        self.scheme, self.budget = goal
        self.trials: list[Trial] = []
        self._factors: dict[tuple[str, int], float] = {
            (side, depth): 1.0 for side in SIDES for depth in range(_DEPTHS)
        }
        self.ground = ground_of(loaded, self.scheme, self.budget.at_context)
        count = len(self.ground.layers)
        self._depth = {
            index: number * _DEPTHS // count for number, index in enumerate(self.ground.layers)
        }

    def prepare(self) -> None:
        """Count outliers on the held-out text, and predict every option's loss."""
        whole = dict.fromkeys(self.ground.layers, self.scheme)
        result = self._run(whole)
        held = replace(self.ground, tokens=self.texts[1].ids.shape[1])
        if self.scheme.key.outlier_fraction:
            planned, none = held.nbytes(whole), replace(held, key_excess=0.0).nbytes(whole)
            excess = max(1 + (result.cache_bytes - planned) / (planned - none), 0.0)
            self.ground = replace(self.ground, key_excess=self._outliers(excess))
        positions = self.texts[0].ids.numel()
        self.choices = options(self.ground, self.fitter, positions)
        self._note("scheme", whole, result)
        for width in _RECORDED:
            self._measure("uniform", self.ground.uniform((width, width)))

    def _outliers(self, excess: float) -> float:
        """Return how many times the key outliers aimed at are counted: what the held-out text has,
        or where bytes must not be exceeded, what text of another kind may have.
        """
        return excess if self.budget.target_bits is None else max(excess, 1.0) * OUTLIER_MARGIN

    def by_bits(self) -> Trial:
        """Return the best scheme within the bytes: allocated with corrected predictions, or
        uniform.
        """
        target = self.budget.target_bits
        assert target is not None
        self._tuned(target)
        for specs in self._uniform(target)[:2]:
            self._measure("uniform", specs)
        return min((t for t in self.trials if t.bits <= target), key=lambda trial: trial.kld_mean)

    def by_loss(self) -> Trial:
        """Return the smallest scheme that keeps the limit on the loss."""
        low, high = self._range()
        best = self._measure("allocated", self._allocated(high))
        if best.excess(self.budget) > 0:
            asked = self.budget.max_ppl_ratio
            limit = asked if self.budget.max_kld is None else self.budget.max_kld
            raise InputError(
                f"no scheme keeps the limit {limit:g}: {best.bits:.3f} bits cost "
                f"{best.kld_mean:.4g} nats and a ratio of {best.ppl_ratio:.4g}; allow more"
            )
        self._bisect(low, high)
        self._tuned(self._least().bits)
        self._bisect(max(self._least().bits - 0.5, low), self._least().bits)
        for specs in self._uniform(self._least().bits)[:2]:
            self._measure("uniform", specs)
        return self._least()

    def _least(self) -> Trial:
        """Return the fewest bits that have kept the limit so far."""
        kept = [trial for trial in self.trials if trial.excess(self.budget) <= 0]
        return min(kept, key=lambda trial: trial.bits)

    def _range(self) -> tuple[float, float]:
        ends = []
        for pick in (0, -1):
            specs = dict.fromkeys(self.ground.layers, self.scheme)
            for (index, side), row in self.choices.items():
                specs[index] = specs[index].with_side(side, row[pick].quant)
            ends.append(self.ground.bits(specs))
        return ends[0], ends[1]

    def _bisect(self, low: float, high: float) -> None:
        """Measure around the least bits that keep the limit, to about a hundredth of the range."""
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            trial = self._measure("allocated", self._allocated(middle))
            low, high = (low, middle) if trial.excess(self.budget) <= 0 else (middle, high)

    def _tuned(self, bits: float) -> Trial:
        """Correct the predictions of each side and part of the stack by what helps when measured,
        one after another; keep what helped.
        """
        best = self._measure("allocated", self._allocated(bits))
        for group in self._factors:
            for factor in _FACTORS:
                before = self._factors[group]
                self._factors[group] = before * factor
                trial = self._measure("allocated", self._allocated(bits))
                if trial.kld_mean < best.kld_mean:
                    best = trial
                    break
                self._factors[group] = before
        return best

    def _allocated(self, bits: float) -> Specs:
        def weight(place: Place) -> float:
            return self._factors[place[1], self._depth[place[0]]]

        specs = allocate(self.ground, self.choices, int(bits * self.ground.elements / 8), weight)
        if specs is None:
            least, _ = self._range()
            raise InputError(
                f"{bits:g} bits are too few: the smallest scheme takes {least:.3f} at "
                f"{self.budget.at_context} tokens; ask for more, or drop outliers or sinks"
            )
        return specs

    def _uniform(self, bits: float) -> list[Specs]:
        """Return the uniform schemes within the bytes, widest first, even ones before uneven."""
        found = []
        widths = METHOD_BITS["nuq"]
        for pair in itertools.product(widths, widths):
            specs = self.ground.uniform(pair)
            if self.ground.bits(specs) <= bits:
                found.append((sum(pair), min(pair), specs))
        return [specs for *_, specs in sorted(found, key=lambda one: one[:2], reverse=True)]

    def _measure(self, kind: str, specs: Specs) -> Trial:
        for trial in self.trials:
            if trial.specs == specs:
                return trial
        return self._note(kind, specs, self._run(specs))

    def _run(self, specs: Specs) -> Measured:
        self.progress("measuring schemes", len(self.trials), MEASUREMENTS)
        known = self.journal.find(specs)
        if known:
            return known
        bundle = self.bundle(specs, {"calibrated": True})
        (found,) = evaluate(self.loaded, self.texts[1], [bundle])
        result = Measured(
            found.kld_mean, found.ppl_ratio, found.ppl_ratio_stderr, found.cache_bytes
        )
        self.journal.add(specs, result)
        return result

    def _note(self, kind: str, specs: Specs, result: Measured) -> Trial:
        bits = self.ground.bits(specs)
        trial = Trial(kind, bits, result.kld_mean, result.ppl_ratio, result.ppl_ratio_stderr, specs)
        self.trials.append(trial)
        return trial

    def bundle(self, specs: Specs, provenance: dict[str, Any]) -> Bundle:
        """Return the bundle of a scheme a layer; a uniform one says so."""
        books = self.fitter.books(specs)
        identity, schemes = self.loaded.identity.as_json(), set(specs.values())
        if len(schemes) == 1:
            return Bundle(schemes.pop(), identity, books, provenance)
        bits = self.budget.target_bits
        spent = round(self.ground.bits(specs), 4) if bits is None else bits
        scheme = replace(self.scheme, mixed=True, target_bits=spent)
        return Bundle(scheme, identity, books, provenance, specs)

    def record(self, chosen: Trial) -> dict[str, Any]:
        """Return what the bundle says of the search: the limit, the choice, and all trials."""
        rows = [
            {name: value for name, value in asdict(trial).items() if name != "specs"}
            | {"is_chosen": trial is chosen}
            for trial in sorted(self.trials, key=lambda trial: trial.bits)
        ]
        asked = {name: value for name, value in vars(self.budget).items() if value is not None}
        return {
            "budget": asked,
            "margin": MARGIN,
            "key_outliers": self.ground.key_excess,
            "held_out_windows": self.texts[1].ids.shape[0],
            "held_out_seq_len": self.texts[1].ids.shape[1],
            "bits": chosen.bits,
            "frontier": rows,
        }
