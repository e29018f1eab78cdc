"""Bundles: byte-exact, self-describing, and refused where they do not belong."""

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvqtool.bundle import KIND, VERSION, Bundle, load_bundle, save_bundle, uncalibrated_bundle
from kvqtool.codebook import Codebook
from kvqtool.container import save_container
from kvqtool.errors import BundleError
from kvqtool.memory import LayerGeometry
from kvqtool.spec import parse_spec

MODEL: dict[str, Any] = {
    "name": "tiny",
    "architecture": "LlamaForCausalLM",
    "num_layers": 1,
    "layers": [{"num_kv_heads": 1, "key_dim": 8, "value_dim": 8}],
    "vocab_size": 16,
    "max_context": 64,
    "tokenizer_sha256": "ab",
    "rope_sha256": "cd",
}
GOLDEN = "2c73dfa324ea104551336ffcd316e5912d2e717cc9344640e675049969190e17"


def tiny(spec: str = "nuq2-1%-qnorm") -> Bundle:
    levels = torch.tensor([-1.0, -0.25, 0.25, 1.0])
    lower, upper = torch.arange(8) - 9.0, torch.arange(8) + 1.0
    books = {
        (0, "key"): Codebook(levels, levels * 0.5, lower, upper),
        (0, "value"): Codebook(levels, levels),
    }
    return Bundle(parse_spec(spec), copy.deepcopy(MODEL), books, {"calibrated": True, "seed": 0})


def parts_of(book: Codebook) -> dict[str, Tensor]:
    return {name: t for name, t in vars(book).items() if t is not None}


def saved(bundle: Bundle, folder: Path) -> Bundle:
    save_bundle(bundle, folder / "bundle")
    return load_bundle(folder / "bundle")


class TestFile:
    def test_a_known_bundle_has_known_bytes(self, tmp_path: Path) -> None:
        """Changing this number changes the format: a line in CHANGELOG, and maybe a version."""
        save_bundle(tiny(), tmp_path / "bundle")
        assert hashlib.sha256((tmp_path / "bundle").read_bytes()).hexdigest() == GOLDEN

    def test_what_is_saved_is_loaded(self, tmp_path: Path) -> None:
        bundle, loaded = tiny(), saved(tiny(), tmp_path)
        assert (loaded.spec, loaded.model) == (bundle.spec, bundle.model)
        assert loaded.provenance == bundle.provenance
        assert loaded.codebooks.keys() == bundle.codebooks.keys()
        for where, book in bundle.codebooks.items():
            found, expected = parts_of(loaded.codebooks[where]), parts_of(book)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[n], expected[n]) for n in expected)

    def test_saving_what_was_loaded_gives_the_same_bytes(self, tmp_path: Path) -> None:
        save_bundle(saved(tiny(), tmp_path), tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "bundle").read_bytes()

    def test_its_bytes_are_those_of_its_half_precision_tensors(self) -> None:
        # Key: 4 levels, 4 decode levels, 8 lower, 8 upper. Value: 4 levels. Two bytes each.
        assert tiny().bundle_bytes == 2 * (4 + 4 + 8 + 8 + 4)

    @pytest.mark.parametrize("spec", ("fp", "int4-g8", "nf3-pertoken", "int8-1%-pertoken"))
    def test_schemes_without_calibration_need_no_text(self, tmp_path: Path, spec: str) -> None:
        loaded = saved(uncalibrated_bundle(parse_spec(spec), MODEL, [0, 3]), tmp_path)
        assert str(loaded.spec) == spec
        assert sorted(loaded.codebooks) == [(i, side) for i in (0, 3) for side in ("key", "value")]
        assert loaded.provenance == {"calibrated": False}


class TestDamage:
    def test_every_flipped_bit_is_refused_or_does_not_matter(self, tmp_path: Path) -> None:
        path = tmp_path / "bundle"
        save_bundle(tiny(), path)
        whole, harmful = path.read_bytes(), []
        for bit in range(
            0, 8 * len(whole), 13
        ):  # every position within a byte, test_container does all
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                found = load_bundle(path)
            except BundleError:
                continue
            if found.metadata() != tiny().metadata() or str(found.tensors()) != str(
                tiny().tensors()
            ):
                harmful.append(divmod(bit, 8))
        assert harmful == []

    def test_a_truncated_bundle_is_refused(self, tmp_path: Path) -> None:
        save_bundle(tiny(), tmp_path / "bundle")
        whole = (tmp_path / "bundle").read_bytes()
        (tmp_path / "bundle").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BundleError, match=r"bundle .* is damaged"):
            load_bundle(tmp_path / "bundle")

    def test_a_future_version_is_refused_with_both_numbers(self, tmp_path: Path) -> None:
        content = tiny().metadata(), tiny().tensors()
        save_container(tmp_path / "bundle", KIND, VERSION + 1, content)
        with pytest.raises(BundleError, match=f"version {VERSION + 1}, .* reads version {VERSION}"):
            load_bundle(tmp_path / "bundle")

    def test_a_saved_cache_is_no_bundle(self, tmp_path: Path) -> None:
        save_container(tmp_path / "cache", "kvqtool-cache", 1, ({}, {}))
        with pytest.raises(BundleError, match=r"found: kvqtool-cache\); name another file"):
            load_bundle(tmp_path / "cache")

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ({"spec": "nuq9"}, "unknown method nuq9"),
            ({"spec": 3}, "calibrate it again"),
            ({"model": None}, "calibrate it again"),
        ],
    )
    def test_whole_files_of_wrong_content_are_refused(
        self, tmp_path: Path, metadata: dict[str, Any], message: str
    ) -> None:
        content = {**tiny().metadata(), **metadata}, tiny().tensors()
        save_container(tmp_path / "bundle", KIND, VERSION, content)
        with pytest.raises(BundleError, match=message):
            load_bundle(tmp_path / "bundle")

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            ("layers.0.key.levels", torch.zeros(5)),
            ("layers.0.key.levels", torch.full((4,), float("nan"))),
            ("layers.0.key.lower", None),
            ("layers.0.value.levels", None),
            ("layers.0.value.levels", torch.zeros(0)),
            ("layers.0.key.lower", torch.full((8,), float("inf"))),
            ("layers.0.key.upper", torch.zeros(9)),
            ("elsewhere", torch.zeros(1)),
        ],
    )
    def test_tensors_that_make_no_codebook_are_refused(
        self, tmp_path: Path, name: str, tensor: Tensor | None
    ) -> None:
        tensors = tiny().tensors() | ({} if tensor is None else {name: tensor})
        if tensor is None:
            del tensors[name]
        save_container(tmp_path / "bundle", KIND, VERSION, (tiny().metadata(), tensors))
        with pytest.raises(BundleError, match="calibrate it again"):
            load_bundle(tmp_path / "bundle")


class TestModel:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("architecture", "Qwen3ForCausalLM"),
            ("num_layers", 28),
            ("layers", [{"num_kv_heads": 2, "key_dim": 8, "value_dim": 8}]),
            ("vocab_size", 17),
            ("tokenizer_sha256", "other"),
            ("rope_sha256", "other"),
        ],
    )
    def test_another_model_is_refused_by_both_values(self, field: str, value: Any) -> None:
        other = {**MODEL, "name": "other", field: value}
        with pytest.raises(BundleError, match=rf"made for tiny \({field} .* other has .*calibrate"):
            tiny().check_model(other)

    def test_the_same_model_under_another_name_is_taken(self) -> None:
        tiny().check_model({**MODEL, "name": "a copy", "max_context": 128})

    def test_layers_of_other_widths_are_refused(self) -> None:
        with pytest.raises(BundleError, match="8 key channels in layer 0, the model has 16"):
            tiny().check_layers({0: LayerGeometry(2, 8, 8)})

    def test_layers_without_a_codebook_are_refused(self) -> None:
        with pytest.raises(BundleError, match="no codebook for layer 5"):
            tiny().check_layers({5: LayerGeometry(1, 8, 8)})

    def test_a_bundle_cannot_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            tiny().spec = parse_spec("fp")  # type: ignore[misc]
