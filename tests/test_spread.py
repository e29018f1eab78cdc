"""A model spread over two devices against the same model on one, on a CPU: see `two_devices`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvqtool.attach import attached
from kvqtool.bundle import Bundle
from kvqtool.cachefile import quantize_states, quantize_text
from kvqtool.calibrate import calibrate
from kvqtool.data import Text, Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.generation import Running, generate, resume
from kvqtool.models import LoadedModel, identify
from kvqtool.perplexity import evaluate
from kvqtool.ranges import RangeCollector
from kvqtool.sampling import Sampling
from kvqtool.spec import parse_spec
from tests.two_devices import FIRST, SECOND, spread, two_devices

Pair = tuple[LoadedModel, LoadedModel]
PROMPT = "The list type is a sequence of values. " * 4
SAMPLING = Sampling(max_new_tokens=3, temperature=1.0)
SPECS = ("nuq4-1%-sink1", "nuq3-1%-sink1-r8", "qaq-k0.03-v1-w4-token")


@pytest.fixture(scope="module")
def whole(builtin: LoadedModel, tiny_llama: Callable[..., Any]) -> LoadedModel:
    """Return a small model with the built-in one's tokenizer."""
    model = tiny_llama(vocab_size=8192, head_dim=64)
    identity = identify(model, builtin.tokenizer, name="tiny")
    return LoadedModel(identity, model, builtin.tokenizer, torch.device("cpu"), torch.float32)


@pytest.fixture
def pair(
    whole: LoadedModel, tiny_llama: Callable[..., Any], request: pytest.FixtureRequest
) -> Iterator[Pair]:
    """Return the model on one device and over two, read as a test's `read_path` says."""
    path = getattr(request, "param", "materialise")
    model = spread(tiny_llama(vocab_size=8192, head_dim=64))
    parts = (whole.model, whole.device), (model, FIRST)
    with two_devices():
        one, two = (
            LoadedModel(whole.identity, m, whole.tokenizer, device, torch.float32, read_path=path)
            for m, device in parts
        )
        assert [str(next(layer.parameters()).device) for layer in model.model.layers] == [
            str(FIRST),
            str(SECOND),
        ]
        yield one, two


@pytest.fixture(scope="module")
def bundles(whole: LoadedModel) -> dict[str, Bundle]:
    text = load_text(None, part="calibration")
    windows = calibration_windows(text, whole.tokenizer, samples=2, seq_len=96, seed=0)
    made = calibrate(whole, windows, [parse_spec(spec) for spec in SPECS])
    return dict(zip(SPECS, made, strict=True))


@pytest.fixture(scope="module")
def windows(builtin: LoadedModel) -> Windows:
    text = load_text(None, part="evaluation")
    return evaluation_windows(text, builtin.tokenizer, seq_len=40, windows=2, stride=None)


both_paths = pytest.mark.parametrize("pair", ("materialise", "fused"), indirect=True)


@both_paths
def test_the_same_tokens_follow(pair: Pair, bundles: dict[str, Bundle]) -> None:
    found = [generate(each, bundles["nuq4-1%-sink1"], PROMPT, SAMPLING) for each in pair]
    assert found[0].token_ids == found[1].token_ids
    if pair[0].read_path == "materialise":  # kernels have their tables on each device
        assert found[0].cache_bytes == found[1].cache_bytes
    assert found[0].kernel == found[1].kernel


@pytest.mark.parametrize(
    ("pair", "spec"),
    [("materialise", SPECS[0]), ("fused", SPECS[0]), ("materialise", SPECS[1])],
    indirect=["pair"],
)
def test_a_prompt_in_parts(pair: Pair, bundles: dict[str, Bundle], spec: str) -> None:
    running = Running(prefill_chunk=64)
    found = [generate(each, bundles[spec], PROMPT, SAMPLING, running=running) for each in pair]
    assert found[0].token_ids == found[1].token_ids


def test_bits_that_layers_share(pair: Pair, bundles: dict[str, Bundle]) -> None:
    found = [generate(each, bundles[SPECS[2]], PROMPT, SAMPLING) for each in pair]
    assert found[0].token_ids == found[1].token_ids


@pytest.mark.parametrize("protocol", ("decode-exact", "prefill-exact"))
@pytest.mark.parametrize("spec", SPECS[:2])
def test_the_same_perplexity(
    pair: Pair, bundles: dict[str, Bundle], windows: Windows, spec: str, protocol: str
) -> None:
    one, two = (evaluate(e, windows, [bundles[spec]], protocol=protocol)[0] for e in pair)
    assert two.ppl == pytest.approx(one.ppl, rel=1e-4)
    assert two.ppl_baseline == pytest.approx(one.ppl_baseline, rel=1e-4)
    assert two.kld_mean == pytest.approx(one.kld_mean, rel=1e-2)


@both_paths
def test_saved_caches_go_from_one_to_the_other(
    pair: Pair, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    text, found = Text(PROMPT, "prompt", "0" * 64), []
    for name, each in zip("ab", pair, strict=True):
        quantize_text(each, bundles["nuq4-1%-sink1"], text, tmp_path / name)
    for name in "ab":
        for each in pair:
            for after in ("", " And") if each.read_path == "materialise" else ("",):
                done = resume(each, tmp_path / name, after, SAMPLING)
                found.append((after, tuple(done.token_ids)))
    assert len(found) > len(set(found)) == len({after for after, _ in found})


def test_states_from_a_file(pair: Pair, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shape, generator = (1, 2, 40, 64), torch.Generator().manual_seed(0)
    names = [f"layers.{layer}.{side}" for layer in (0, 1) for side in ("key", "value")]
    save_file({n: torch.randn(shape, generator=generator) for n in names}, tmp_path / "states")
    found = []
    for number, each in enumerate(pair):
        path = tmp_path / str(number)
        quantize_states(each, bundles["nuq4-1%-sink1"], tmp_path / "states", path)
        found.append(resume(each, path, " And", SAMPLING).token_ids)
    assert found[0] == found[1]


def test_beams_of_padded_sequences(pair: Pair, bundles: dict[str, Bundle]) -> None:
    texts = [pair[0].tokenizer(text)["input_ids"] for text in ("The list type is", "A list")]
    room = max(map(len, texts))
    ids = torch.tensor([[0] * (room - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (room - len(text)) + [1] * len(text) for text in texts])
    found = []
    for each in pair:
        with attached(each) as session:
            tokens = each.model.generate(
                input_ids=ids.to(each.device),
                attention_mask=mask.to(each.device),
                past_key_values=session.new_cache(bundles["nuq4-1%-sink1"]),
                num_beams=2,
                max_new_tokens=3,
                do_sample=False,
            )
        found.append(tokens.tolist())
    assert found[0] == found[1]


def test_statistics_lie_with_their_layers(pair: Pair) -> None:
    from kvqtool.capture import capture

    ids = torch.arange(30) * 7
    spec = parse_spec("nuq4-1%-sink1-nofisher")
    found = []
    for each in pair:
        ranges = RangeCollector([spec])
        with capture(each.model, each.seam, ranges, gradients=False) as run:
            run.run(ids)
        found.append(ranges)
    for index, device in enumerate((FIRST, SECOND)):
        one, two = (each.ranges(spec, index) for each in found)
        assert two.lower is not None and one.lower is not None
        assert two.lower.device == device
        assert torch.allclose(two.lower.cpu(), one.lower, rtol=1e-2, atol=1e-3)


def test_devices_are_not_mixed() -> None:
    with two_devices():
        one, two = (torch.ones(3, device=device) for device in (FIRST, SECOND))
        with pytest.raises(RuntimeError, match="on the same device"):
            one + two
        assert (one + two.to(FIRST)).tolist() == [2, 2, 2]
