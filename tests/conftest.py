"""Fixtures of all tests, and what a run says about itself."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports the hub's client, which reads it once: a test never waits for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from kvqtool.bundle import Bundle
from kvqtool.calibrate import calibrate
from kvqtool.data import calibration_windows, load_text
from kvqtool.models import LoadedModel, load_model
from kvqtool.spec import parse_spec

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).parents[1]
TinyLlama = Callable[..., "LlamaForCausalLM"]


def pytest_report_header() -> list[str]:
    """Name what decides the numbers of a run."""
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    has_gpu = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if has_gpu else "no GPU"
    return [
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        f"CUDA {torch.version.cuda or 'none'}, {gpu}, commit {commit.stdout.strip() or 'unknown'}",
    ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests without a GPU, or fail them where the run was asked for GPU tests."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("KVQTOOL_REQUIRE_GPU"):
        pytest.fail("KVQTOOL_REQUIRE_GPU is set and torch finds no GPU", pytrace=False)
    pytest.skip("torch finds no GPU")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Keep sums in one order and tests from competing for cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def builtin() -> LoadedModel:
    """Return the built-in model on the CPU in float32. Tests must leave it as it was."""
    return load_model("builtin", device="cpu")


@pytest.fixture(scope="session")
def tiny_llama() -> TinyLlama:
    """Return a maker of 2-layer Llamas with random weights, the same for the same arguments."""

    def make(
        *, gqa: bool = True, head_dim: int = 16, seed: int = 0, **config: object
    ) -> LlamaForCausalLM:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2 if gqa else 4,
            "head_dim": head_dim,
            "max_position_embeddings": 512,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(sizes | config))).eval()

    return make


@pytest.fixture(scope="session")
def calibrated(builtin: LoadedModel) -> Callable[[str], Bundle]:
    """Return a maker of bundles for the built-in model, calibrated on a little text and kept."""
    text = load_text(None, part="calibration")
    windows = calibration_windows(text, builtin.tokenizer, samples=2, seq_len=160, seed=0)

    @cache
    def make(spec: str) -> Bundle:
        return calibrate(builtin, windows, [parse_spec(spec)])[0]

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference texts and models beside a development checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; it lies beside development checkouts only")
    return folder
