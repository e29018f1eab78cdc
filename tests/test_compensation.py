"""Compensated rounding against its plain definition in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvqtool.codebook import Codebook
from kvqtool.codec import encode, nearest_level, normalize
from kvqtool.compensation import DAMPING, BlockFisher, round_in_order
from kvqtool.spec import parse_spec

Array = NDArray[np.float64]
HEADS, WIDTH, ROWS = 2, 16, 50


def gradients(rows: int = 400, seed: int = 0) -> Tensor:
    """Return gradients whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(HEADS, WIDTH, WIDTH, generator=generator) / 4 + torch.eye(WIDTH)
    plain = torch.randn(HEADS, rows, WIDTH, generator=generator)
    size = torch.rand(HEADS, 1, WIDTH, generator=generator) * 2 + 0.1
    return ((plain @ mixed) * size).transpose(0, 1).reshape(rows, HEADS * WIDTH)


def fisher_of(rows: Tensor) -> BlockFisher:
    fisher = BlockFisher(HEADS, WIDTH, rows.device)
    fisher.update(rows)
    return fisher


def hessians(rows: Tensor) -> Iterator[Array]:
    for head in range(HEADS):
        block = rows[:, head * WIDTH : (head + 1) * WIDTH].double().numpy()
        yield block.T @ block


def normalized(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, HEADS * WIDTH, generator=torch.Generator().manual_seed(seed)) / 2


LEVELS = torch.tensor([-1.0, -0.25, 0.25, 1.0])
FEEDBACK = fisher_of(gradients()).feedback()


def rounded(u: Tensor, levels: Tensor = LEVELS, exact: Tensor | None = None) -> Iterator[Tensor]:
    yield from round_in_order(u, (levels, levels), FEEDBACK, exact)


def by_hand(u: Array, levels: Array) -> NDArray[np.int64]:
    """Round one row of one head after another in float64: GPTQ's rule, word by word."""
    factors, order = FEEDBACK[0].double().numpy(), FEEDBACK[1].numpy()
    codes = np.zeros(u.shape, dtype=np.int64)
    for row in range(len(u)):
        for head in range(HEADS):
            wanted = u[row, head * WIDTH : (head + 1) * WIDTH][order[head]].copy()
            for c in range(WIDTH):
                at = head * WIDTH + order[head, c]
                table = levels if levels.ndim == 1 else levels[at]
                codes[row, at] = np.abs(wanted[c] - table).argmin()
                error = wanted[c] - table[codes[row, at]]
                wanted[c + 1 :] -= error * factors[head, c, c + 1 :]
    return codes


class TestFeedback:
    def test_it_is_the_cholesky_factor_of_the_inverse(self) -> None:
        rows = gradients()
        factors, order = fisher_of(rows).feedback()
        for head, hessian in enumerate(hessians(rows)):
            turn = np.argsort(-hessian.diagonal(), kind="stable")
            assert order[head].tolist() == turn.tolist()
            damped = hessian + DAMPING * hessian.diagonal().mean() * np.eye(WIDTH)
            upper = np.linalg.cholesky(np.linalg.inv(damped[turn][:, turn])).T
            expected = np.triu(upper / upper.diagonal()[:, None], 1)
            assert np.abs(factors[head].numpy() - expected).max() < 1e-3  # fp16

    def test_it_does_not_depend_on_how_tokens_came(self) -> None:
        rows = gradients()
        parts = BlockFisher(HEADS, WIDTH, rows.device)
        for part in rows.split(7):
            parts.update(part)
        found, expected = parts.feedback(), fisher_of(rows).feedback()
        assert torch.equal(found[1], expected[1])
        assert (found[0] - expected[0]).abs().max() < 1e-3

    def test_without_gradients_nothing_is_fed_back(self) -> None:
        factors, order = fisher_of(torch.zeros(4, HEADS * WIDTH)).feedback()
        assert not factors.any()
        assert order.tolist() == [list(range(WIDTH))] * HEADS

    def test_a_state_is_taken_up_as_it_was(self) -> None:
        fisher = fisher_of(gradients())
        again = BlockFisher.from_state(fisher.state(), torch.device("cpu"))
        assert all(map(torch.equal, again.feedback(), fisher.feedback()))


class TestRounding:
    @pytest.mark.parametrize("per_channel", (False, True))
    def test_codes_are_those_of_the_plain_definition(self, per_channel: bool) -> None:
        u, levels = normalized(), LEVELS
        if per_channel:
            spread = torch.linspace(0.5, 1.5, HEADS * WIDTH)
            levels = LEVELS * spread[:, None]
        codes, _ = rounded(u, levels)
        assert (codes.numpy() == by_hand(u.double().numpy(), levels.double().numpy())).all()

    def test_the_loss_falls(self) -> None:
        u = normalized()
        plain = LEVELS[nearest_level(u, LEVELS).long()]
        better = LEVELS[next(rounded(u)).long()]

        def loss(read: Tensor) -> float:
            error = (read - u).double().numpy().reshape(ROWS, HEADS, WIDTH)
            return sum(
                np.einsum("ri,ij,rj->", error[:, head], hessian, error[:, head])
                for head, hessian in enumerate(hessians(gradients()))
            )

        assert loss(better) < 0.85 * loss(plain)

    def test_two_tied_channels_share_an_error(self) -> None:
        tied = BlockFisher(1, 2, torch.device("cpu"))
        tied.update(torch.ones(10, 2))
        levels = torch.tensor([0.0, 1.0])
        codes, _ = round_in_order(
            torch.tensor([[0.4, 0.4]]), (levels, levels), tied.feedback(), None
        )
        assert codes.tolist() == [[0, 1]]  # 0.4 + 0.4 is nearer to 1 than to 0

    def test_without_feedback_it_is_the_nearest_level(self) -> None:
        feedback = fisher_of(torch.zeros(4, HEADS * WIDTH)).feedback()
        u = normalized()
        codes, shift = round_in_order(u, (LEVELS, LEVELS), feedback, None)
        assert torch.equal(codes, nearest_level(u, LEVELS))
        assert not shift.any()

    def test_any_split_of_rows_gives_the_same_bits(self) -> None:
        u = normalized()
        codes, shift = rounded(u)
        for size in (1, 7):
            parts = [list(rounded(part)) for part in u.split(size)]
            assert torch.equal(torch.cat([part[0] for part in parts]), codes)
            assert torch.equal(torch.cat([part[1] for part in parts]), shift)

    def test_exact_elements_take_up_the_error_and_pass_none_on(self) -> None:
        u = normalized()
        codes, shift = rounded(u, exact=torch.ones_like(u, dtype=torch.bool))
        assert not shift.any()
        assert torch.equal(codes, nearest_level(u, LEVELS))


@pytest.mark.parametrize("side", ("key", "value"))
def test_an_outlier_holds_what_would_best_be_there(side: str) -> None:
    spec = getattr(parse_spec("nuq2-10%-comp/nuq2-10%-comp"), side)
    states = normalized(3) * 3
    ends = [torch.full((HEADS * WIDTH,), end) for end in (-2.0, 2.0)]
    book = Codebook(LEVELS, LEVELS, *(ends if side == "key" else (None, None)), *FEEDBACK)
    ranged = normalize(states, book, spec)
    assert ranged.outliers is not None
    _, shift = rounded(ranged.normalized, exact=ranged.outliers)
    best = (states - shift * ranged.scale).half()
    buffers = encode(states, book, spec)
    assert torch.equal(buffers["outlier_values"], best[ranged.outliers])
    assert not torch.equal(best[ranged.outliers], states.half()[ranged.outliers])
