"""The cache read by the fused kernel on a GPU: the codes and the tokens of the torch path there."""

from __future__ import annotations

import pytest
import torch
from fused_case import assert_same, greedy, same_choices, text_ids

from kvqtool.calibrate import calibrate
from kvqtool.data import calibration_windows, load_text
from kvqtool.models import LoadedModel, load_model
from kvqtool.spec import parse_spec
from kvqtool.usage import kernel_of

pytestmark = pytest.mark.gpu
SPECS = ("nuq3-1%-sink1", "kvq3", "nuq4-1%-pc/nuq8-1%", "nuq3-1%/nuq3-1%-vrot", "nuq2-1%-r40-sink2")


@pytest.fixture(scope="module", params=("float16", "bfloat16"))
def on_gpu(request: pytest.FixtureRequest) -> LoadedModel:
    """Return the built-in model on the GPU."""
    return load_model("builtin", device="cuda", dtype=request.param)


@pytest.mark.parametrize("spec", SPECS)
def test_256_tokens_and_codes_are_those_of_the_torch_path(
    on_gpu: LoadedModel, builtin: LoadedModel, spec: str
) -> None:
    text = load_text(None, part="calibration")
    windows = calibration_windows(text, builtin.tokenizer, samples=2, seq_len=160, seed=0)
    (bundle,) = calibrate(builtin, windows, [parse_spec(spec)])
    ids = text_ids(on_gpu, 2, 250)
    expected = greedy(on_gpu, bundle, ids, "materialise", 256)
    found = greedy(on_gpu, bundle, ids, "fused", 256, expected.tokens)
    # bfloat16 rounds every state of the model 8 times as coarsely as the kernel its tables.
    coarse = on_gpu.dtype == torch.bfloat16
    assert same_choices(found, expected, first=0.2 if coarse else 0.05, rms=0.4) <= 25
    assert kernel_of(found.cache) == "cuda (fused)"
    first = {name: t for name, t in expected.canonical.items() if name.startswith("0.")}
    assert_same({name: found.canonical[name] for name in first}, first)


def test_several_tokens_are_read_by_the_dequantizing_kernel(
    on_gpu: LoadedModel, builtin: LoadedModel
) -> None:
    text = load_text(None, part="calibration")
    windows = calibration_windows(text, builtin.tokenizer, samples=2, seq_len=160, seed=0)
    (bundle,) = calibrate(builtin, windows, [parse_spec("nuq4-1%-sink1")])
    ids = text_ids(on_gpu, 1, 300)
    expected = greedy(on_gpu, bundle, ids, "materialise", 2, ids[:, :2])
    found = greedy(on_gpu, bundle, ids, "fused", 2, ids[:, :2])
    assert (found.logits - expected.logits).square().mean().sqrt() < 0.2
