"""Budgets kept by measuring, on the built-in model."""

from dataclasses import replace

import pytest

from kvqtool.bundle import Bundle
from kvqtool.data import Windows, calibration_windows, load_text
from kvqtool.errors import InputError, SpecError
from kvqtool.models import LoadedModel
from kvqtool.search import MARGIN, MEASUREMENTS, Budget, spend
from kvqtool.spec import parse_spec

SCHEME = parse_spec("nuq3-1%-sink1")


@pytest.fixture(scope="module")
def texts(builtin: LoadedModel) -> tuple[Windows, Windows]:
    text = load_text(None, part="calibration")
    return tuple(  # type: ignore[return-value]  # a pair
        calibration_windows(text, builtin.tokenizer, samples=3, seq_len=128, seed=seed)
        for seed in (0, 1)
    )


@pytest.fixture(scope="module")
def spent(builtin: LoadedModel, texts: tuple[Windows, Windows]) -> Bundle:
    return spend(builtin, texts, (SCHEME, Budget(target_bits=3.0)))


class TestBits:
    def test_they_are_not_exceeded(self, spent: Bundle) -> None:
        said = spent.provenance["allocation"]
        assert 2.9 < said["bits"] <= 3.0
        assert spent.spec == replace(SCHEME, mixed=True, target_bits=3.0)

    def test_no_uniform_scheme_of_the_bytes_is_better(self, spent: Bundle) -> None:
        rows = spent.provenance["allocation"]["frontier"]
        (chosen,) = (row for row in rows if row["is_chosen"])
        rivals = [row for row in rows if row["kind"] == "uniform"]
        assert rivals
        assert all(row["bits"] <= 3.0 for row in rivals)
        assert all(chosen["kld_mean"] <= row["kld_mean"] for row in rivals)

    def test_few_runs_are_measured(self, spent: Bundle) -> None:
        assert len(spent.provenance["allocation"]["frontier"]) <= MEASUREMENTS

    def test_equal_inputs_give_equal_bundles(
        self, builtin: LoadedModel, texts: tuple[Windows, Windows], spent: Bundle
    ) -> None:
        again = spend(builtin, texts, (SCHEME, Budget(target_bits=3.0)))
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


def test_integers_have_no_fisher_information_to_spend_by(
    builtin: LoadedModel, texts: tuple[Windows, Windows]
) -> None:
    with pytest.raises(SpecError, match="use nuq without -nofisher"):
        spend(builtin, texts, (parse_spec("int4"), Budget(target_bits=3.0)))
