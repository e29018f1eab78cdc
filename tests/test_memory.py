"""The memory table: sizes by hand, the references' golden numbers, and what must always hold."""

import itertools
import math

import pytest

from kvqtool.accounting import paper_bits, paper_bytes
from kvqtool.errors import InputError
from kvqtool.layers import Angles, CacheLayer, CacheModel
from kvqtool.memory import (
    PAGE_TOKENS,
    Buffer,
    LayerGeometry,
    Outliers,
    body_buffers,
    capacity,
    count_dtype,
    expected_outliers,
    groups_per_token,
    index_dtype,
    layer_buffers,
    most_outliers,
    outliers_per_tail,
    position_buffer,
    split_tokens,
    words_per_row,
)
from kvqtool.spec import KvSpec, parse_spec

GIB = 2**30
LLAMA_7B = (LayerGeometry(num_kv_heads=32, key_dim=128, value_dim=128),) * 32
SMALL = LayerGeometry(num_kv_heads=3, key_dim=64, value_dim=64)


def model_of(spec: KvSpec, layers: tuple[LayerGeometry, ...], batch: int, dtype: str) -> CacheModel:
    rotated = Angles("0", layers[0].key_dim)
    return CacheModel(
        tuple(CacheLayer("full", layer, angles=rotated) for layer in layers), spec, batch, dtype
    )


SPECS = (
    *("fp", "nuq4", "nuq3-1%-sink1", "nuq2-1%-sink1-r32", "int4-g64", "int3-1%-pertoken"),
    *("nf4-1%-cap4", "nuq8-1%/nuq3-0.5%", "int2-1%-postrope-r130", "nuq3-1%-pc-sink5"),
)


class TestGolden:
    """Numbers of methods.md section 7: item 1 and item 14."""

    @pytest.mark.parametrize(
        ("channels", "tail"),
        [
            (64, 1),
            (128, 1),
            (256, 2),
            (512, 3),
            (1024, 6),
            (2048, 11),
            (4096, 21),
            (5120, 26),
            (8192, 41),
        ],
    )
    def test_outliers_of_a_tail_at_one_percent(self, channels: int, tail: int) -> None:
        assert outliers_per_tail(parse_spec("nuq3-1%").value, channels) == tail

    @pytest.mark.parametrize(
        ("spec", "gib"), [("fp", 64.0), ("nuq4-1%", 17.3), ("nuq3-1%", 13.3), ("nuq2-1%", 9.3)]
    )
    def test_llama_7b_at_128k_by_the_papers_accounting(self, spec: str, gib: float) -> None:
        total = paper_bytes(parse_spec(spec), LLAMA_7B, batch=1, tokens=131072)
        assert round(total / GIB, 1) == gib

    @pytest.mark.parametrize(
        ("spec", "bits"), [("nuq4-1%", 4.33), ("nuq3-1%", 3.33), ("nuq2-1%", 2.33)]
    )
    def test_bits_by_the_papers_accounting(self, spec: str, bits: float) -> None:
        parsed = parse_spec(spec)
        mean = (paper_bits(parsed.key, 4096) + paper_bits(parsed.value, 4096)) / 2
        assert round(mean, 2) == bits

    def test_ten_million_tokens_of_dense_two_bits(self) -> None:
        total = paper_bytes(parse_spec("nuq2"), LLAMA_7B, batch=1, tokens=10_000_000)
        assert round(total / GIB, 1) == 611.5


class TestPaperBits:
    """Appendix M: keys b + 32 f + 32 / C, values b + 32 f + 64 / C."""

    @pytest.mark.parametrize("channels", [128, 192, 4096])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_terms(self, bits: int, channels: int) -> None:
        sparse, dense = parse_spec(f"nuq{bits}-1%"), parse_spec(f"nuq{bits}")
        assert paper_bits(sparse.key, channels) == pytest.approx(bits + 0.32 + 32 / channels)
        assert paper_bits(sparse.value, channels) == pytest.approx(bits + 0.32 + 64 / channels)
        assert paper_bits(dense.key, channels) == bits
        assert paper_bits(dense.value, channels) == pytest.approx(bits + 32 / channels)

    def test_groups_cost_a_range_each(self) -> None:
        assert paper_bits(parse_spec("int4-g64").key, 192) == 4 + 32 / 64

    def test_exact_is_sixteen(self) -> None:
        assert paper_bits(parse_spec("fp").key, 192) == 16


class TestShapes:
    def test_the_documented_example(self) -> None:
        assert body_buffers(parse_spec("nuq3-1%").key, 192, 128, 270, "float32") == {
            "words": Buffer("int32", (128, 18)),
            "outlier_counts": Buffer("uint8", (128,)),
            "outlier_values": Buffer("float16", (270,)),
            "outlier_channels": Buffer("uint8", (270,)),
        }

    def test_values_bring_ranges_and_no_counts(self) -> None:
        assert body_buffers(parse_spec("nuq3-1%").value, 192, 128, 256, "float32") == {
            "words": Buffer("int32", (128, 18)),
            "ranges": Buffer("float16", (128, 1, 2)),
            "outlier_values": Buffer("float16", (256,)),
            "outlier_channels": Buffer("uint8", (256,)),
        }

    def test_exact_states_are_kept_in_the_models_dtype(self) -> None:
        expected = {"states": Buffer("bfloat16", (128, 192))}
        assert body_buffers(parse_spec("fp").key, 192, 128, 0, "bfloat16") == expected

    def test_sink_and_window_are_in_the_models_dtype(self) -> None:
        spec = parse_spec("nuq3-sink2-r5")
        buffers = layer_buffers(spec, SMALL, 4, 100, Outliers(0, 0), "float32")
        assert buffers["sink.key"] == buffers["sink.value"] == Buffer("float32", (4, 3, 2, 64))
        assert buffers["window.key"] == buffers["window.value"] == Buffer("float32", (4, 3, 5, 64))
        assert buffers["key.words"] == Buffer("int32", (4 * 128, 18))

    def test_keys_and_values_may_differ_in_width(self) -> None:
        layer = LayerGeometry(num_kv_heads=2, key_dim=192, value_dim=128)
        buffers = layer_buffers(parse_spec("nuq4"), layer, 1, 1, Outliers(0, 0), "float16")
        assert buffers["key.words"].shape == (128, 2 * 192 * 4 // 32)
        assert buffers["value.words"].shape == (128, 2 * 128 * 4 // 32)
        assert layer.elements == 2 * (192 + 128)

    @pytest.mark.parametrize(
        ("channels", "bits", "words"),
        [(32, 3, 3), (33, 3, 4), (8, 2, 1), (192, 3, 18), (80, 3, 8), (1024, 8, 256), (40, 4, 5)],
    )
    def test_the_last_word_is_padded(self, channels: int, bits: int, words: int) -> None:
        assert words_per_row(bits, channels) == words

    @pytest.mark.parametrize(
        ("channels", "index", "count"),
        [
            (8, "uint8", "uint8"),
            (255, "uint8", "uint8"),
            (256, "uint8", "int16"),
            (257, "int16", "int16"),
            (8192, "int16", "int16"),
        ],
    )
    def test_indices_and_counts_are_as_narrow_as_they_can_be(
        self, channels: int, index: str, count: str
    ) -> None:
        assert (index_dtype(channels), count_dtype(channels)) == (index, count)

    @pytest.mark.parametrize(
        ("spec", "keys", "values"),
        [("nuq3", 0, 1), ("int4-g64", 3, 3), ("int4-pertoken", 1, 1), ("fp", 0, 0), ("int4", 0, 1)],
    )
    def test_ranges_a_token_brings(self, spec: str, keys: int, values: int) -> None:
        parsed = parse_spec(spec)
        assert groups_per_token(parsed.key, 192) == keys
        assert groups_per_token(parsed.value, 192) == values

    def test_groups_must_divide_the_channels(self) -> None:
        with pytest.raises(InputError, match=r"groups of 128 do not divide the 192 channels"):
            groups_per_token(parse_spec("int4-g128").key, 192)

    @pytest.mark.parametrize(
        ("tokens", "room"), [(0, 0), (1, 128), (128, 128), (129, 256), (131072, 131072)]
    )
    def test_bodies_grow_by_pages(self, tokens: int, room: int) -> None:
        assert capacity(tokens) == room

    @pytest.mark.parametrize(
        ("tokens", "parts"),
        [(0, (0, 0, 0)), (3, (3, 0, 0)), (5, (5, 0, 0)), (9, (5, 0, 4)), (20, (5, 5, 10))],
    )
    def test_sinks_fill_first_then_the_window(
        self, tokens: int, parts: tuple[int, int, int]
    ) -> None:
        assert split_tokens(parse_spec("nuq3-sink5-r10"), tokens) == parts

    def test_a_buffer_is_its_items_times_their_size(self) -> None:
        sizes = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int16": 2, "uint8": 1}
        for dtype, size in sizes.items():
            assert Buffer(dtype, (3, 5, 7)).nbytes == 105 * size
        assert Buffer("int32", (0, 9)).nbytes == 0


class TestOutliers:
    @pytest.mark.parametrize("channels", range(8, 600, 8))
    def test_both_tails_hold_at_least_the_share_and_little_more(self, channels: int) -> None:
        for percent in (0.1, 0.5, 1, 2, 5):
            tail = outliers_per_tail(parse_spec(f"nuq3-{percent}%").value, channels)
            assert 2 * tail >= percent / 100 * channels > 2 * (tail - 1)

    def test_a_whole_number_is_not_rounded_up(self) -> None:
        assert outliers_per_tail(parse_spec("nuq3-1%").value, 200) == 1
        assert outliers_per_tail(parse_spec("nuq3-7%").value, 100) == math.ceil(3.5)
        assert outliers_per_tail(parse_spec("nuq3-14%").value, 100) == 7

    def test_expectation_and_bound(self) -> None:
        spec = parse_spec("nuq3-1%")
        assert expected_outliers(spec, SMALL, 1000) == Outliers(key=1920, value=2000)
        assert most_outliers(spec, SMALL, 1000) == Outliers(key=192_000, value=2000)

    def test_a_cap_bounds_keys_and_leaves_values(self) -> None:
        spec = parse_spec("nuq3-1%-cap4")
        assert most_outliers(spec, SMALL, 1000) == Outliers(key=4000, value=2000)
        assert expected_outliers(parse_spec("nuq3-1%-cap1"), SMALL, 1000).key == 1000
        assert most_outliers(parse_spec("nuq3-1%-cap999"), SMALL, 1000).key == 192_000

    def test_per_token_keys_are_exact_like_values(self) -> None:
        spec = parse_spec("nuq3-1%-pertoken")
        assert expected_outliers(spec, SMALL, 10) == most_outliers(spec, SMALL, 10)
        assert most_outliers(spec, SMALL, 10) == Outliers(20, 20)

    def test_dense_has_none(self) -> None:
        assert most_outliers(parse_spec("nuq3"), SMALL, 1000) == Outliers(0, 0)


class TestTotals:
    def test_a_cache_by_hand(self) -> None:
        spec = parse_spec("nuq3-1%-sink1")
        rows = 256  # 199 packed tokens take two pages
        key = rows * 18 * 4 + rows + 7 * (2 + 1)
        value = rows * 18 * 4 + rows * 2 * 2 + 398 * (2 + 1)
        sink = 2 * 3 * 64 * 2
        found = model_of(spec, (SMALL,), 1, "float16").bytes_given(200, [Outliers(7, 398)])
        assert found == key + value + sink + position_buffer(1, 200).nbytes
        assert position_buffer(1, 200).nbytes == 256 * 4

    @pytest.mark.parametrize("spec", SPECS)
    @pytest.mark.parametrize(("batch", "tokens"), [(1, 0), (1, 1), (2, 127), (3, 128), (1, 4097)])
    def test_the_total_is_the_sum_of_the_table(self, spec: str, batch: int, tokens: int) -> None:
        parsed, layers = parse_spec(spec), (SMALL, LayerGeometry(1, 128, 64))
        rows = batch * split_tokens(parsed, tokens)[1]
        counts = [expected_outliers(parsed, layer, rows) for layer in layers]
        table = [
            layer_buffers(parsed, layer, batch, tokens, count, "bfloat16")
            for layer, count in zip(layers, counts, strict=True)
        ]
        summed = sum(buffer.nbytes for buffers in table for buffer in buffers.values())
        total = model_of(parsed, layers, batch, "bfloat16").bytes_given(tokens, counts)
        assert total == summed + parsed.key.pre_rope * position_buffer(batch, tokens).nbytes

    @pytest.mark.parametrize("spec", SPECS)
    def test_more_tokens_never_cost_less(self, spec: str) -> None:
        parsed = parse_spec(spec)
        totals = []
        for tokens in range(3 * PAGE_TOKENS):
            rows = split_tokens(parsed, tokens)[1]
            counts = [expected_outliers(parsed, SMALL, rows)]
            totals.append(model_of(parsed, (SMALL,), 1, "float16").bytes_given(tokens, counts))
        assert all(a <= b for a, b in itertools.pairwise(totals))

    def test_more_bits_cost_more(self) -> None:
        totals = [
            model_of(parse_spec(f"nuq{b}"), LLAMA_7B, 1, "float16").bytes_given(
                4096, [Outliers(0, 0)] * 32
            )
            for b in (2, 3, 4, 8)
        ]
        assert all(a < b for a, b in itertools.pairwise(totals))

    def test_exact_bytes_are_two_an_element(self) -> None:
        assert model_of(parse_spec("fp"), LLAMA_7B, 1, "float16").fp16_bytes(131072) == 64 * GIB
        assert model_of(parse_spec("fp"), (SMALL,), 3, "float16").fp16_bytes(10) == 3 * 10 * 384 * 2

    def test_allocated_bytes_of_llama_7b_stay_near_the_papers(self) -> None:
        spec, tokens = parse_spec("nuq3-1%"), 131072
        counts = [expected_outliers(spec, LLAMA_7B[0], tokens)] * 32
        allocated = model_of(spec, LLAMA_7B, 1, "float16").bytes_given(tokens, counts)
        assert allocated == pytest.approx(paper_bytes(spec, LLAMA_7B, 1, tokens), rel=0.01)

    def test_one_count_for_each_layer(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            model_of(parse_spec("nuq3"), LLAMA_7B, 1, "float16").bytes_given(10, [Outliers(0, 0)])
