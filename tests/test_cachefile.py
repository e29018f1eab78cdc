"""Saved caches: a document read once, continued as if it had just been read."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from kvqtool.attach import attach
from kvqtool.bundle import Bundle
from kvqtool.cachefile import (
    KIND,
    VERSION,
    load_cache,
    quantize_states,
    quantize_text,
    restore_cache,
)
from kvqtool.container import load_container, save_container
from kvqtool.data import Text
from kvqtool.errors import BundleError, InputError, RunError
from kvqtool.forward import Reading
from kvqtool.generation import Running, generate, resume
from kvqtool.models import LoadedModel
from kvqtool.sampling import Sampling

DOCUMENT = Text(
    "A function object is created by a function definition. The only operation on a function "
    "object is to call it. There are really two flavors of function objects: built-in functions "
    "and user-defined functions. Both support the same operation, to call the function, but the "
    "implementation is different, hence the different object types. See also the section about "
    "function definitions for more information. A method is a function that is called by a dot.",
    "document",
    "0123",
)
SPEC = "nuq3-1%-sink1"
FIXED = (
    "fp-sink2-r7",
    SPEC,
    "nuq2-2%-cap3-sink4-r9",
    "nf4-pertoken-postrope",
    "kivi2-g16-sink1-r3",
    "had4-g16/tq3-g8",
)
ADAPTIVE = "qaq-k0.03-v1-w4-2%-sink1"
STEPWISE = "qaq-k0.03-v1-w4-token-2%-sink1"
GREEDY = Sampling(max_new_tokens=8)
DRAWN = Sampling(max_new_tokens=8, temperature=0.9, top_p=0.95, top_k=200, seed=3)
Quantized = Callable[..., Path]


@pytest.fixture(scope="module")
def written(
    builtin: LoadedModel,
    calibrated: Callable[[str], Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], bytes]:
    """Return the bytes of the document's saved cache; made once for a spec and a prefill."""

    @cache
    def make(spec: str, prefill: str) -> bytes:
        path = tmp_path_factory.mktemp("caches") / "cache"
        quantize_text(builtin, calibrated(spec), DOCUMENT, path, reading=Reading(prefill))
        return path.read_bytes()

    return make


@pytest.fixture
def quantized(written: Callable[[str, str], bytes], tmp_path: Path) -> Quantized:
    """Return a maker of saved caches of the document, which a test may damage."""

    def make(spec: str, prefill: str = "exact") -> Path:
        path = tmp_path / "cache"
        path.write_bytes(written(spec, prefill))
        return path

    return make


@pytest.fixture
def states(builtin: LoadedModel, tmp_path: Path) -> tuple[dict[str, Tensor], Path]:
    """Return the document's stock keys and values, and where to write them."""
    ids = torch.tensor([builtin.tokenizer(DOCUMENT.text)["input_ids"]])
    cache = DynamicCache(config=builtin.model.config)
    with torch.no_grad():
        builtin.model(ids, past_key_values=cache)
    named = {}
    for index, layer in enumerate(cache.layers):
        named[f"layers.{index}.key"] = layer.keys.contiguous()
        named[f"layers.{index}.value"] = layer.values.contiguous()
    return named, tmp_path / "states"


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("spec", (*FIXED, ADAPTIVE, STEPWISE))
class TestResume:
    @pytest.mark.parametrize("sampling", (GREEDY, DRAWN), ids=("greedy", "sampling"))
    @pytest.mark.parametrize("prefill", ("exact", "decode-exact"))
    def test_it_goes_on_as_the_uninterrupted_run_does(
        self,
        builtin: LoadedModel,
        calibrated: Callable[[str], Bundle],
        quantized: Quantized,
        spec: str,
        sampling: Sampling,
        prefill: str,
    ) -> None:
        path = quantized(spec, prefill=prefill)
        whole = generate(
            builtin, calibrated(spec), DOCUMENT.text, sampling, running=Running(prefill)
        )
        found = resume(builtin, path, "", sampling)
        assert found.token_ids == whole.token_ids
        assert found.text == whole.text
        assert (found.prompt_tokens, found.cache_bytes) == (whole.prompt_tokens, whole.cache_bytes)

    def test_a_prompt_goes_on_where_the_document_ended(
        self,
        builtin: LoadedModel,
        calibrated: Callable[[str], Bundle],
        quantized: Quantized,
        spec: str,
    ) -> None:
        prompt = " A class is"
        document = builtin.tokenizer(DOCUMENT.text)["input_ids"]
        more = builtin.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        bundle, tokens = calibrated(spec), []
        with attach(builtin.model, bundle) as session, torch.no_grad():
            cache = session.new_cache(bundle)
            builtin.model(torch.tensor([document]), past_key_values=cache)
            for piece in torch.tensor([more]).split(1 if spec == STEPWISE else len(more), dim=1):
                logits = builtin.model(piece, past_key_values=cache).logits
            for _ in range(GREEDY.max_new_tokens):
                tokens.append(int(logits[0, -1].argmax()))
                logits = builtin.model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
        assert resume(builtin, quantized(spec), prompt, GREEDY).token_ids == tokens

    def test_saving_what_was_restored_gives_the_same_tensors(
        self, builtin: LoadedModel, quantized: Quantized, spec: str
    ) -> None:
        saved = load_cache(quantized(spec))
        with attach(builtin.model, saved.bundle) as session:
            cache = restore_cache(session, saved, builtin)
        again = {f"layers.{s.layer}.{n}": t for s in cache.stores for n, t in s.canonical().items()}
        again |= {f"angles.{g}": angles.canonical() for g, angles in cache.angles.items()}
        assert same(again, saved.tensors)


@pytest.mark.parametrize("spec", (*FIXED, ADAPTIVE))
def test_a_batch_goes_on_from_one_file_as_each_prompt_would(
    builtin: LoadedModel, quantized: Quantized, spec: str
) -> None:
    saved = load_cache(quantized(spec))
    assert saved.token_ids is not None
    more = [builtin.tokenizer(text)["input_ids"][:3] for text in (" A list is", " The old name")]

    def new_tokens(prompts: list[list[int]]) -> Tensor:
        ids = torch.cat([saved.token_ids.expand(len(prompts), -1), torch.tensor(prompts)], dim=1)
        with attach(builtin.model, saved.bundle, seam=builtin.seam) as session, torch.no_grad():
            cache = restore_cache(session, saved, builtin)
            cache.batch_repeat_interleave(len(prompts))
            fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
            made = builtin.model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **fixed
            )
        return made[:, ids.shape[1] :]

    together = new_tokens(more)
    for row, prompt in enumerate(more):
        assert torch.equal(together[row], new_tokens([prompt])[0])


@pytest.mark.parametrize("spec", FIXED)
def test_states_from_a_file_make_the_same_cache_as_the_text(
    builtin: LoadedModel,
    calibrated: Callable[[str], Bundle],
    quantized: Quantized,
    states: tuple[dict[str, Tensor], Path],
    spec: str,
) -> None:
    named, path = states
    save_file(named, path)
    by_text = load_cache(quantized(spec))
    quantize_states(builtin, calibrated(spec), path, path.with_name("from-states"))
    by_states = load_cache(path.with_name("from-states"))
    assert by_states.tokens == by_text.tokens
    assert same(by_states.tensors, by_text.tensors)


def test_states_without_queries_are_refused_where_bits_need_attention(
    builtin: LoadedModel,
    calibrated: Callable[[str], Bundle],
    states: tuple[dict[str, Tensor], Path],
) -> None:
    named, path = states
    save_file(named, path)
    with pytest.raises(InputError, match="states have no queries; use --text"):
        quantize_states(builtin, calibrated(ADAPTIVE), path, path.with_name("refused"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("key.widths", 5, "widths that are none"),
        ("key.widths", 0, "key.words"),
        ("window.attention", 2.0, "weights from 0 to 1"),
    ],
)
def test_widths_and_attention_that_cannot_be_are_refused(
    builtin: LoadedModel, quantized: Quantized, name: str, value: float, said: str
) -> None:
    saved = load_cache(quantized(ADAPTIVE))
    saved.tensors[f"layers.1.{name}"].fill_(value)
    with (
        attach(builtin.model, saved.bundle) as session,
        pytest.raises(BundleError, match=said),
    ):
        restore_cache(session, saved, builtin)


class TestReport:
    def test_figures_are_those_of_the_live_cache_and_the_file(
        self, builtin: LoadedModel, calibrated: Callable[[str], Bundle], tmp_path: Path
    ) -> None:
        path = tmp_path / "cache"
        report = quantize_text(builtin, calibrated(SPEC), DOCUMENT, path)
        tokens = len(builtin.tokenizer(DOCUMENT.text)["input_ids"])
        saved = load_cache(path)
        with attach(builtin.model, saved.bundle) as session:
            cache = restore_cache(session, saved, builtin)
        assert report.tokens == tokens
        assert report.file_bytes == path.stat().st_size
        assert report.cache_bytes == cache.nbytes
        assert report.cache_bytes_fp16 == tokens * 4 * 256 * 2
        assert report.compression == report.cache_bytes_fp16 / report.cache_bytes
        assert report.outliers == sum(b.outliers for s in cache.stores for b in s.bodies)

    def test_equal_documents_make_equal_files(
        self, builtin: LoadedModel, calibrated: Callable[[str], Bundle], tmp_path: Path
    ) -> None:
        for name in ("one", "two"):
            quantize_text(builtin, calibrated(SPEC), DOCUMENT, tmp_path / name)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


class TestDamage:
    def edited(self, path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
        """Write a file again, whole, with other content."""
        metadata, tensors = load_container(path, KIND, VERSION)
        edit(metadata, tensors)
        save_container(path, KIND, VERSION, (metadata, tensors), force=True)
        return path

    @pytest.mark.parametrize("share", (0.0, 0.1, 0.5, 0.999))
    def test_a_truncated_cache_is_refused(
        self, builtin: LoadedModel, quantized: Quantized, share: float
    ) -> None:
        path = quantized(SPEC)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BundleError, match=r"cache .* is damaged .*make it again"):
            resume(builtin, path, "", GREEDY)

    def test_a_flipped_bit_is_refused_wherever_it_is(self, quantized: Quantized) -> None:
        path = quantized(SPEC)
        whole = path.read_bytes()
        for place in range(0, len(whole), len(whole) // 60):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            with pytest.raises(BundleError):
                load_cache(path)

    @pytest.mark.parametrize(
        "edit",
        [
            lambda metadata, tensors: metadata.update(tokens=metadata["tokens"] + 1),
            lambda metadata, tensors: metadata.update(tokens=2),
            lambda metadata, tensors: metadata.update(tokens=-3),
            lambda metadata, tensors: metadata.update(tokens=0),
            lambda metadata, tensors: metadata.update(tokens="many"),
            lambda metadata, tensors: metadata.update(prefill="fast"),
            lambda metadata, tensors: metadata.update(angles={"0": "cubes"}),
            lambda metadata, tensors: metadata.update(angles=3),
            lambda metadata, tensors: metadata.pop("bundle"),
            lambda metadata, tensors: metadata["bundle"].update(spec="nuq2-1%-sink1"),
            lambda metadata, tensors: metadata["bundle"].update(spec="nuq3-1%-sink2"),
            lambda metadata, tensors: tensors.pop("angles.0"),
            lambda metadata, tensors: tensors.pop("layers.2.key.words"),
            lambda metadata, tensors: tensors.pop("layers.3.sink.value"),
            lambda metadata, tensors: tensors.update({"layers.0.sink.key": torch.ones(3)}),
            lambda metadata, tensors: tensors["layers.1.value.outlier_channels"].fill_(200),
            lambda metadata, tensors: tensors["layers.1.key.outlier_counts"].fill_(255),
            lambda metadata, tensors: tensors.update(next_logits=torch.ones(3)),
        ],
    )
    def test_whole_files_of_wrong_content_are_refused(
        self, builtin: LoadedModel, quantized: Quantized, edit: Callable[..., None]
    ) -> None:
        path = self.edited(quantized(SPEC), edit)
        with pytest.raises((BundleError, InputError)):
            resume(builtin, path, "", GREEDY)

    def test_another_model_is_refused(self, builtin: LoadedModel, quantized: Quantized) -> None:
        other = dataclasses.replace(
            builtin, identity=dataclasses.replace(builtin.identity, vocab_size=9)
        )
        with pytest.raises(BundleError, match=r"vocab_size 8192\), the model builtin has 9"):
            resume(other, quantized(SPEC), "", GREEDY)


class TestInput:
    def test_documents_that_do_not_fit_are_refused(
        self, builtin: LoadedModel, calibrated: Callable[[str], Bundle], tmp_path: Path
    ) -> None:
        text = "word " * 5000
        with pytest.raises(InputError, match=r"tokens, the model takes 1 to 4096; cut it"):
            quantize_text(builtin, calibrated(SPEC), Text(text, "t", "0"), tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_states_have_no_next_token(
        self,
        builtin: LoadedModel,
        calibrated: Callable[[str], Bundle],
        states: tuple[dict[str, Tensor], Path],
    ) -> None:
        named, path = states
        save_file(named, path)
        quantize_states(builtin, calibrated(SPEC), path, path.with_name("c"))
        with pytest.raises(InputError, match="made from states and has no next token; give a"):
            resume(builtin, path.with_name("c"), "", GREEDY)
        assert resume(builtin, path.with_name("c"), " It", GREEDY).new_tokens > 0

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("layers.2.value", None, r"no layers\.2\.value; it has"),
            ("layers.0.key", torch.ones(1, 2, 9, 32), r"shape \(1, 2, 9, 32\), expected \(1, 2, T"),
            ("layers.0.key", torch.ones(2, 64), r"shape \(2, 64\), expected"),
            ("layers.0.key", torch.ones(1, 2, 9, 64), "9 keys and .* values; give as many"),
            ("layers.0.key", torch.ones(1, 2, 0, 64), "0 keys and .* values"),
        ],
    )
    def test_states_of_wrong_shape_are_refused(
        self,
        builtin: LoadedModel,
        calibrated: Callable[[str], Bundle],
        states: tuple[dict[str, Tensor], Path],
        name: str,
        tensor: Tensor | None,
        message: str,
    ) -> None:
        named, path = states
        save_file(
            {k: t for k, t in named.items() if k != name}
            | ({} if tensor is None else {name: tensor}),
            path,
        )
        with pytest.raises(InputError, match=message):
            quantize_states(builtin, calibrated(SPEC), path, path.with_name("c"))

    def test_layers_of_different_lengths_are_refused(
        self,
        builtin: LoadedModel,
        calibrated: Callable[[str], Bundle],
        states: tuple[dict[str, Tensor], Path],
    ) -> None:
        named, path = states
        shorter = {
            n: t[:, :, :9].contiguous() for n, t in named.items() if n.startswith("layers.1")
        }
        save_file(named | shorter, path)
        with pytest.raises(InputError):
            quantize_states(builtin, calibrated(SPEC), path, path.with_name("c"))

    def test_states_that_are_not_numbers_are_refused(
        self,
        builtin: LoadedModel,
        calibrated: Callable[[str], Bundle],
        states: tuple[dict[str, Tensor], Path],
    ) -> None:
        named, path = states
        named["layers.2.key"][0, 0, 5, 5] = float("nan")
        save_file(named, path)
        with pytest.raises(RunError, match="layer 2 produced NaN"):
            quantize_states(builtin, calibrated(SPEC), path, path.with_name("c"))

    @pytest.mark.parametrize("content", (None, b"", b"words"))
    def test_files_that_are_no_states_are_refused(
        self,
        builtin: LoadedModel,
        calibrated: Callable[[str], Bundle],
        tmp_path: Path,
        content: bytes | None,
    ) -> None:
        if content is not None:
            (tmp_path / "states").write_bytes(content)
        with pytest.raises(InputError, match=r"states file .* cannot be read"):
            quantize_states(builtin, calibrated(SPEC), tmp_path / "states", tmp_path / "c")
