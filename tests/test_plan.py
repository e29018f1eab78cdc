"""The planner's rows, what would still fit, and the papers' worked examples."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvqtool.catalog import find_gpu
from kvqtool.errors import InputError
from kvqtool.explain import explain
from kvqtool.load import RESERVE_BYTES, Load, Workload
from kvqtool.memory import PAGE_TOKENS
from kvqtool.peaks import Forward
from kvqtool.plan import MemoryPlan, make_load, plan, plans
from kvqtool.questions import best_spec, smallest_gpu
from kvqtool.scheme import plain_scheme
from kvqtool.shape import ModelShape, known_models, read_shape
from kvqtool.spec import parse_spec

GIB = 2**30
CHUNKED = {"prefill_chunk": 512}


def planned(model: str, spec: str, context: int, **options: Any) -> MemoryPlan:
    gpu, memory = options.pop("gpu", None), options.pop("memory", None)
    weights = options.pop("weights", "auto")
    card = find_gpu(gpu) if gpu else None
    work = Workload(context, **options)
    return plan(read_shape(model, weights), parse_spec(spec), work, card, memory)


def write_config(folder: Path, **fields: Any) -> Path:
    """Write a llama config with some fields replaced."""
    config = {"model_type": "llama", "dtype": "float16", "vocab_size": 64, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class TestPapers:
    """KVQuant's figures for LLaMA-7B; its own accounting is `paper_bytes`."""

    @pytest.mark.parametrize(
        ("spec", "gib"), [("fp", 64.0), ("nuq4-1%", 17.3), ("nuq3-1%", 13.3), ("nuq2-1%", 9.3)]
    )
    def test_its_table_at_128k(self, spec: str, gib: float) -> None:
        row = planned("llama-7b", spec, 131072)
        assert round(row.paper_bytes / GIB, 1) == gib
        assert row.cache_bytes == pytest.approx(row.paper_bytes, rel=0.01)

    def test_ten_million_tokens_in_two_bits(self) -> None:
        row = planned("llama-7b", "nuq2", 10_000_000)
        assert round(row.paper_bytes / GIB, 1) == 611.5
        assert row.cache_bytes == pytest.approx(row.paper_bytes, rel=0.01)

    def test_a_million_tokens_are_64_gib_and_fit_one_a100_beside_the_weights(self) -> None:
        """What the paper counts is weights and cache; reading the cache through torch takes more
        than the card has left, which only kernels that read packed codes avoid."""
        row = planned("llama-7b", "nuq2", 2**20, gpu="a100-80", **CHUNKED)
        assert round(row.paper_bytes / GIB, 1) == 64.1
        assert row.weights_bytes is not None
        memory = find_gpu("a100-80").memory_bytes
        assert row.cache_bytes + row.weights_bytes < memory
        assert row.fits is False
        assert row.terms["scratch"] > memory - row.cache_bytes - row.weights_bytes

    def test_ten_million_tokens_fit_eight_a100_by_cache_and_weights(self) -> None:
        row = planned("llama-7b", "nuq2", 10_000_000, tp=8, gpu="a100-80")
        assert row.weights_bytes is not None
        assert row.cache_bytes + row.weights_bytes < find_gpu("a100-80").memory_bytes


class TestRow:
    def test_terms_sum_to_the_total(self) -> None:
        row = planned("llama-3.1-8b", "nuq3-1%-sink1", 5000, batch=3, new_tokens=100, **CHUNKED)
        assert sum(row.terms.values()) == row.total_bytes
        assert sum(row.breakdown.values()) == row.cache_bytes
        peak = max(row.prefill_peak_bytes, row.decode_peak_bytes)
        assert peak == sum(row.terms[n] for n in ("weights", "cache", "activations", "scratch"))
        assert row.terms["reserve"] == RESERVE_BYTES
        assert row.fits is None and row.largest_context is None

    def test_explaining_gives_the_same_sums(self) -> None:
        shape = read_shape("gemma-3-4b")
        load = make_load(
            shape, plain_scheme(parse_spec("nuq4-1%-sink1")), Workload(9000, **CHUNKED)
        )
        lines = {line.term: line.nbytes for line in explain(load, 9000)}
        row = plan(shape, load.spec, load.work)
        assert lines["cache"] == row.cache_bytes
        assert lines["total"] == row.total_bytes
        assert lines["peak"] == max(row.prefill_peak_bytes, row.decode_peak_bytes)

    def test_one_more_page_costs_its_tokens_times_bytes_per_token(self) -> None:
        now, later = (planned("smollm2-135m", "int4-g64", c, batch=2) for c in (1024, 1152))
        assert later.cache_bytes - now.cache_bytes == now.bytes_per_token * PAGE_TOKENS * 2

    def test_new_tokens_lengthen_the_cache_and_not_the_prompt(self) -> None:
        one = planned("smollm2-135m", "int4-g64", 4096, new_tokens=1000)
        assert one.cache_bytes == planned("smollm2-135m", "int4-g64", 5096).cache_bytes
        assert (
            one.prefill_peak_bytes == planned("smollm2-135m", "int4-g64", 4096).prefill_peak_bytes
        )

    def test_speed_is_bandwidth_over_what_is_read_once(self) -> None:
        row = planned("llama-3.1-8b", "fp", 4096, gpu="h100")
        read = 16_060_522_496 + planned("llama-3.1-8b", "fp", 4097).cache_bytes
        assert row.decode_tokens_per_second_estimate == pytest.approx(3.35e12 / read)
        sparse = planned("qwen3-30b-a3b", "fp", 128, gpu="h100")
        dense = planned("qwen3-32b", "fp", 128, gpu="h100")
        assert sparse.decode_tokens_per_second_estimate is not None
        assert dense.decode_tokens_per_second_estimate is not None
        assert (
            sparse.decode_tokens_per_second_estimate > 5 * dense.decode_tokens_per_second_estimate
        )

    def test_assumptions_name_what_the_figures_rest_on(self) -> None:
        def said(model: str, spec: str, **options: Any) -> str:
            return " | ".join(planned(model, spec, 200_000, **options).assumptions)

        text = said("llama-3.1-8b", "nuq3-1%", tp=2)
        for words in ("bfloat16", "materialise", "counted from the config", "1% outliers"):
            assert words in text
        assert "beyond the 131072" in text and "fullest GPU" in text
        assert "every spec costs the same" in said("deepseek-v3", "nuq3-1%")
        assert "states that do not grow" in said("qwen3-next-80b-a3b", "fp")
        assert "weights are unknown" in said("qwen3-next-80b-a3b", "fp")

    def test_a_dtype_is_never_guessed(self, tmp_path: Path) -> None:
        folder = str(write_config(tmp_path, dtype=None))
        with pytest.raises(InputError, match=r"names no dtype; state .* --dtype"):
            planned(folder, "fp", 8)
        with pytest.raises(InputError, match="'int8' is unknown"):
            planned("builtin", "fp", 8, dtype="int8")

    @pytest.mark.parametrize("field", ["context", "batch", "tp", "pp", "prefill_chunk"])
    def test_nothing_is_less_than_one(self, field: str) -> None:
        with pytest.raises(InputError, match=f"{field} 0 must be at least 1"):
            Workload(**{"context": 5, field: 0})


class TestQuestions:
    @pytest.mark.parametrize("spec", ["fp", "nuq3-1%-sink1", "int4-g64-r200"])
    @pytest.mark.parametrize("memory", [600 << 20, 2 * GIB, 24 * GIB])
    def test_the_largest_context_and_batch_fit_and_the_next_do_not(
        self, spec: str, memory: int
    ) -> None:
        row = planned("smollm2-135m", spec, 1000, memory=memory, **CHUNKED)
        assert row.largest_context is not None and row.largest_batch is not None
        if row.largest_context:
            fits = planned("smollm2-135m", spec, row.largest_context, memory=memory, **CHUNKED)
            assert fits.fits
        longer = planned("smollm2-135m", spec, row.largest_context + 1, memory=memory, **CHUNKED)
        assert longer.fits is False
        if row.largest_batch:
            options = {"memory": memory, "batch": row.largest_batch, **CHUNKED}
            assert planned("smollm2-135m", spec, 1000, **options).fits
            more = options | {"batch": row.largest_batch + 1}
            assert planned("smollm2-135m", spec, 1000, **more).fits is False

    def test_the_smallest_gpu_holds_it_and_the_number_of_gpus_is_the_least(self) -> None:
        row = planned("llama-3.1-70b", "nuq4-1%-sink1", 32768, gpu="h100", **CHUNKED)
        assert row.fits is False
        assert row.gpus_needed == 2
        assert planned("llama-3.1-70b", "nuq4-1%-sink1", 32768, tp=2, gpu="h100", **CHUNKED).fits
        name = row.smallest_gpu
        assert name is not None and find_gpu(name).memory_bytes >= row.total_bytes
        assert smallest_gpu(10**15) is None
        assert smallest_gpu(find_gpu("mi325x").memory_bytes) == "mi325x"

    def test_the_best_spec_is_the_one_of_most_bits_that_fits(self) -> None:
        schemes = [plain_scheme(parse_spec(s)) for s in ("fp", "nuq4-1%", "nuq3-1%", "nuq2-1%")]
        shape, work = read_shape("llama-3.1-8b"), Workload(1, **CHUNKED)
        rows = plans(shape, schemes, [200_000, 400_000], work, (None, 46 * GIB))
        fits = {row.spec for row in rows if row.fits} - {row.spec for row in rows if not row.fits}
        bits = {row.spec: row.effective_bits for row in rows}
        assert best_spec(rows) == max(fits, key=lambda spec: bits[spec])
        assert best_spec(plans(shape, schemes, [4096], work, (None, GIB))) is None

    def test_a_point_takes_few_peaks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        counted = Counter[str]()
        peak = Forward._peak

        def count(self: Forward, *given: Any, **named: Any) -> Any:
            counted["peaks"] += 1
            return peak(self, *given, **named)

        monkeypatch.setattr(Forward, "_peak", count)
        schemes = [plain_scheme(parse_spec(f"nuq{b}-1%-sink1")) for b in (2, 3, 4, 8)]
        contexts = [1024 * i for i in range(1, 51, 10)]
        work, room = Workload(1, **CHUNKED), (find_gpu("h100"), None)
        rows = plans(read_shape("llama-3.1-8b"), schemes, contexts, work, room)
        assert len(rows) == 20
        # The largest batch N is found by doubling and halving, 2 log2(N) + 2 trials of three peaks.
        trials = sum(2 * math.log2(max(row.largest_batch or 1, 2)) + 2 for row in rows)
        own = 30 * len(rows)  # of the row itself, and of each number of GPUs that is tried
        assert counted["peaks"] <= 3 * trials + own


class TestSharding:
    def test_heads_are_divided_then_copied(self) -> None:
        whole = planned("llama-3.1-8b", "int4-g128", 4096).cache_bytes
        shares = [
            planned("llama-3.1-8b", "int4-g128", 4096, tp=tp).cache_bytes for tp in (2, 8, 32)
        ]
        assert shares[0] == pytest.approx(whole / 2, rel=0.001)
        assert shares[1] == shares[2] == pytest.approx(whole / 8, rel=0.001)

    def test_latents_are_copied(self) -> None:
        one, eight = (planned("deepseek-v3", "fp", 4096, tp=tp) for tp in (1, 8))
        assert one.cache_bytes == eight.cache_bytes == 61 * 4096 * 576 * 2
        assert one.weights_bytes is not None and eight.weights_bytes is not None
        assert eight.weights_bytes == pytest.approx(one.weights_bytes / 8, rel=0.001)

    def test_stages_take_all_layers_and_all_weights_once(self) -> None:
        row = planned("llama-2-13b", "fp", 4096, pp=3)
        assert [rank["layers"] for rank in row.ranks] == [14, 13, 13]
        whole = planned("llama-2-13b", "fp", 4096)
        assert sum(r["weights_bytes"] or 0 for r in row.ranks) == whole.weights_bytes
        caches = sum(rank["cache_bytes"] or 0 for rank in row.ranks)
        positions = 4096 * 4
        assert caches - 3 * positions == whole.cache_bytes - positions
        assert row.total_bytes == max(rank["total_bytes"] or 0 for rank in row.ranks)

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"tp": 3}, "--tp 3 does not divide the 32 heads"),
            ({"pp": 33}, "32 layers, too few for --pp 33"),
        ],
    )
    def test_what_cannot_be_divided_is_refused(self, options: Any, complaint: str) -> None:
        with pytest.raises(InputError, match=complaint):
            planned("llama-2-7b", "fp", 8, **options)


@pytest.mark.parametrize("name", sorted(known_models()))
def test_well_known_models_have_their_published_size(name: str) -> None:
    known, shape = known_models()[name], read_shape(name)
    assert known["source"].startswith("https://huggingface.co/")
    if known["parameters"]:
        assert shape.weights is not None
        assert shape.weights.numbers == pytest.approx(known["parameters"], rel=2e-4)
    assert shape.max_context and shape.dtype in ("float16", "bfloat16")


def test_well_known_models_have_their_published_cache() -> None:
    """Bytes a token in 16 bits, from the models' cards and papers."""
    expected = {"llama-3.1-8b": 131072, "llama-3.1-70b": 327680, "llama-2-7b": 524288}
    expected |= {"qwen2.5-7b": 57344, "deepseek-v3": 70272, "mixtral-8x7b": 131072}
    for name, size in expected.items():
        shape: ModelShape = read_shape(name)
        load = Load(shape, parse_spec("fp"), Workload(1, dtype="bfloat16"))
        assert load.forward(0, 1).cache.fp16_bytes(1) == size, name


def test_a_folder_goes_before_a_well_known_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-7b").mkdir()
    write_config(tmp_path / "llama-7b", num_hidden_layers=3)
    assert len(read_shape("llama-7b").layers) == 3


def test_more_of_anything_never_takes_less() -> None:
    totals = [planned("gemma-3-4b", "nuq3-1%", c, **CHUNKED).total_bytes for c in (512, 2048, 8192)]
    assert all(a < b for a, b in itertools.pairwise(totals))


class TestUnknownWeights:
    """A config without weight files says nothing about what fits."""

    def test_there_is_no_verdict(self, tmp_path: Path) -> None:
        row = planned(str(write_config(tmp_path)), "fp", 8)
        assert row.weights_bytes is None
        assert row.smallest_gpu is row.fits is row.decode_tokens_per_second_estimate is None
        for options in ({"gpu": "h100"}, {"memory": 80 * GIB}):
            with pytest.raises(InputError, match=r"--weights SIZE, .* --weights none"):
                planned(str(tmp_path), "fp", 8, **options)

    def test_left_out_by_the_user_they_are_no_part_of_it(self, tmp_path: Path) -> None:
        folder = str(write_config(tmp_path))
        row = planned(folder, "fp", 8, gpu="h100", weights="none")
        assert row.weights_bytes == 0
        assert row.fits and row.smallest_gpu
        assert row.decode_tokens_per_second_estimate is None

    def test_speed_needs_the_weights_that_a_token_passes(self) -> None:
        row = planned("qwen3-next-80b-a3b", "fp", 8, gpu="b200", weights="163GB")
        assert row.fits and row.decode_tokens_per_second_estimate is None


def test_a_stage_without_a_cache_divides_nothing(tmp_path: Path) -> None:
    fields = {"model_type": "nemotron_h", "hidden_size": 64, "num_attention_heads": 4}
    folder = write_config(tmp_path, hybrid_override_pattern="*---", **fields)
    heavy = {"backbone.layers.3.w": torch.zeros(1 << 20, dtype=torch.float16)}
    save_file(heavy, folder / "model.safetensors")
    row, whole = (planned(str(folder), "fp", 256, pp=pp) for pp in (2, 1))
    assert (row.stage, row.cache_bytes) == (1, 0)
    assert (row.effective_bits, row.compression) == (whole.effective_bits, whole.compression)


def test_what_never_grows_has_no_largest_context(tmp_path: Path) -> None:
    fields = {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 64}
    folder = str(write_config(tmp_path, **fields))
    options = {"memory": 80 * GIB, "weights": "1GB", "prefill_chunk": 64}
    row = planned(folder, "int4-postrope", 8, **options)
    assert row.fits and row.largest_context is None
