"""Rotary embedding against its formula in float64, and angles in four bytes a token."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvqtool.angles import AngleStore
from kvqtool.errors import RunError
from kvqtool.rope import AngleFormula, Rotation, candidate_rotations

Array = NDArray[np.float64]
HEAD_DIM = 16
POSITIONS = (0, 1, 2047, 131071, 1048575)
ROTATIONS = [
    *candidate_rotations(HEAD_DIM, HEAD_DIM),
    *candidate_rotations(HEAD_DIM, HEAD_DIM // 2),
    *candidate_rotations(HEAD_DIM, 4),
]
every_rotation = pytest.mark.parametrize(
    "rotation", ROTATIONS, ids=lambda r: "-".join(map(str, vars(r).values()))
)


def inv_freq(width: int) -> Array:
    return 10000.0 ** (-np.arange(width // 2) * 2 / width)


def angles_at(positions: list[int], width: int, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), (tokens, width / 2) float32 of float64 angles."""
    phase = np.array(positions, float)[:, None] * inv_freq(width)
    return tuple(torch.from_numpy(scaling * f(phase)).float() for f in (np.cos, np.sin))  # type: ignore[return-value]


def rotated(states: Array, rotation: Rotation, positions: list[int]) -> Array:
    """Rotate (tokens, head_dim) by complex numbers, one pair of channels at a time."""
    out, half = states.copy(), rotation.width // 2
    for pair in range(half):
        first, second = pair, pair + half
        if rotation.layout == "interleaved":
            first, second = 2 * pair, 2 * pair + 1
        first, second = first + rotation.offset, second + rotation.offset
        turn = np.exp(1j * rotation.sign * np.array(positions) * inv_freq(rotation.width)[pair])
        number = (states[:, first] + 1j * states[:, second]) * turn
        out[:, first], out[:, second] = number.real, number.imag
    return out


def states(seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(len(POSITIONS), HEAD_DIM))


@every_rotation
class TestRotation:
    """methods.md 7.10."""

    def pair(self, rotation: Rotation) -> tuple[Tensor, Tensor]:
        cos, sin = angles_at(list(POSITIONS), rotation.width)
        return cos, rotation.sign * sin

    def test_it_turns_pairs_as_complex_numbers_turn(self, rotation: Rotation) -> None:
        found = rotation.rotate(torch.from_numpy(states()).float(), *self.pair(rotation))
        assert found.numpy() == pytest.approx(rotated(states(), rotation, [*POSITIONS]), abs=2e-6)

    def test_undoing_it_gives_the_key_back(self, rotation: Rotation) -> None:
        turned = torch.from_numpy(rotated(states(), rotation, [*POSITIONS])).float()
        found = rotation.unrotate(turned, *self.pair(rotation))
        assert found.numpy() == pytest.approx(states(), abs=2e-6)

    def test_undoing_is_exact_for_tables_that_are_no_unit_rotation(
        self, rotation: Rotation
    ) -> None:
        cos, sin = (1.3 * part.bfloat16().float() for part in self.pair(rotation))
        key = torch.from_numpy(states()).float()
        back = rotation.unrotate(rotation.rotate(key, cos, sin), cos, sin)
        assert back.numpy() == pytest.approx(key.numpy(), abs=2e-6)

    def test_gradients_go_back_as_autograd_takes_them(self, rotation: Rotation) -> None:
        cos, sin = (1.3 * part for part in self.pair(rotation))
        key = torch.from_numpy(states()).float().requires_grad_()
        gradient = torch.from_numpy(states(1)).float()
        rotation.rotate(key, cos, sin).backward(gradient)
        assert key.grad is not None
        found = rotation.pull_back(gradient, cos, sin)
        assert found.numpy() == pytest.approx(key.grad.numpy(), abs=1e-6)

    def test_scores_depend_on_the_distance_alone(self, rotation: Rotation) -> None:
        query, key = (torch.from_numpy(states(seed)).float() for seed in (2, 3))

        def scores(shift: int) -> list[float]:
            turned = []
            for each, ahead in ((query, 5), (key, 0)):
                cos, sin = angles_at([p + shift + ahead for p in POSITIONS], rotation.width)
                turned.append(rotation.rotate(each, cos, rotation.sign * sin))
            return (turned[0] * turned[1]).sum(1).tolist()

        assert scores(0) == pytest.approx(scores(7), abs=2e-5)

    def test_tables_and_angles_are_inverses(self, rotation: Rotation) -> None:
        pair = self.pair(rotation)
        back = rotation.angles(*rotation.model_tables(*pair))
        assert all(torch.equal(a, b) for a, b in zip(back, pair, strict=True))


def test_candidates_never_reach_beyond_the_head() -> None:
    assert list(candidate_rotations(16, 32)) == []
    assert {r.width for r in candidate_rotations(16, 16)} == {16}
    for rotation in ROTATIONS:
        assert 0 <= rotation.offset <= rotation.offset + rotation.width <= HEAD_DIM


class TestFormula:
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("rope", ("default", "linear", "llama3", "yarn"))
    def test_tables_are_the_models_bit_for_bit(self, rope: str, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        options = {"linear": {"factor": 2.0}, "yarn": {"factor": 4.0}}.get(rope, {})
        if rope == "llama3":
            options = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if rope in ("llama3", "yarn"):
            options["original_max_position_embeddings"] = 128
        parameters = {"rope_type": rope, "rope_theta": 10000.0, **options}
        config = LlamaConfig(
            head_dim=16, hidden_size=16, num_attention_heads=1, rope_parameters=parameters
        )
        module = LlamaRotaryEmbedding(config)
        positions = torch.tensor([[*POSITIONS]])
        cos, sin = module(torch.zeros(1, dtype=dtype), positions)
        formula = AngleFormula(module.inv_freq, module.attention_scaling, dtype)
        found = formula.tables(positions)
        assert torch.equal(found[0], cos[..., :8])
        assert torch.equal(found[1], sin[..., :8])


def model_tables(positions: Tensor, base: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the (1, tokens, 16) tables of a Llama whose frequencies are scaled by `base`."""
    frequencies = torch.from_numpy(inv_freq(16)).float() * base
    phase = positions[..., None].float() * frequencies
    both = torch.cat([phase, phase], -1)
    return both.cos(), both.sin()


class TestAngleStore:
    rotation = Rotation("half", 16, 0, 1, "halves")

    def store(self) -> AngleStore:
        formula = AngleFormula(torch.from_numpy(inv_freq(16)).float(), 1.0, torch.float32)
        return AngleStore(self.rotation, formula)

    def filled(self, positions: Tensor, batch: int = 1) -> AngleStore:
        store = self.store()
        store.extend(*model_tables(positions), positions, batch)
        return store

    @pytest.mark.parametrize("tokens", (1, 127, 128, 129))
    @pytest.mark.parametrize("batch", (1, 3))
    def test_a_token_takes_four_bytes_in_pages(self, tokens: int, batch: int) -> None:
        store = self.filled(torch.arange(tokens)[None], batch)
        held = sum(t.untyped_storage().nbytes() for t in store.tensors)
        assert store.kind == "positions"
        assert held == -(-tokens // 128) * 128 * batch * 4

    def test_what_is_read_is_the_models_table(self) -> None:
        positions = torch.tensor([[*POSITIONS], [p + 3 for p in POSITIONS]])
        cos, sin = self.filled(positions, 2).read(1, 4)
        expected = model_tables(positions)
        assert torch.equal(cos, expected[0][:, 1:4, :8].transpose(0, 1))
        assert torch.equal(sin, expected[1][:, 1:4, :8].transpose(0, 1))

    def test_angles_no_formula_gives_are_kept_as_a_table(self) -> None:
        store = self.filled(torch.arange(5)[None])
        later = torch.arange(5, 9)[None]
        store.extend(*model_tables(later, base=0.5), later, 1)
        assert store.kind == "table"
        cos, sin = store.read(0, 9)
        before, after = model_tables(torch.arange(5)[None]), model_tables(later, base=0.5)
        assert torch.equal(cos[:, 0], torch.cat([before[0], after[0]], 1)[0, :, :8])
        assert torch.equal(sin[:, 0], torch.cat([before[1], after[1]], 1)[0, :, :8])

    @pytest.mark.parametrize("positions", (None, torch.zeros(3, 1, 4, dtype=torch.int64)))
    def test_without_plain_positions_a_table_is_kept(self, positions: Tensor | None) -> None:
        store = self.store()
        store.extend(*model_tables(torch.arange(4)[None]), positions, 1)
        assert store.kind == "table"
        assert store.tokens == 4

    def test_sequences_can_be_chosen_and_repeated(self) -> None:
        positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
        store = self.filled(positions, 2)
        store.select(torch.tensor([1, 1, 0]))
        assert store.canonical().tolist() == [[5, 5, 0], [6, 6, 1], [7, 7, 2]]

    def test_truncated_tokens_are_forgotten(self) -> None:
        store = self.filled(torch.arange(10)[None])
        store.read(0, 10)
        store.truncate(4)
        later = torch.tensor([[90, 91]])
        store.extend(*model_tables(later), later, 1)
        assert store.canonical()[:, 0].tolist() == [0, 1, 2, 3, 90, 91]
        assert store.tokens == 6

    @pytest.mark.parametrize("kind", ("positions", "table"))
    def test_a_restored_store_reads_the_same(self, kind: str) -> None:
        store = self.filled(torch.arange(10)[None])
        if kind == "table":
            later = torch.arange(10, 12)[None]
            store.extend(*model_tables(later, base=2.0), later, 1)
        other = self.store()
        other.restore(store.canonical(), kind=store.kind)
        assert (other.kind, other.tokens) == (kind, store.tokens)
        for mine, theirs in zip(other.read(0, 10), store.read(0, 10), strict=True):
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize(
        ("position", "by", "is_wrong"), [(20, 20, False), (21, 21, True), (20, 21, True)]
    )
    def test_a_device_is_asked_once_a_page_whether_tokens_were_as_expected(
        self, monkeypatch: pytest.MonkeyPatch, position: int, by: int, is_wrong: bool
    ) -> None:
        """A token at `position`, turned as one at `by`, after 20 others."""
        store = self.filled(torch.arange(20)[None])
        monkeypatch.setattr("kvqtool.angles._is_waited_for", lambda _: True)
        store.extend(*model_tables(torch.tensor([[by]])), torch.tensor([[position]]), 1)
        assert store.tokens == 21
        if is_wrong:
            with pytest.raises(RunError, match="other angles"):
                store.resolve()
        else:
            assert store.canonical()[-1].tolist() == [20]
