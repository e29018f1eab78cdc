"""Budgets kept by measuring, on the built-in model."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvqtool import search
from kvqtool.budget import MARGIN, Budget
from kvqtool.bundle import Bundle, save_bundle
from kvqtool.data import Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.errors import BundleError, InputError, SpecError
from kvqtool.models import LoadedModel
from kvqtool.partial import Partial
from kvqtool.perplexity import evaluate
from kvqtool.search import MEASUREMENTS, spend
from kvqtool.spec import parse_spec

SCHEME = parse_spec("nuq3-1%-sink1")
LICENSE = Path(__file__).parents[1] / "LICENSE"
GOAL = (SCHEME, Budget(target_bits=3.0))


@pytest.fixture(scope="module")
def texts(builtin: LoadedModel) -> tuple[Windows, Windows]:
    text = load_text(None, part="calibration")
    return tuple(  # type: ignore[return-value]  # a pair
        calibration_windows(text, builtin.tokenizer, samples=3, seq_len=128, seed=seed)
        for seed in (0, 1)
    )


@pytest.fixture(scope="module")
def spent(builtin: LoadedModel, texts: tuple[Windows, Windows]) -> Bundle:
    return spend(builtin, texts, GOAL)


class TestBits:
    def test_they_are_not_exceeded(self, spent: Bundle) -> None:
        said = spent.provenance["allocation"]
        assert 2.9 < said["bits"] <= 3.0
        assert spent.spec == replace(SCHEME, mixed=True, target_bits=3.0)

    def test_real_bytes_keep_them_on_text_of_another_kind(
        self, builtin: LoadedModel, texts: tuple[Windows, Windows]
    ) -> None:
        bundle = spend(builtin, texts, (SCHEME, Budget(target_bits=3.2, at_context=128)))
        for name in (None, str(LICENSE)):
            text = load_text(name, part="evaluation")
            windows = evaluation_windows(text, builtin.tokenizer, seq_len=128, windows=8)
            (result,) = evaluate(builtin, windows, [bundle])
            assert 3.0 < result.effective_bits <= 3.2

    def test_no_uniform_scheme_of_the_bytes_is_better(self, spent: Bundle) -> None:
        rows = spent.provenance["allocation"]["frontier"]
        (chosen,) = (row for row in rows if row["is_chosen"])
        rivals = [row for row in rows if row["kind"] == "uniform" and row["bits"] <= 3.0]
        assert rivals
        assert all(chosen["kld_mean"] <= row["kld_mean"] for row in rivals)

    def test_few_runs_are_measured(self, spent: Bundle) -> None:
        assert len(spent.provenance["allocation"]["frontier"]) <= MEASUREMENTS

    def test_equal_inputs_give_equal_bundles(
        self, builtin: LoadedModel, texts: tuple[Windows, Windows], spent: Bundle
    ) -> None:
        again = spend(builtin, texts, GOAL)
        assert again.metadata() == spent.metadata()

    def test_too_few_are_refused_with_the_least(
        self, builtin: LoadedModel, texts: tuple[Windows, Windows]
    ) -> None:
        with pytest.raises(InputError, match=r"1\.5 bits are too few: the smallest .* takes 2\."):
            spend(builtin, texts, (SCHEME, Budget(target_bits=1.5)))


class TestLoss:
    def test_the_limit_is_kept_with_its_margin(
        self, builtin: LoadedModel, texts: tuple[Windows, Windows]
    ) -> None:
        bundle = spend(builtin, texts, (SCHEME, Budget(max_kld=0.08)))
        rows = bundle.provenance["allocation"]["frontier"]
        (chosen,) = (row for row in rows if row["is_chosen"])
        assert chosen["kld_mean"] <= (1 - MARGIN) * 0.08
        assert len(rows) <= MEASUREMENTS
        least = min(row["bits"] for row in rows if row["kld_mean"] <= (1 - MARGIN) * 0.08)
        assert chosen["bits"] < least + 0.1

    def test_an_impossible_one_is_refused(
        self, builtin: LoadedModel, texts: tuple[Windows, Windows]
    ) -> None:
        with pytest.raises(InputError, match=r"no scheme keeps the limit 1e-09: .* allow more"):
            spend(builtin, texts, (SCHEME, Budget(max_kld=1e-9)))


class StoppedError(Exception):
    """Stands for whatever ends a process."""


class TestResume:
    """A search goes on from what it has measured."""

    @pytest.fixture
    def stopped(
        self, builtin: LoadedModel, texts: tuple[Windows, Windows], tmp_path: Path
    ) -> Partial:
        """What a search leaves that was stopped before its third measurement."""
        partial = Partial(tmp_path / "b.partial.safetensors")

        def stop(phase: str, done: int, total: int) -> None:
            if (phase, done) == ("measuring schemes", 2):
                raise StoppedError

        with pytest.raises(StoppedError):
            spend(builtin, texts, GOAL, progress=stop, partial=partial)
        names = {"b.partial.safetensors", "b.partial.trials.safetensors"}
        assert {path.name for path in tmp_path.iterdir()} == names
        return replace(partial, resume=True)

    def test_to_the_same_bundle_without_measuring_twice(
        self,
        builtin: LoadedModel,
        texts: tuple[Windows, Windows],
        spent: Bundle,
        stopped: Partial,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        measured, phases = [], set()
        evaluate = search.evaluate

        def count(*arguments: object) -> object:
            measured.append(arguments)
            return evaluate(*arguments)  # type: ignore[arg-type]  # as it was called

        def listen(phase: str, done: int, total: int) -> None:
            if done < total:
                phases.add(phase)

        monkeypatch.setattr(search, "evaluate", count)
        bundle = spend(builtin, texts, GOAL, progress=listen, partial=stopped)
        assert len(measured) == len(spent.provenance["allocation"]["frontier"]) - 2
        assert phases == {"measuring schemes"}
        files = [stopped.path.with_name(name) for name in ("resumed", "whole")]
        for each, path in zip((bundle, spent), files, strict=True):
            save_bundle(each, path)
        assert files[0].read_bytes() == files[1].read_bytes()
        stopped.remove()
        assert not stopped.path.exists()
        assert not stopped.trials_path.exists()

    def test_measurements_on_other_text_are_refused(
        self, builtin: LoadedModel, texts: tuple[Windows, Windows], stopped: Partial
    ) -> None:
        other = texts[0], replace(texts[1], ids=texts[1].ids.flip(0))
        with pytest.raises(BundleError, match=r"trials\.safetensors is of another .*held_out"):
            spend(builtin, other, GOAL, partial=stopped)


def test_integers_have_no_fisher_information_to_spend_by(
    builtin: LoadedModel, texts: tuple[Windows, Windows]
) -> None:
    with pytest.raises(SpecError, match="use nuq without -nofisher"):
        spend(builtin, texts, (parse_spec("int4"), Budget(target_bits=3.0)))
