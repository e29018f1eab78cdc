"""--device-map auto: one place for every layer on a CPU; refused where it cannot work."""

from collections.abc import Callable

import pytest
import torch
from typer.testing import Result

from kvqtool import spread
from kvqtool.bundle import uncalibrated_bundle
from kvqtool.errors import InputError
from kvqtool.generation import generate
from kvqtool.models import LoadedModel, load_model
from kvqtool.sampling import Sampling
from kvqtool.spec import parse_spec


@pytest.mark.skipif(torch.cuda.is_available(), reason="says where a model goes without a GPU")
def test_on_a_cpu_it_changes_nothing(builtin: LoadedModel) -> None:
    placed = load_model("builtin", device_map="auto")
    assert placed.device == torch.device("cpu")
    assert placed.dtype == torch.float32
    assert placed.identity == builtin.identity
    sampling, texts = Sampling(max_new_tokens=4), []
    for loaded in (builtin, placed):
        packed = [layer.index for layer in loaded.seam.packed]
        plain = uncalibrated_bundle(parse_spec("int4-g64"), loaded.identity.as_json(), packed)
        texts.append(generate(loaded, plain, "The list type", sampling).text)
    assert texts[0] == texts[1] != ""


def test_a_device_beside_it_is_refused() -> None:
    with pytest.raises(InputError, match="drop 'cpu' or the map"):
        load_model("builtin", device="cpu", device_map="auto")


def test_another_map_is_refused() -> None:
    with pytest.raises(InputError, match="device map 'balanced' is unknown; use auto"):
        load_model("builtin", device_map="balanced")


def test_without_accelerate_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'kvqtool\[sharded\]'"):
        load_model("builtin", device_map="auto")


def test_layers_beside_the_gpus_are_refused(
    builtin: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"model.layers.0": 0, "model.layers.1": "cpu"}
    monkeypatch.setattr(builtin.model, "hf_device_map", places, raising=False)
    with pytest.raises(InputError, match="does not fit the GPUs"):
        spread.input_device(builtin.model, torch.device("cuda"))


def test_gpus_whose_copies_arrive_changed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")

    def passed_on(sent: torch.Tensor, source: torch.device, _: torch.device) -> torch.Tensor:
        return sent if source == first else torch.zeros_like(sent)

    monkeypatch.setattr(spread, "_passed_on", passed_on)
    spread.check_copies({first})
    with pytest.raises(InputError, match="copies from cuda:1 to cuda:0 arrive changed"):
        spread.check_copies({second, first})


@pytest.mark.parametrize("command", ["calibrate", "ppl", "quantize-cache", "generate"])
def test_commands_take_it(run: Callable[..., Result], command: str) -> None:
    done = run(command, "builtin", "--device-map", "nowhere")
    assert done.exit_code == 2
    assert "'--device-map'" in done.stderr
    assert "'nowhere' is not one of 'auto'" in done.stderr
