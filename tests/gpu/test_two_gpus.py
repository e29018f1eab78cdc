"""A GPU that is not torch's current one, and a model spread over two."""

from __future__ import annotations

import pytest
import torch
from deep_model import write_deep

from kvqtool.bundle import Bundle
from kvqtool.calibrate import calibrate
from kvqtool.data import Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.errors import InputError
from kvqtool.generation import Running, generate
from kvqtool.models import LoadedModel, load_model
from kvqtool.perplexity import evaluate
from kvqtool.sampling import Sampling
from kvqtool.spec import parse_spec
from kvqtool.spread import check_copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SPEC = "nuq4-1%-sink1"
PROMPT = "A list is a sequence of values. " * 40
SAMPLING = Sampling(max_new_tokens=40)


@pytest.fixture(scope="module")
def bundle(builtin: LoadedModel) -> Bundle:
    return calibrate(builtin, calibration(builtin), [parse_spec(SPEC)])[0]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a random model that `auto` spreads."""
    return str(write_deep(tmp_path_factory.mktemp("deep") / "model"))


def calibration(loaded: LoadedModel) -> Windows:
    text = load_text(None, part="calibration")
    return calibration_windows(text, loaded.tokenizer, samples=2, seq_len=160, seed=0)


def load_spread(folder: str, dtype: str) -> LoadedModel:
    """Load a model over both GPUs, or skip where they cannot pass tensors on."""
    try:
        check_copies({torch.device("cuda:0"), torch.device("cuda:1")})
    except InputError as error:
        pytest.skip(str(error))
    loaded = load_model(folder, dtype=dtype, device_map="auto")
    assert len({part.device for part in loaded.model.parameters()}) == 2
    return loaded


def both(folder: str, dtype: str) -> tuple[LoadedModel, LoadedModel]:
    """Return a model over both GPUs and on one."""
    return load_spread(folder, dtype), load_model(folder, device="cuda:0", dtype=dtype)


@pytest.mark.parametrize("decode", ("eager", "graph"))
def test_the_second_gpu_gives_the_tokens_of_the_first(bundle: Bundle, decode: str) -> None:
    assert torch.cuda.current_device() == 0
    found = []
    for device in ("cuda:0", "cuda:1"):
        loaded = load_model("builtin", device=device, dtype="float16")
        running = Running(decode=decode)
        found.append(generate(loaded, bundle, PROMPT, SAMPLING, running=running))
        assert found[-1].kernel == "cuda (fused)"
    assert found[0].token_ids == found[1].token_ids
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("chunk", (None, 100))
def test_a_spread_model_gives_the_tokens_of_a_whole_one(deep: str, chunk: int | None) -> None:
    found = []
    for loaded in both(deep, "float16"):
        bundle = calibrate(loaded, calibration(loaded), [parse_spec(SPEC)])[0]
        running = Running(prefill_chunk=chunk, decode="eager")
        found.append(generate(loaded, bundle, PROMPT, SAMPLING, running=running))
        # Later parts of a prompt are decoded by another kernel.
        assert found[-1].kernel == ("cuda (fused), cuda (dequantize)" if chunk else "cuda (fused)")
    assert found[0].token_ids == found[1].token_ids


def test_a_spread_model_has_the_bundle_and_the_perplexity_of_a_whole_one(deep: str) -> None:
    text, found, bundles = load_text(None, part="evaluation"), [], []
    for loaded in both(deep, "float32"):
        windows = evaluation_windows(text, loaded.tokenizer, seq_len=256, windows=4, stride=None)
        bundles.append(calibrate(loaded, calibration(loaded), [parse_spec(SPEC)])[0])
        found.append(evaluate(loaded, windows, [bundles[0]])[0])
    assert found[0].ppl == pytest.approx(found[1].ppl, rel=1e-4)
    assert found[0].ppl_baseline == pytest.approx(found[1].ppl_baseline, rel=1e-4)
    one, other = (bundle.tensors() for bundle in bundles)
    for name, tensor in one.items():
        assert torch.allclose(tensor.double(), other[name].double(), rtol=1e-2, atol=1e-3), name
