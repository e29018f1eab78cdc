"""Models that kvqtool does not serve: each refused in one line that says why, and exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

from kvqtool.cli import app
from kvqtool.models import builtin_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 8192  # of the built-in model, whose tokenizer the folders get
Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Return what the tool says when it refuses a model."""
    (tmp_path / "document.txt").write_text("A list is a mutable sequence.")

    def ask(model: object, *options: object, edit: Callable[[Path], None] | None = None) -> str:
        folder = tmp_path / "model"
        model.save_pretrained(folder)  # type: ignore[attr-defined]
        for path in builtin_folder().iterdir():
            if "tokenizer" in path.name:
                shutil.copy(path, folder)
        if edit is not None:
            edit(folder)
        capfd.readouterr()
        output = tmp_path / "cache"
        text = ("--text", tmp_path / "document.txt", "-o", output, "-q")
        given = ("quantize-cache", folder, *(options or ("--spec", "int4-g8")), *text)
        done = CliRunner().invoke(app, [str(part) for part in given])
        assert done.exit_code == 2, done.stderr
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1, done.stderr
        assert not output.exists()
        said = capfd.readouterr()
        assert (said.out, said.err) == ("", "")  # nor does a library talk past the tool
        return done.stderr

    return ask


def llama(**config: Any) -> "PreTrainedModel":
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | config)))


def test_an_encoder_decoder(refusal: Refusal) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))
    assert "is an encoder-decoder (t5)" in refusal(model)


def test_a_model_that_is_not_causal(refusal: Refusal) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # of a few seeds, the one that moves earlier states least
        model = BertForMaskedLM(config)
    assert "is not causal" in refusal(model)


def test_a_model_without_a_cache(refusal: Refusal) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert "keeps no key-value cache" in refusal(MambaForCausalLM(config))


def test_remote_code_that_is_not_trusted(refusal: Refusal) -> None:
    def edit(folder: Path) -> None:
        said = json.loads((folder / "config.json").read_text())
        said |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
        said["auto_map"]["AutoModelForCausalLM"] = "theirs.Model"
        (folder / "config.json").write_text(json.dumps(said))
        (folder / "theirs.py").write_text("raise SystemExit('their code ran')\n")

    assert "--trust-remote-code" in refusal(llama(), edit=edit)


def test_a_bundle_for_another_number_of_heads(refusal: Refusal, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from kvqtool.bundle import save_bundle, uncalibrated_bundle
    from kvqtool.identity import identify
    from kvqtool.spec import parse_spec

    tokenizer = AutoTokenizer.from_pretrained(builtin_folder())
    identity = identify(llama(num_key_value_heads=2), tokenizer, name="theirs").as_json()
    bundle = tmp_path / "bundle.safetensors"
    save_bundle(uncalibrated_bundle(parse_spec("int4-g8"), identity, [0]), bundle)
    said = refusal(llama(num_key_value_heads=4), "--bundle", bundle)
    assert "'num_kv_heads': 2" in said
    assert "'num_kv_heads': 4" in said
    assert "calibrate a bundle for it" in said
