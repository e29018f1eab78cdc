"""One layer's cache: the same bytes however tokens come, exact where it says so."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvqtool.codebook import Codebook, as_half, uniform_levels
from kvqtool.errors import RunError
from kvqtool.memory import LayerGeometry, Outliers, layer_buffers, split_tokens
from kvqtool.rope import Rotation
from kvqtool.seam import LayerSeam
from kvqtool.spec import KvSpec, parse_spec
from kvqtool.store import LayerStore

HEADS, DIM = 2, 16
ROTATION = Rotation("half", DIM, 0, 1, "halves")
GEOMETRY = LayerGeometry(HEADS, DIM, DIM)
SEAM = LayerSeam(0, GEOMETRY, None, True, ROTATION, None, "")


def states(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    key[..., 3] += 4.0
    return key, value


def angles(batch: int) -> Any:
    """Return a reader of angles in which every sequence starts at a position of its own."""

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        position = torch.arange(start, stop)[:, None] + 1000 * torch.arange(batch)
        phase = position[..., None].double() * 10000.0 ** (
            -torch.arange(DIM // 2).double() * 2 / DIM
        )
        return phase.cos().float(), phase.sin().float()

    return read


def books(spec: KvSpec) -> tuple[Codebook, Codebook]:
    channels, made = HEADS * DIM, []
    for quant in (spec.key, spec.value):
        levels = as_half(uniform_levels(min(quant.bits, 8)))
        width = as_half(torch.full((channels,), 2.5))
        ends = (as_half(2 - 2 * width), as_half(2 + width)) if quant.per_channel else (None, None)
        made.append(Codebook(levels, levels, *ends))
    return made[0], made[1]


def store_of(spec: str, key: Tensor, value: Tensor, steps: list[int]) -> LayerStore:
    parsed = parse_spec(spec)
    store = LayerStore(parsed, books(parsed), SEAM)
    for k, v in zip(key.split(steps, 2), value.split(steps, 2), strict=True):
        store.append(k, v, angles(key.shape[0]))
    return store


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def chunks(tokens: int, size: int) -> list[int]:
    return [min(size, tokens - start) for start in range(0, tokens, size)]


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("window", (0, 3, 128))
@pytest.mark.parametrize("sink", (0, 1, 5))
class TestAppending:
    """methods.md 7.11."""

    def test_one_by_one_and_in_bulk_give_the_same_bytes(
        self, sink: int, window: int, batch: int
    ) -> None:
        spec = f"int3-5%-sink{sink}-r{window}"
        key, value = states(batch, sink + window + 129)
        parsed = parse_spec(spec)
        slow = LayerStore(parsed, books(parsed), SEAM)
        for token in range(key.shape[2]):
            at = slice(token, token + 1)
            slow.append(key[:, :, at], value[:, :, at], angles(batch))
            if token + 1 - sink - window in (0, 1, 127, 128, 129):
                bulk = store_of(spec, key[:, :, : token + 1], value[:, :, : token + 1], [token + 1])
                assert_same(slow.canonical(), bulk.canonical())

    @pytest.mark.parametrize("size", (7, 129))
    def test_chunks_and_bulk_give_the_same_bytes(
        self, sink: int, window: int, batch: int, size: int
    ) -> None:
        spec = f"int3-5%-sink{sink}-r{window}"
        key, value = states(batch, 270)
        bulk = store_of(spec, key, value, [270])
        assert_same(store_of(spec, key, value, chunks(270, size)).canonical(), bulk.canonical())

    @pytest.mark.parametrize("tokens", (4, 140))
    def test_sinks_and_window_are_exact_and_the_body_is_close(
        self, sink: int, window: int, batch: int, tokens: int
    ) -> None:
        key, value = states(batch, tokens)
        read = store_of(f"int8-5%-sink{sink}-r{window}", key, value, [tokens]).read(angles(batch))
        first, body, _ = split_tokens(parse_spec(f"int8-sink{sink}-r{window}"), tokens)
        for found, expected in zip(read, (key, value), strict=True):
            assert torch.equal(found[:, :, :first], expected[:, :, :first])
            assert torch.equal(found[:, :, first + body :], expected[:, :, first + body :])
            # int8 over at most 10 wide leaves 10 / 255 / 2; a rotation mixes two elements.
            assert found.sub(expected).abs().max() < 2**0.5 * 0.02 + 4e-3

    def test_bytes_are_those_of_the_memory_table(self, sink: int, window: int, batch: int) -> None:
        spec = parse_spec(f"int3-5%-sink{sink}-r{window}")
        key, value = states(batch, 200)
        store = store_of(str(spec), key, value, chunks(200, 60))
        outliers = Outliers(*(body.outliers for body in store.bodies))
        table = layer_buffers(spec, GEOMETRY, batch, 200, outliers, "float32")
        held = {n: sum(t.untyped_storage().nbytes() for t in ts) for n, ts in store.tensors.items()}
        assert held == {name: buffer.nbytes for name, buffer in table.items()}


@pytest.mark.parametrize(
    "spec", ("fp", "int4", "int2-5%-cap2", "int4-postrope", "int3-g16", "nf4-pertoken")
)
def test_every_scheme_takes_tokens_one_by_one(spec: str) -> None:
    key, value = states(2, 131)
    slow, bulk = (store_of(spec, key, value, steps) for steps in ([1] * 131, [131]))
    assert_same(slow.canonical(), bulk.canonical())


def test_fp_gives_everything_back_to_rounding() -> None:
    key, value = states(2, 131)
    read = store_of("fp", key, value, [100, 31]).read(angles(2))
    assert torch.allclose(read[0], key, atol=3e-6)
    assert torch.equal(read[1], value)


def test_keys_are_stored_as_they_were_before_rope() -> None:
    """A key that is constant before RoPE takes one code per channel."""
    before = torch.linspace(-2, 2, DIM).expand(1, HEADS, 200, DIM)
    cos, sin = (part.transpose(0, 1)[:, None] for part in angles(1)(0, 200))
    key = ROTATION.rotate(before, cos, sin)
    store = store_of("int2", key, torch.zeros_like(key), [200])
    words = store.canonical()["key.words"]
    assert (words == words[0]).all()


@pytest.mark.parametrize("kept", (0, 1, 4, 60, 131, 140, 150))
@pytest.mark.parametrize("spec", ("int3-5%", "int3-5%-sink4"))
def test_truncating_is_never_having_stored(spec: str, kept: int) -> None:
    key, value = states(2, 150)
    store = store_of(spec, key, value, [150])
    store.truncate(kept)
    assert store.tokens == kept
    store.append(key[:, :, kept:], value[:, :, kept:], angles(2))
    assert_same(store.canonical(), store_of(spec, key, value, [150]).canonical())


def test_truncating_into_the_window_keeps_packed_tokens_packed() -> None:
    key, value = states(1, 20)
    store = store_of("int3-sink2-r5", key, value, [20])
    packed = store.read(angles(1))[0][:, :, 2:14]
    store.truncate(14)
    assert [t.shape[2] for t in store.window] == [0, 0]
    assert torch.equal(store.read(angles(1))[0][:, :, 2:14], packed)
    store.append(key[:, :, 14:], value[:, :, 14:], angles(1))
    assert torch.equal(store.read(angles(1))[0][:, :, 15:], key[:, :, 15:])


@pytest.mark.parametrize("chosen", ([0], [2, 0], [1, 1, 0, 2]))
def test_selecting_is_having_stored_those_sequences(chosen: list[int]) -> None:
    key, value = states(3, 140)
    store = store_of("int3-5%-sink2-r5", key, value, [140])
    expected = [part[chosen] for part in store.read(angles(3))]
    store.select(torch.tensor(chosen))

    def chosen_angles(start: int, stop: int) -> tuple[Tensor, Tensor]:
        cos, sin = angles(3)(start, stop)
        return cos[:, chosen], sin[:, chosen]

    assert store.batch == len(chosen)
    for found, wanted in zip(store.read(chosen_angles), expected, strict=True):
        assert torch.equal(found, wanted)


def test_cleared_stores_start_again() -> None:
    key, value = states(2, 140)
    store = store_of("int3-5%-sink2-r5", key, value, [140])
    store.clear()
    assert (store.tokens, store.is_empty, store.tensors) == (0, True, {})
    store.append(key[:1], value[:1], angles(1))
    assert store.batch == 1


def test_a_restored_store_reads_the_same() -> None:
    key, value = states(1, 140)
    spec = parse_spec("int3-5%-sink2-r5")
    store = store_of(str(spec), key, value, [140])
    named = store.canonical()
    rows = tuple(
        {n.split(".")[1]: t for n, t in named.items() if n.startswith(f"{side}.")}
        for side in ("key", "value")
    )
    exact = {part: (named[f"{part}.key"], named[f"{part}.value"]) for part in ("sink", "window")}
    other = LayerStore(spec, books(spec), SEAM)
    other.restore(exact, rows, 140)  # type: ignore[arg-type]  # a pair
    assert_same(other.canonical(), named)
    assert torch.equal(other.read(angles(1))[0], store.read(angles(1))[0])


@pytest.mark.parametrize("side", (0, 1))
def test_states_that_are_not_finite_are_refused_as_they_leave_the_window(side: int) -> None:
    pair = states(1, 9)
    pair[side][0, 1, 4, 2] = float("nan")
    with pytest.raises(RunError, match="layer 0 produced NaN or infinite states; run in float32"):
        store_of("int3", *pair, [9])


def test_what_is_held_back_for_speculation_stays_bounded_and_reads_as_packed() -> None:
    key, value = states(1, 400)
    spec = parse_spec("int4-sink1-r5")
    held, packed = (LayerStore(spec, books(spec), SEAM) for _ in range(2))
    for at in range(400):
        token = key[:, :, at : at + 1], value[:, :, at : at + 1]
        held.append(*token, angles(1), hold=True)
        packed.append(*token, angles(1))
    assert packed.window[0].shape[2] == 5
    assert 5 < held.window[0].shape[2] <= 5 + 256
    for mine, theirs in zip(held.read(angles(1)), packed.read(angles(1)), strict=True):
        assert torch.equal(mine, theirs)
    held.commit(angles(1))
    assert_same(held.canonical(), packed.canonical())
