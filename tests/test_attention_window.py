"""What attention of the last n queries decides, with weights written by hand (methods.md 7.21).

Bits are decided when a token leaves the window, once; only a host copy lets them change later.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvqtool.adaptive_store import AdaptiveStore
from kvqtool.codebook import Codebook
from kvqtool.methods import fit_widths
from kvqtool.mixed import decode_mixed, encode_mixed
from kvqtool.probe import probe
from kvqtool.spec import parse_spec

TOKENS, HEADS, DIM = 14, 2, 16
TOKEN = 2  # the one that a query attends to


@pytest.fixture(scope="module")
def values() -> Tensor:
    return torch.randn(1, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def decoded(
    tiny_llama: Callable[..., torch.nn.Module], values: Tensor
) -> Callable[[str, int], AdaptiveStore]:
    """Return what fills a store token by token: all weights are 0.001 but one query's, 0.9."""
    layer = probe(tiny_llama()).packed[0]  # type: ignore[arg-type]

    def decode(text: str, query: int) -> AdaptiveStore:
        spec = parse_spec(text)
        key, value = (Codebook(*fit_widths(side, None)) for side in (spec.key, spec.value))
        key = Codebook(key.levels, key.decode_levels, query_norm=torch.full((HEADS,), 3.0))
        store = AdaptiveStore(spec, (key, value), layer)
        for step in range(TOKENS):
            state = values[:, :, step : step + 1]
            store.take(state, state)
            store.commit(_no_angles)
            weights = torch.full((1, HEADS, step + 1), 0.001)
            if step == query:
                weights[..., TOKEN] = 0.9
            store.rise(weights)
            store.settle(weights[..., -store.window[0].shape[2] :], _no_angles)
        return store

    return decode


def _no_angles(start: int, stop: int) -> tuple[Tensor, Tensor]:
    raise AssertionError("keys are stored after RoPE")


def widths(store: AdaptiveStore, side: int = 1) -> list[int]:
    found: list[int] = store.bodies[side].read()["widths"].tolist()
    return found


@pytest.mark.parametrize("age", range(5))
def test_a_weight_counts_while_its_token_is_in_the_window(
    decoded: Callable[[str, int], AdaptiveStore], age: int
) -> None:
    found = widths(decoded("qaq-k0.02-v0.05-w5", TOKEN + age))
    assert found == [8 if token == TOKEN else 0 for token in range(TOKENS - 5)]


@pytest.mark.parametrize(("window", "age"), [(5, 5), (5, 9), (1, 1), (1, 5)])
def test_a_weight_that_comes_later_does_not(
    decoded: Callable[[str, int], AdaptiveStore], window: int, age: int
) -> None:
    found = widths(decoded(f"qaq-k0.02-v0.05-w{window}", TOKEN + age))
    assert found == [0] * (TOKENS - window)


def test_bits_of_keys_do_not_depend_on_attention(
    decoded: Callable[[str, int], AdaptiveStore],
) -> None:
    early, late = (widths(decoded("qaq-k0.02-v0.05-w5", TOKEN + age), side=0) for age in (1, 9))
    assert early == late


def test_the_last_tokens_are_exact(
    decoded: Callable[[str, int], AdaptiveStore], values: Tensor
) -> None:
    key, value = decoded("qaq-k0.02-v0.05-w5", TOKEN).window
    assert torch.equal(key, values[:, :, -5:])
    assert torch.equal(value, values[:, :, -5:])


@pytest.mark.parametrize("age", (5, 9))
def test_from_a_host_copy_a_value_becomes_what_encoding_it_then_gives(
    decoded: Callable[[str, int], AdaptiveStore], values: Tensor, age: int
) -> None:
    store = decoded("qaq-k0.02-v0.05-w5-shadow", TOKEN + age)
    assert widths(store) == [8 if token == TOKEN else 0 for token in range(TOKENS - 5)]
    spec = store.spec.value
    book = Codebook(*fit_widths(spec, None))
    row = values[:, :, TOKEN].reshape(1, HEADS * DIM)
    directly = decode_mixed(
        encode_mixed(row, torch.tensor([8], dtype=torch.uint8), book, spec), book, spec, HEADS * DIM
    )
    assert torch.equal(store.read(_no_angles)[1][0, :, TOKEN], directly.view(HEADS, DIM))
