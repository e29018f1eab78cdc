"""`kvqtool doctor` says what runs here and what does not, and why."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from typer.testing import Result

from kvqtool.cuda import library_versions
from kvqtool.doctor import try_kernels

Run = Callable[..., Result]


def test_without_a_model_it_looks_at_the_machine(run: Run) -> None:
    done = run("doctor", "--device", "cpu", "--json")
    found = json.loads(done.stdout)
    assert (found["command"], found["model"], found["spec"]) == ("doctor", None, None)
    assert found["result"]["torch"] == torch.__version__
    assert not found["result"]["is_ready"]
    assert "not on cpu" in found["result"]["kernels"]


def test_cupy_beside_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = SimpleNamespace(
        nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
        runtime=SimpleNamespace(driverGetVersion=lambda: 13000),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(__version__="14.2.0", cuda=parts))
    found = library_versions(torch.device("cpu"))
    assert found == {"cupy": "14.2.0", "nvrtc": "13.0", "driver": "13.0", "shared_bytes": None}


@pytest.mark.parametrize(
    ("spec", "reason"), [("nuq3-1%", "on a GPU"), ("int4-g64", "range per token"), ("fp", "fp")]
)
def test_every_layer_has_its_reason(run: Run, spec: str, reason: str) -> None:
    done = run("doctor", "builtin", "--device", "cpu", "--spec", spec, "--json")
    layers = json.loads(done.stdout)["result"]["layers"]
    assert [row["layer"] for row in layers] == [0, 1, 2, 3]
    assert all(reason in row["read_reason"] and row["kernel"] is None for row in layers)


def test_a_scheme_without_a_model_is_refused(run: Run) -> None:
    done = run("doctor", "--spec", "nuq3-1%")
    assert done.exit_code == 2
    assert "name the model too" in done.stderr


@pytest.mark.gpu
def test_the_trial_attention_runs_here() -> None:
    assert try_kernels(torch.device("cuda")) is None
