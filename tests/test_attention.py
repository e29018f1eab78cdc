"""Band attention against one query at a time in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kvqtool.attention import Band, band_attention, mark_band
from kvqtool.errors import RunError

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
NOTHING = nn.Identity()


def states(tokens: int, queries: int, batch: int = 2) -> tuple[Tensor, ...]:
    """Return queries, packed keys and values, and exact keys and values of all tokens."""
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(batch, HEADS, queries, DIM, generator=generator)
    widths = (DIM, VALUE_DIM, DIM, VALUE_DIM)
    return query, *(torch.randn(batch, KV_HEADS, tokens, w, generator=generator) for w in widths)


def by_query(
    all_states: tuple[Tensor, ...],
    residual: int,
    seen: Tensor | None,
    scaling: float,
    cap: float | None = None,
) -> Tensor:
    """Attend one query at a time over exactly what decoding would have stored when it came."""
    query, *stored = (t.double().numpy() for t in all_states)
    key, value, exact_key, exact_value = stored
    batch, heads, queries, _ = query.shape
    tokens = key.shape[2]
    out = np.zeros((batch, queries, heads, value.shape[-1]))
    for b, h, q in np.ndindex(batch, heads, queries):
        position, kv = tokens - queries + q, h // (heads // key.shape[1])
        here = [t for t in range(position + 1) if seen is None or bool(seen[b, 0, q, t])]
        if not here:
            continue
        recent = [t > position - residual for t in here]
        k = np.array(
            [(exact_key if r else key)[b, kv, t] for t, r in zip(here, recent, strict=True)]
        )
        v = np.array(
            [(exact_value if r else value)[b, kv, t] for t, r in zip(here, recent, strict=True)]
        )
        score = k @ query[b, h, q] * scaling
        if cap is not None:
            score = np.tanh(score / cap) * cap
        weight = np.exp(score - score.max())
        out[b, q, h] = weight @ v / weight.sum()
    return torch.from_numpy(out)


def attend(
    all_states: tuple[Tensor, ...],
    residual: int,
    mask: Tensor | None,
    scaling: float,
    cap: float | None = None,
) -> Tensor:
    query, key, value, exact_key, exact_value = all_states
    tail = min(key.shape[2], residual - 1 + query.shape[2])
    position = torch.arange(key.shape[2] - query.shape[2], key.shape[2])
    band = Band(exact_key[:, :, -tail:], exact_value[:, :, -tail:], position - residual + 1)
    options = {"scaling": scaling, "softcap": cap, "dropout": 0.0}
    return band_attention(NOTHING, query, mark_band(key.clone(), band), value, mask, **options)[0]


@pytest.mark.parametrize(("tokens", "queries"), [(12, 12), (12, 5), (12, 1), (1, 1)])
@pytest.mark.parametrize("residual", (1, 3, 12, 100))
class TestBand:
    def test_every_query_sees_what_decoding_would_have_stored(
        self, tokens: int, queries: int, residual: int
    ) -> None:
        given = states(tokens, queries)
        expected = by_query(given, residual, None, 0.3)
        assert torch.allclose(attend(given, residual, None, 0.3).double(), expected, atol=1e-5)

    def test_padding_is_seen_by_nobody(self, tokens: int, queries: int, residual: int) -> None:
        given = states(tokens, queries)
        position = torch.arange(tokens - queries, tokens)[:, None]
        seen = (torch.arange(tokens) <= position).expand(2, 1, -1, -1).clone()
        seen[1, :, :, : tokens // 3] = False
        expected = by_query(given, residual, seen, 0.3)
        rows = seen.any(-1)[:, 0]  # a padding query sees nothing; what it gets does not matter
        found = attend(given, residual, seen, 0.3).double()
        assert torch.allclose(found[rows], expected[rows], atol=1e-5)


def test_keys_without_a_band_take_plain_attention() -> None:
    query, key, value, *_ = states(9, 9)
    module = nn.Identity()
    module.is_causal = True  # type: ignore[assignment]  # as attention modules have it
    module.num_key_value_groups = 2  # type: ignore[assignment]
    found, _ = band_attention(module, query, key, value, None, scaling=0.3, dropout=0.0)
    expected = by_query((query, key, value, key, value), 1, None, 0.3)
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("queries", (12, 5, 1))
@pytest.mark.parametrize("residual", (1, 3))
def test_capped_scores_are_those_of_the_formula(queries: int, residual: int) -> None:
    given = states(12, queries)
    expected = by_query(given, residual, None, 0.6, 0.5)
    assert torch.allclose(attend(given, residual, None, 0.6, 0.5).double(), expected, atol=1e-5)


def test_capped_scores_need_no_band() -> None:
    query, key, value, *_ = states(9, 9)
    found, _ = band_attention(NOTHING, query, key, value, None, scaling=0.6, softcap=0.5)
    expected = by_query((query, key, value, key, value), 1, None, 0.6, 0.5)
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("option", ("s_aux", "position_bias"))
def test_attention_that_a_band_would_get_wrong_is_refused(option: str) -> None:
    query, key, value, *exact = states(4, 4)
    marked = mark_band(key, Band(exact[0], exact[1], torch.tensor([2])))
    with pytest.raises(RunError, match=rf"window does not work with attention that uses {option}"):
        band_attention(NOTHING, query, marked, value, None, **{option: torch.ones(1)})
