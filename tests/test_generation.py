"""Choosing tokens and streaming text."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvqtool.bundle import Bundle
from kvqtool.errors import InputError
from kvqtool.generation import generate
from kvqtool.models import LoadedModel
from kvqtool.sampling import BROKEN, Sampling, choose_tokens

# Probabilities 1/2, 1/4, 1/8, 1/16, 1/16, likeliest in the middle.
LOGITS = torch.log(torch.tensor([1 / 16, 1 / 8, 1 / 2, 1 / 4, 1 / 16]))


def draw(sampling: Sampling, count: int, logits: Tensor = LOGITS) -> list[int]:
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0))
    chosen: list[int] = choose_tokens(logits.expand(count, -1), sampling, draws).tolist()
    return chosen


def drawn(sampling: Sampling) -> set[int]:
    return set(draw(sampling, 200))


class TestChoice:
    def test_no_temperature_takes_the_likeliest(self) -> None:
        assert drawn(Sampling(temperature=0.0)) == {2}

    def test_temperature_alone_draws_from_all(self) -> None:
        assert drawn(Sampling(temperature=1.0)) == {0, 1, 2, 3, 4}

    @pytest.mark.parametrize(
        ("top_k", "expected"), [(1, {2}), (2, {2, 3}), (3, {1, 2, 3}), (99, {0, 1, 2, 3, 4})]
    )
    def test_top_k_draws_from_the_k_likeliest(self, top_k: int, expected: set[int]) -> None:
        assert drawn(Sampling(temperature=1.0, top_k=top_k)) == expected

    @pytest.mark.parametrize(
        ("top_p", "expected"),
        [(0.0, {2}), (0.4, {2}), (0.6, {2, 3}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3, 4})],
    )
    def test_top_p_draws_from_the_least_set_that_reaches_it(
        self, top_p: float, expected: set[int]
    ) -> None:
        assert drawn(Sampling(temperature=1.0, top_p=top_p)) == expected

    def test_draws_follow_the_probabilities(self) -> None:
        draws = torch.tensor(draw(Sampling(temperature=1.0), 2000))
        shares = torch.bincount(draws, minlength=5) / 2000
        assert shares.tolist() == pytest.approx(LOGITS.exp().tolist(), abs=0.03)

    def test_a_low_temperature_sharpens(self) -> None:
        """At T = 1/2 the odds of the two likeliest, 2 to 1, become 4 to 1."""
        draws = draw(Sampling(temperature=0.5, top_k=2), 2000)
        assert draws.count(2) / draws.count(3) == pytest.approx(4, rel=0.15)

    def test_the_last_of_all_numbers_draws_a_token_that_is_left(self) -> None:
        last = torch.tensor([1 - 2.0**-24])
        sampling = Sampling(temperature=1.0, top_p=0.6)
        assert choose_tokens(LOGITS[None], sampling, last).tolist() == [3]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_logits_that_are_not_finite_choose_nothing(self, temperature: float) -> None:
        logits = torch.stack([LOGITS, LOGITS.clone().index_fill(0, torch.tensor(1), float("nan"))])
        chosen = choose_tokens(logits, Sampling(temperature=temperature), torch.zeros(2))
        assert chosen.tolist() == [2, BROKEN]


class TestGenerate:
    PROMPT = "The function returns a"

    def test_text_arrives_in_pieces_that_make_the_whole(
        self, builtin: LoadedModel, calibrated: Callable[[str], Bundle]
    ) -> None:
        pieces: list[str] = []
        sampling = Sampling(max_new_tokens=12)
        found = generate(builtin, calibrated("fp"), self.PROMPT, sampling, on_text=pieces.append)
        assert "".join(pieces) == found.text
        assert found.text == builtin.tokenizer.decode(found.token_ids, skip_special_tokens=True)
        assert all(pieces)

    def test_greedy_tokens_are_those_of_stock_transformers(
        self, builtin: LoadedModel, calibrated: Callable[[str], Bundle]
    ) -> None:
        ids = torch.tensor([builtin.tokenizer(self.PROMPT)["input_ids"]])
        expected = builtin.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        found = generate(builtin, calibrated("fp"), self.PROMPT, Sampling(max_new_tokens=12))
        assert found.token_ids == expected[0, ids.shape[1] :].tolist()

    def test_the_same_seed_draws_the_same_tokens(
        self, builtin: LoadedModel, calibrated: Callable[[str], Bundle]
    ) -> None:
        def tokens(seed: int) -> list[int]:
            sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=seed)
            return generate(builtin, calibrated("fp"), self.PROMPT, sampling).token_ids

        assert tokens(1) == tokens(1)
        assert tokens(1) != tokens(2)

    def test_it_ends_at_the_models_end_token(
        self,
        builtin: LoadedModel,
        calibrated: Callable[[str], Bundle],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sampling = Sampling(max_new_tokens=12)
        free = generate(builtin, calibrated("fp"), self.PROMPT, sampling)
        end = free.token_ids[5]
        monkeypatch.setattr(builtin.model.generation_config, "eos_token_id", [end])
        found = generate(builtin, calibrated("fp"), self.PROMPT, sampling)
        assert (free.finish, found.finish) == ("length", "eos")
        assert found.token_ids == free.token_ids[: free.token_ids.index(end) + 1]

    def test_what_exceeds_the_context_is_refused(
        self, builtin: LoadedModel, calibrated: Callable[[str], Bundle]
    ) -> None:
        with pytest.raises(InputError, match="5000 new ones exceed the model's context of 4096"):
            generate(builtin, calibrated("fp"), self.PROMPT, Sampling(max_new_tokens=5000))
