"""Loading: the right device and dtype, quietly, or one line that says why not."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvqtool import models
from kvqtool.errors import InputError
from kvqtool.memory import LayerGeometry
from kvqtool.models import LoadedModel, builtin_folder, load_model, resolve_device


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the built-in model's folder that a test may damage."""
    return Path(shutil.copytree(builtin_folder(), tmp_path / "copy"))


class TestBuiltin:
    def test_it_is_what_its_config_says(self, builtin: LoadedModel) -> None:
        identity = builtin.identity
        assert identity.name == "builtin"
        assert identity.architecture == "LlamaForCausalLM"
        assert identity.layers == (LayerGeometry(2, 64, 64),) * 4
        assert identity.num_layers == 4
        assert identity.vocab_size == 8192
        assert identity.max_context == 4096

    def test_a_cpu_runs_it_in_float32_and_eval_mode(self, builtin: LoadedModel) -> None:
        assert builtin.device == torch.device("cpu")
        assert builtin.dtype == builtin.model.dtype == torch.float32
        assert not builtin.model.training

    def test_it_has_learned_english(self, builtin: LoadedModel) -> None:
        ids = torch.tensor([builtin.tokenizer("It was the best of")["input_ids"]])
        with torch.inference_mode():
            logits = builtin.model(ids).logits
        assert torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) < 5  # log 8192 is 9

    def test_the_folder_holds_what_loading_needs(self) -> None:
        names = {path.name for path in builtin_folder().iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names


class TestFolders:
    def test_a_folder_is_called_by_its_own_name(self, folder: Path, builtin: LoadedModel) -> None:
        loaded = load_model(f"{folder}/", device="cpu", dtype="bfloat16")
        assert loaded.identity.name == "copy"
        assert loaded.dtype == torch.bfloat16
        assert loaded.identity.rope_sha256 == builtin.identity.rope_sha256
        assert loaded.identity.tokenizer_sha256 == builtin.identity.tokenizer_sha256

    def test_loading_says_nothing(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        load_model(str(folder), device="cpu")
        assert capfd.readouterr() == ("", "")

    def test_transformers_keeps_its_settings(self, folder: Path) -> None:
        from transformers.utils import logging

        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(InputError):
            load_model(str(folder), device="cpu")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before

    def test_threads_that_load_at_once_get_whole_models(
        self, folder: Path, tmp_path: Path, tiny_llama: Callable[..., Any]
    ) -> None:
        # Tied weights beside weights that are not: transformers turns tying off for all threads.
        other = Path(shutil.copytree(folder, tmp_path / "other"))
        tiny_llama(vocab_size=8192, tie_word_embeddings=False).save_pretrained(other)
        with ThreadPoolExecutor(2) as pool:
            loaded = list(pool.map(partial(load_model, device="cpu"), map(str, [folder, other])))
        assert not any(part.is_meta for each in loaded for part in each.model.parameters())
        tied = loaded[0].model
        assert tied.lm_head.weight is tied.get_input_embeddings().weight


class TestBadModels:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("./nothing", r"'\./nothing' does not exist; check the path, or use builtin"),
            ("/nowhere/model", r"'/nowhere/model' does not exist"),
            ("a/b/c", r"'a/b/c' does not exist"),
            ("", r"the model has no name; use builtin"),
            ("nobody/nothing", r"'nobody/nothing' cannot be loaded: .*; check the spelling"),
            (__file__, r"is a file; name the folder that holds config\.json"),
        ],
    )
    def test_what_is_not_there(self, name: str, message: str) -> None:
        with pytest.raises(InputError, match=message) as info:
            load_model(name, device="cpu")
        assert "\n" not in str(info.value)

    def test_folder_without_config(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"has no config\.json; name what save_pretrained"):
            load_model(str(tmp_path), device="cpu")

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("config.json", b"{"),
            ("config.json", b'{"model_type": "no-such-model"}'),
            ("model.safetensors", b""),
            ("model.safetensors", b"\xff" * 64),
        ],
    )
    def test_damaged_file(self, folder: Path, file: str, content: bytes) -> None:
        (folder / file).write_bytes(content)
        with pytest.raises(
            InputError, match=r"cannot be loaded: .+; check that the folder"
        ) as info:
            load_model(str(folder), device="cpu")
        assert "\n" not in str(info.value)

    @pytest.mark.parametrize("names", [("tokenizer.json",), ("model.safetensors",)])
    def test_missing_file(self, folder: Path, names: tuple[str, ...]) -> None:
        for name in names:
            (folder / name).unlink()
        with pytest.raises(InputError, match=r"cannot be loaded: .+; check that the folder"):
            load_model(str(folder), device="cpu")

    def test_truncated_weights(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        with pytest.raises(InputError, match=r"cannot be loaded: .+; check that the folder"):
            load_model(str(folder), device="cpu")

    def test_absent_weights_are_never_made_up(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        tensors = load_file(weights)
        del tensors["model.layers.2.mlp.up_proj.weight"]
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(
            InputError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight, 1 missing"
        ):
            load_model(str(folder), device="cpu")

    def test_weights_of_another_shape(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
        with pytest.raises(InputError, match=r"cannot be loaded: .+; check that the folder"):
            load_model(str(folder), device="cpu")

    def test_unknown_dtype(self) -> None:
        message = r"dtype 'int8' is unknown; use auto, float16, bfloat16, float32"
        with pytest.raises(InputError, match=message):
            load_model("builtin", device="cpu", dtype="int8")


class TestDevices:
    @pytest.fixture
    def gpus(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
        count: int = request.param
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return count

    @pytest.mark.parametrize(
        ("gpus", "device", "expected"),
        [(0, "auto", "cpu"), (2, "auto", "cuda"), (2, "cpu", "cpu"), (2, "cuda:1", "cuda:1")],
        indirect=["gpus"],
    )
    def test_choice(self, gpus: int, device: str, expected: str) -> None:
        assert resolve_device(device) == torch.device(expected)

    @pytest.mark.parametrize(
        ("gpus", "device", "message"),
        [
            (0, "cuda", r"'cuda': torch finds no CUDA GPU here; use --device cpu"),
            (0, "cuda:0", r"'cuda:0': torch finds no CUDA GPU"),
            (2, "cuda:2", r"'cuda:2': GPUs here end at cuda:1"),
            (2, "gpu", r"'gpu' is unknown; use auto, cpu, cuda or cuda:N"),
            (2, "cuda:", r"'cuda:' is unknown"),
            (2, "cuda:x", r"'cuda:x' is unknown"),
            (2, "cpu:0", r"'cpu:0' is unknown"),
            (2, "", r"'' is unknown"),
        ],
        indirect=["gpus"],
    )
    def test_refusal(self, gpus: int, device: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            resolve_device(device)

    @pytest.mark.parametrize("gpus", [1], indirect=True)
    def test_auto_dtype_on_a_gpu_is_the_checkpoints(self, gpus: int) -> None:
        assert models._loading_dtype("auto", torch.device("cuda")) == "auto"

    @pytest.mark.gpu
    def test_a_gpu_runs_the_checkpoints_dtype(self, builtin: LoadedModel) -> None:
        loaded = load_model("builtin", device="cuda")
        assert loaded.dtype == torch.bfloat16
        assert next(loaded.model.parameters()).device.type == "cuda"
        assert loaded.identity == builtin.identity
