"""Planned peaks are those of the tensors alive while a model runs, traced on a CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT, TinyLlama
from families import FAMILIES, IS_OLD
from torches import needs_grouped_sdpa

from kvqtool.architectures import cache_layers
from kvqtool.attach import attach
from kvqtool.config import parse_config
from kvqtool.forward import hidden_states, next_logits
from kvqtool.layers import CacheLayer, CacheModel
from kvqtool.live import watch
from kvqtool.load import Load, Workload
from kvqtool.measure import Comparison, run_forward
from kvqtool.memory import LayerGeometry
from kvqtool.parameters import estimated_weights
from kvqtool.peaks import WORKSPACE_BYTES, Forward, codebook_bytes
from kvqtool.probe import probe
from kvqtool.scratch import Step, append_scratch, read_scratch
from kvqtool.shape import ModelShape, known_models
from kvqtool.spec import parse_spec
from kvqtool.synthetic import synthetic_bundle
from kvqtool.trunk import read_trunk

# What the formulas leave out, such as masks of a few hundred tokens, weighs most in small models;
# on a GPU, benchmarks/results/plan-llama-h100.json, the largest error is 0.7 %.
TOLERANCE = 0.025
LOOSE = 0.12  # activations are those of Llama, and a model of a megabyte has little else
EXCESS = 0.2  # codes of 8 bits are planned, and a small model is half cache
CPU = torch.device("cpu")
SIZES = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 704}


@needs_grouped_sdpa
@pytest.mark.parametrize(
    ("spec", "batch", "chunk"),
    [
        ("fp", 1, 256),
        ("nuq4-1%-sink1", 2, 256),
        ("int3-g32", 2, None),
        ("nuq2-1%-cap4-postrope", 1, 200),
        ("int8-pertoken", 2, 128),
        ("nf4-1%-vrot", 1, 256),
        ("int4-g32-sink2-r100", 1, 128),
    ],
)
def test_peaks_of_a_run_are_planned(
    tiny_llama: TinyLlama, spec: str, batch: int, chunk: int | None
) -> None:
    found = ran(tiny_llama, spec, batch, chunk)
    assert found["weights"].error == 0
    assert found["packed cache, outliers as found"].error == 0
    for call in ("prefill peak", "decode peak"):
        assert abs(found[call].error) < TOLERANCE, found[call]


@needs_grouped_sdpa
@pytest.mark.parametrize(
    ("spec", "chunk"),
    [("qaq-1%", None), ("qaq-1%", 256), ("qaq-head-released", 200), ("qaq-nuq-1%-sink1", 256)],
)
def test_peaks_of_bits_by_token_are_bounded(
    tiny_llama: TinyLlama, spec: str, chunk: int | None
) -> None:
    found = ran(tiny_llama, spec, 1, chunk)
    assert found["packed cache, outliers as found"].error == 0
    for call in ("prefill peak", "decode peak"):
        assert -TOLERANCE < found[call].error < EXCESS, found[call]


def ran(tiny_llama: TinyLlama, spec: str, batch: int, chunk: int | None) -> dict[str, Comparison]:
    """Run 700 tokens through a cache and set what was planned beside what was measured."""
    model = tiny_llama(head_dim=64, **SIZES).to(torch.bfloat16)
    seam = probe(model)
    config = parse_config(model.config.to_dict(), "m")
    layers = cache_layers(config)
    weights = estimated_weights(config, len(layers))
    shape = ModelShape(config, layers, read_trunk(config), weights)
    work = Workload(700, batch, dtype="bfloat16", prefill_chunk=chunk)
    load = Load(shape, parse_spec(spec), work)
    bundle = synthetic_bundle(load.spec, {x.index: x.geometry for x in seam.packed})
    return {row.name: row for row in run_forward(load, 700, (model, seam), bundle)}


@needs_grouped_sdpa
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gemma2", "gpt_oss", "phi3", "gpt_neox"])
@pytest.mark.parametrize("chunk", [None, 256])
def test_peaks_of_other_decoders_are_close(family: str, chunk: int | None) -> None:
    if family == "gemma2" and IS_OLD:
        pytest.skip("transformers before 5.23 gives gemma2 sdpa, which leaves out its cap")
    config_class, options = FAMILIES[family]
    longer = {"layer_types": None, "sliding_window": 200} if "sliding_window" in options else {}
    built = getattr(transformers, config_class)(**options | longer | {"num_hidden_layers": 4})
    model = transformers.AutoModelForCausalLM.from_config(built).to(torch.bfloat16).eval()
    config = parse_config(built.to_dict(), family)
    layers = cache_layers(config)
    weights = estimated_weights(config, len(layers))
    shape = ModelShape(config, layers, read_trunk(config), weights)
    load = Load(shape, parse_spec("int4-g16"), Workload(700, dtype="bfloat16", prefill_chunk=chunk))
    seam = probe(model)
    bundle = synthetic_bundle(load.spec, {x.index: x.geometry for x in seam.packed})
    found = {row.name: row for row in run_forward(load, 700, (model, seam), bundle)}
    assert found["packed cache, outliers as found"].error == 0
    assert abs(found["decode peak"].error) < TOLERANCE
    assert abs(found["prefill peak"].error) < LOOSE


@pytest.mark.parametrize("spec", ["int4-g16", "nuq3-1%", "nuq4-1%-pc", "nuq3-1%-comp", "fp"])
def test_codebooks_are_what_a_store_holds(spec: str) -> None:
    geometry = LayerGeometry(2, 16, 16)
    bundle = synthetic_bundle(parse_spec(spec), {0: geometry})
    held = 0
    for book in bundle.codebooks_of(0):
        parts = vars(book).values()
        held += sum(part.nbytes for part in parts if part is not None)
    assert codebook_bytes(parse_spec(spec), (CacheLayer("full", geometry),)) == held


@pytest.mark.parametrize("spec", ["nuq4-1%-sink1", "int4-g32", "kivi2-g32-r32"])
def test_peaks_of_a_prompt_that_is_encoded_in_parts_are_planned(
    tiny_llama: TinyLlama, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvqtool.scratch.ROWS_AT_ONCE", 200)
    model = tiny_llama(head_dim=64, **SIZES).to(torch.bfloat16)
    seam = probe(model)
    config = parse_config(model.config.to_dict(), "m")
    layers = cache_layers(config)
    shape = ModelShape(config, layers, read_trunk(config), estimated_weights(config, len(layers)))
    load = Load(shape, parse_spec(spec), Workload(700, dtype="bfloat16"))
    bundle = synthetic_bundle(load.spec, {x.index: x.geometry for x in seam.packed})
    found = {row.name: row for row in run_forward(load, 700, (model, seam), bundle)}
    assert abs(found["prefill peak"].error) < TOLERANCE, found["prefill peak"]


def step(spec: str, tokens: int, fresh: int, **options: object) -> tuple[CacheLayer, Step]:
    layer = CacheLayer("full", LayerGeometry(2, 16, 16))
    cached = CacheModel((layer,), parse_spec(spec), 1, "bfloat16")
    made = Step(cached, tokens, fresh, is_joined=False, num_heads=4)
    return layer, replace(made, **options)  # type: ignore[arg-type]  # fields of a step


def test_reading_takes_twenty_bytes_a_key_number() -> None:
    layer, made = step("int4-pertoken-postrope", 1000, 1)
    assert read_scratch(layer, made) == pytest.approx(20 * 1000 * 32, rel=0.02)
    assert read_scratch(*step("int4-pertoken-postrope", 1000, 1, is_joined=True)) > 20 * 1000 * 32


def test_packing_takes_thirty_three_bytes_a_key_number() -> None:
    layer, made = step("int4-pertoken", 1000, 1000)
    assert append_scratch(layer, made) == pytest.approx(33 * 1000 * 32, rel=0.13)


def test_longer_chunks_and_prompts_never_peak_lower() -> None:
    config = parse_config({"model_type": "llama", "hidden_size": 4096}, "m")
    cached = CacheModel(cache_layers(config), parse_spec("nuq3-1%"), 2, "bfloat16")
    peaks = [
        Forward(cached, read_trunk(config), 10**9, chunk).prefill(8192).nbytes
        for chunk in (256, 512, 1024, 4096, None)
    ]
    assert peaks == sorted(peaks)
    whole = Forward(cached, read_trunk(config), 10**9, 512)
    assert whole.prefill(8192).nbytes < whole.prefill(16384).nbytes
    assert whole.decode(8192, 8193).nbytes < whole.prefill(8192).nbytes


@pytest.mark.parametrize("spec", ["int4-g16-postrope", "int4-g16-postrope-sink1"])
def test_a_body_grows_by_pages_whichever_layer_comes_first(spec: str) -> None:
    """A layer that slides drops as many pages as it gains; one beside it may still hold two."""
    geometry = LayerGeometry(2, 16, 16)
    layers = CacheLayer("sliding", geometry, window=64), CacheLayer("full", geometry)
    trunk = read_trunk(parse_config({"model_type": "llama"}, "m"))
    scratches = [
        Forward(CacheModel(order, parse_spec(spec), 1, "bfloat16"), trunk, 0).decode(1000, 1500)
        for order in (layers, layers[::-1])
    ]
    assert scratches[0] == scratches[1]


@needs_grouped_sdpa
@pytest.mark.parametrize("chunk", [None, 256])
def test_peaks_after_many_new_tokens_of_a_sliding_model_are_planned(chunk: int | None) -> None:
    config_class, options = FAMILIES["gemma3"]
    longer = {"layer_types": None, "sliding_window": 100, "num_hidden_layers": 6}
    longer |= {"vocab_size": 64, "intermediate_size": 32}
    built = getattr(transformers, config_class)(**options | longer)
    model = transformers.AutoModelForCausalLM.from_config(built).to(torch.bfloat16).eval()
    config = parse_config(built.to_dict(), "gemma3")
    layers, spec = cache_layers(config), parse_spec("int4-g16")
    assert layers[0].window == 100 and layers[-1].window is None
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    seam = probe(model)
    bundle = synthetic_bundle(spec, {x.index: x.geometry for x in seam.packed})
    ids = torch.randint(64, (1, 901), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attach(model, bundle, seam=seam) as session:
        held = session.new_cache(bundle)
        for start in range(0, 700, chunk or 700):
            part = {"input_ids": ids[:, start : min(start + (chunk or 700), 700)]}
            hidden_states(model, part, held)
        for at in range(700, 900):
            next_logits(model, ids[:, at : at + 1], held)
        before = held.nbytes
        with watch(CPU) as live:
            next_logits(model, ids[:, -1:], held)
    cached = CacheModel(layers, spec, 1, "bfloat16")
    planned = Forward(cached, read_trunk(config), weights, chunk).decode(700, 901)
    assert planned.nbytes == pytest.approx(weights + before + live.peak_bytes, rel=TOLERANCE)


def test_the_tracer_sees_what_is_alive_and_forgets_the_rest() -> None:
    with watch(CPU) as live:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.ones(500, dtype=torch.float64)
        view = kept[:10]
        del view
    assert live.peak_bytes == 4000 + 4000


def test_latents_are_expanded_for_all_heads() -> None:
    """DeepSeek V3: 128 heads, keys of 128 + 64, values of 128 projected beside the 128."""
    config = parse_config({"model_type": "deepseek_v3"}, "m")
    cached = CacheModel(cache_layers(config), parse_spec("fp"), 1, "bfloat16")
    scratch = Forward(cached, read_trunk(config), 0).decode(4095, 4096).scratch
    assert scratch >= 4096 * 128 * (128 + 128 + 192) * 2


def test_the_benchmark_writes_what_its_record_holds(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    script = ROOT / "benchmarks" / "bench_plan.py"
    options = ("--device", "cpu", "--tiny", "--point", "2", "--output", path)
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    assert written.keys() == RECORD.keys()
    (row,), recorded = written["rows"], RECORD["rows"][2]
    assert row.keys() == recorded.keys()
    for part in ("point", "measured", "predicted"):
        assert row[part].keys() == recorded[part].keys()


RECORD = json.loads((ROOT / "benchmarks" / "results" / "plan-llama-h100.json").read_text())


@pytest.mark.parametrize("row", RECORD["rows"], ids=lambda row: row["point"]["spec"])
def test_what_was_measured_on_a_gpu_is_still_planned(row: dict[str, Any]) -> None:
    """The planner of today against the bytes an H100 allocated."""
    point = row["point"]
    if parse_spec(point["spec"]).has_window:
        pytest.skip("attention with a recent window takes less than when this was measured")
    known = known_models()[point["shape"]]["config"]
    fields = known | {"model_type": "llama", "num_hidden_layers": point["layers"]}
    config = parse_config(fields, point["shape"])
    layers = cache_layers(config)
    cached = CacheModel(layers, parse_spec(point["spec"]), point["batch"], point["dtype"])
    weights = estimated_weights(config, len(layers)).nbytes(point["dtype"])
    forward = Forward(cached, read_trunk(config), weights, point["chunk"])
    peaks = (
        forward.prefill(point["context"]),
        forward.decode(point["context"], point["context"] + 1),
    )
    planned = max(peak.nbytes for peak in peaks) + WORKSPACE_BYTES
    # Packing lets go of states sooner than it did then: up to 1.5 % less where it is highest.
    assert 0.985 < planned / row["total_bytes"] < 1.01
    assert weights == row["measured"]["weights"]
