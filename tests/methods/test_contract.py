"""What every method keeps, at every width: the conformance suite a new method runs through."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from kvqtool.bits import unpack_words
from kvqtool.codebook import Codebook, as_half
from kvqtool.codec import normalize
from kvqtool.errors import RunError
from kvqtool.histogram import LevelHistogram
from kvqtool.memory import LayerGeometry, body_buffers
from kvqtool.methods import METHODS, get_method
from kvqtool.seam import LayerSeam
from kvqtool.side import GROUPED, METHOD_BITS, NORMED, ROTATING, QuantSpec
from kvqtool.spec import parse_spec
from kvqtool.store import LayerStore

CHANNELS = 96
SEAM = LayerSeam(7, LayerGeometry(2, 48, 48), None, True, None, None, "")
CODED = [method.name for method in METHODS if method.name != "fp"]
NAMES = [f"{name}{bits}" for name in CODED for bits in METHOD_BITS[name]]
# Keys per channel, keys per token, and values, without and with outliers.
FORMS = [
    (side, f"{share}{axis}")
    for side, axis in (("key", ""), ("key", "-pertoken"), ("value", ""))
    for share in ("", "-5%")
]
# fp16 rounds scale and offset of a token to one part in 2048 each.
HALF_ROUNDING = 2.0**-10

TOKEN_FORMS = [("key", ""), ("key", "-g24"), ("value", "-g24")]


def is_one_of(name: str, methods: tuple[str, ...]) -> bool:
    return name.rstrip("0123456789") in methods


def forms_of(name: str) -> list[tuple[str, str]]:
    """Return the forms a method has: those that rotate know ranges per token only; keys in groups
    of tokens have tests of their own.
    """
    if is_one_of(name, (GROUPED,)):
        return [("value", "-g32")]
    return TOKEN_FORMS if is_one_of(name, ROTATING) else FORMS


SCHEMES = [(name, *form) for name in NAMES for form in forms_of(name)]
every_scheme = pytest.mark.parametrize(("name", "side", "rest"), SCHEMES)
ranged_schemes = pytest.mark.parametrize(
    ("name", "side", "rest"), [each for each in SCHEMES if not is_one_of(each[0], (NORMED,))]
)


def spec_of(name: str, side: str, rest: str = "") -> QuantSpec:
    spec: QuantSpec = getattr(parse_spec(f"{name}{rest}"), side)
    return spec


def states_of(rows: int = 40, seed: int = 0) -> Tensor:
    """Return rows whose channels differ in offset and width."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.rand(CHANNELS, generator=generator) * 3 + 0.1
    return torch.randn(rows, CHANNELS, generator=generator) * width + width.flip(0)


def codebook_of(spec: QuantSpec, states: Tensor) -> Codebook:
    """Fit a codebook to states as calibration does: ranges per channel, then levels."""
    if spec.method in ("fp", GROUPED):
        return Codebook(*get_method(spec.method).fit(spec, None))
    lower = upper = None
    if spec.per_channel:
        tail = spec.outlier_fraction / 2
        lower, upper = (as_half(states.quantile(q, dim=0)) for q in (tail, 1 - tail))
    ranged = normalize(states, Codebook(torch.empty(0), torch.empty(0), lower, upper), spec)
    histogram = LevelHistogram(1, 1024, states.device)
    kept = torch.ones_like(states).bool() if ranged.outliers is None else ~ranged.outliers
    histogram.update(ranged.normalized, None, kept)
    return Codebook(*get_method(spec.method).fit(spec, histogram), lower, upper)


@cache
def scheme(name: str, side: str, rest: str) -> tuple[QuantSpec, Tensor, Codebook]:
    """Return a scheme, states, and the codebook fitted to them; tests do not change them."""
    spec, states = spec_of(name, side, rest), states_of()
    return spec, states, codebook_of(spec, states)


def coded(spec: QuantSpec, states: Tensor, book: Codebook) -> tuple[dict[str, Tensor], Tensor]:
    method = get_method(spec.method)
    buffers = method.quantize(states, book, spec)
    return buffers, method.dequantize(buffers, book, spec, states.shape[1])


def ranges_of(
    spec: QuantSpec, states: Tensor, outliers: Tensor, book: Codebook
) -> tuple[Tensor, Tensor]:
    """Return each element's range (low, high) by the definition, before any rounding."""
    if book.lower is not None and book.upper is not None:
        return book.lower.expand_as(states), book.upper.expand_as(states)
    dense = states.masked_fill(outliers, float("nan")).numpy()
    dense = dense.reshape(len(states), -1, spec.group_size or CHANNELS)
    low = torch.from_numpy(np.nanmin(dense, 2, keepdims=True))
    high = torch.from_numpy(np.nanmax(dense, 2, keepdims=True))
    low, high = (end.expand(dense.shape).reshape(states.shape) for end in (low, high))
    return low, high


def outlier_mask(buffers: dict[str, Tensor], spec: QuantSpec, rows: int) -> Tensor:
    """Return where the sparse buffers say outliers are, by a loop over them."""
    mask = torch.zeros(rows, CHANNELS, dtype=torch.bool)
    if "outlier_values" not in buffers:
        return mask
    channels = buffers["outlier_channels"].tolist()
    each = len(channels) // rows if rows else 0
    counts = buffers["outlier_counts"].tolist() if "outlier_counts" in buffers else [each] * rows
    for row, count in enumerate(counts):
        for channel in channels[:count]:
            mask[row, channel] = True
        channels = channels[count:]
    assert not channels
    return mask


@ranged_schemes
class TestRanges:
    def test_no_element_is_off_by_more_than_half_a_gap(
        self, name: str, side: str, rest: str
    ) -> None:
        spec, states, book = scheme(name, side, rest)
        buffers, decoded = coded(spec, states, book)
        outliers = outlier_mask(buffers, spec, len(states))
        low, high = ranges_of(spec, states, outliers, book)
        levels = book.levels
        ends = torch.stack([levels[0] + 1, 1 - levels[-1]])
        gap = torch.cat([levels.diff() / 2, ends]).amax()
        bound = gap * (high - low) / 2 + HALF_ROUNDING * (high.abs() + low.abs()) + 1e-6
        worst = ((decoded - states).abs() - bound).masked_fill(outliers, 0.0)
        assert worst.max() <= 0, (
            f"off by {worst.max():.2e} at {divmod(int(worst.argmax()), CHANNELS)}"
        )

    def test_a_constant_token_decodes_to_itself_or_a_level(
        self, name: str, side: str, rest: str
    ) -> None:
        spec, _, book = scheme(name, side, rest)
        constant = torch.full((3, CHANNELS), 1.25)
        decoded = coded(spec, constant, book)[1]
        assert torch.isfinite(decoded).all()
        if not spec.per_channel:
            assert torch.equal(decoded, constant)


@every_scheme
class TestEveryScheme:
    def test_outliers_are_exact_to_half_precision(self, name: str, side: str, rest: str) -> None:
        spec, states, book = scheme(name, side, rest)
        buffers, decoded = coded(spec, states, book)
        outliers = outlier_mask(buffers, spec, len(states))
        assert bool(outliers.any()) == bool(spec.outlier_fraction)
        assert torch.equal(decoded[outliers], states[outliers].half().float())

    def test_codes_are_in_range_and_nothing_lies_beyond_them(
        self, name: str, side: str, rest: str
    ) -> None:
        spec, states, book = scheme(name, side, rest)
        buffers, _ = coded(spec, states, book)
        codes = unpack_words(buffers["words"], spec.bits, CHANNELS)
        assert 0 <= int(codes.min()) <= int(codes.max()) < 1 << spec.bits
        assert buffers["words"].shape[1] * 32 == CHANNELS * spec.bits

    @pytest.mark.parametrize("rows", (0, 1, 40))
    def test_bytes_are_those_of_the_memory_table(
        self, name: str, side: str, rest: str, rows: int
    ) -> None:
        spec, states, book = scheme(name, side, rest)
        buffers, decoded = coded(spec, states[:rows], book)
        outliers = len(buffers.get("outlier_values", ()))
        table = body_buffers(spec, CHANNELS, rows, outliers, "float32")
        assert {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in buffers.items()} == {
            n: (buffer.dtype, buffer.shape) for n, buffer in table.items()
        }
        held = {n: t.untyped_storage().nbytes() for n, t in buffers.items()}
        assert held == {n: buffer.nbytes for n, buffer in table.items()}
        assert decoded.shape == (rows, CHANNELS)

    def test_the_same_states_give_the_same_bytes(self, name: str, side: str, rest: str) -> None:
        spec, states, book = scheme(name, side, rest)
        first, second = (coded(spec, states.clone(), book)[0] for _ in range(2))
        assert all(torch.equal(first[n], second[n]) for n in first)

    def test_a_row_does_not_depend_on_its_neighbours(self, name: str, side: str, rest: str) -> None:
        spec, states, book = scheme(name, side, rest)
        together = coded(spec, states, book)[1]
        alone = torch.cat([coded(spec, row[None], book)[1] for row in states[:6]])
        assert torch.equal(together[:6], alone)

    def test_strided_states_encode_like_a_copy(self, name: str, side: str, rest: str) -> None:
        spec, states, book = scheme(name, side, rest)
        strided = states.T.contiguous().T
        assert not strided.is_contiguous()
        assert torch.equal(coded(spec, strided, book)[1], coded(spec, states, book)[1])


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in CODED for form in forms_of(name)],
    ids=lambda part: "".join(part),
)
def test_more_bits_are_never_worse(name: str, form: tuple[str, str]) -> None:
    side, rest = form
    states = states_of(200)
    errors = []
    for bits in METHOD_BITS[name]:
        spec = spec_of(f"{name}{bits}", side, rest)
        decoded = coded(spec, states, codebook_of(spec, states))[1]
        errors.append(float((decoded - states).square().sum()))
    assert errors == sorted(errors, reverse=True)


@cache
def store_of(name: str) -> Callable[[Tensor], LayerStore]:
    spec = parse_spec(name)
    states = states_of()
    books = codebook_of(spec.key, states), codebook_of(spec.value, states)

    def store(key: Tensor) -> LayerStore:
        layer = LayerStore(spec, books, SEAM)
        layer.append(key, key.clone(), _no_angles)
        return layer

    return store


def _no_angles(start: int, stop: int) -> tuple[Tensor, Tensor]:
    raise AssertionError("nothing rotates here")


@pytest.mark.parametrize(
    "name", [*(f"{name}-g8" if is_one_of(name, (GROUPED,)) else name for name in NAMES), "fp"]
)
class TestThroughTheStore:
    @pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
    def test_narrow_states_are_those_of_their_float32_form(
        self, name: str, dtype: torch.dtype
    ) -> None:
        key = states_of(12).view(1, 12, 2, 48).transpose(1, 2).to(dtype)
        narrow, wide = store_of(name)(key), store_of(name)(key.float())
        read = narrow.read(_no_angles)[0]
        assert read.dtype == dtype
        assert torch.equal(read, wide.read(_no_angles)[0].to(dtype))

    @pytest.mark.parametrize("bad", (float("nan"), float("inf")))
    def test_states_that_are_not_finite_are_refused(self, name: str, bad: float) -> None:
        key = states_of(12).view(1, 12, 2, 48).transpose(1, 2).clone()
        key[0, 1, 5, 3] = bad
        with pytest.raises(RunError, match="layer 7 produced NaN or infinite states; run in"):
            store_of(name)(key)


def test_fp_gives_back_the_bits_it_was_given() -> None:
    spec, states = parse_spec("fp").key, states_of().bfloat16()
    method = get_method("fp")
    book = Codebook(*method.fit(spec, None))
    back = method.dequantize(method.quantize(states, book, spec), book, spec, CHANNELS)
    assert torch.equal(back, states.float())


def test_every_method_says_what_it_is() -> None:
    assert {method.name for method in METHODS} == {"fp", *METHOD_BITS}
    assert all(method.summary for method in METHODS)
