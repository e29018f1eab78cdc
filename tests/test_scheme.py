"""Schemes: a spec for all layers, or what a bundle's header says of each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvqtool import hub
from kvqtool.bundle import save_bundle
from kvqtool.errors import BundleError, InputError
from kvqtool.hub import fetch_config, is_hub_id
from kvqtool.layers import CacheLayer, CacheModel
from kvqtool.load import Workload
from kvqtool.memory import LayerGeometry
from kvqtool.plan import plans
from kvqtool.scheme import bundle_scheme, plain_scheme, with_code_bits
from kvqtool.shape import read_shape
from kvqtool.spec import parse_spec
from kvqtool.synthetic import synthetic_bundle

LAYER = CacheLayer("full", LayerGeometry(2, 64, 64))
IDENTITY: dict[str, Any] = {
    "name": "m",
    "architecture": "LlamaForCausalLM",
    "num_layers": 4,
    "layers": [],
    "vocab_size": 8192,
    "max_context": 4096,
    "tokenizer_sha256": "",
    "rope_sha256": "",
}


def saved(folder: Path, spec: str, own: dict[int, str] | None = None) -> Path:
    layers = dict.fromkeys(range(4), LayerGeometry(2, 64, 64))
    bundle = replace(synthetic_bundle(parse_spec(spec), layers), model=IDENTITY)
    specs = {index: parse_spec(text) for index, text in (own or {}).items()}
    path = folder / "bundle.safetensors"
    save_bundle(replace(bundle, layer_specs=specs), path)
    return path


def test_a_bundles_header_is_its_scheme(tmp_path: Path) -> None:
    scheme = bundle_scheme(saved(tmp_path, "int4-sink1-pertoken"))
    assert scheme.spec == parse_spec("int4-sink1-pertoken")
    assert (scheme.name, scheme.num_layers, scheme.layer_specs) == ("int4-sink1-pertoken", 4, {})


def test_layers_of_a_mixed_bundle_are_planned_by_their_own_specs(tmp_path: Path) -> None:
    own = {0: "nuq8-sink1", 1: "nuq2-sink1", 2: "nuq2-sink1", 3: "nuq2-sink1"}
    scheme = bundle_scheme(saved(tmp_path, "nuq4-sink1@mixed", own))
    shape, work = read_shape("builtin"), Workload(1000)
    (mixed, eight, two) = plans(
        shape,
        [scheme, *(plain_scheme(parse_spec(name)) for name in ("nuq8-sink1", "nuq2-sink1"))],
        [1000],
        work,
    )
    positions = mixed.breakdown["angles"]
    shares = [(row.cache_bytes - positions) / 4 for row in (eight, two)]
    assert mixed.spec == "nuq4-sink1@mixed"
    assert mixed.cache_bytes - positions == shares[0] + 3 * shares[1]
    bare = plans(shape, [plain_scheme(scheme.spec)], [1000], work)[0]
    assert any("together keep within" in line for line in bare.assumptions)


def test_a_bundle_of_another_model_is_refused(tmp_path: Path) -> None:
    scheme = bundle_scheme(saved(tmp_path, "int4-pertoken"))
    with pytest.raises(BundleError, match=r"4 cache layers, llama-3\.1-8b has 32"):
        scheme.applied_to(read_shape("llama-3.1-8b"))


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(BundleError, match="not a kvqtool-bundle"):
        bundle_scheme(path)
    path.write_bytes(b"nothing")
    with pytest.raises(BundleError, match="not a safetensors file"):
        bundle_scheme(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", True),
        ("builtin", False),
        ("./a/b", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("~/a", False),
    ],
)
def test_hub_ids_are_told_from_paths(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected


def test_a_folder_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert not is_hub_id("owner/model")


def test_an_unreachable_hub_names_the_model() -> None:
    with pytest.raises(
        InputError, match=r"no config of 'owner/none' from the hub .* name a folder"
    ):
        fetch_config("owner/none", None)


def test_headers_of_a_hub_model_are_those_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import (
        SafetensorsFileMetadata,
        SafetensorsRepoMetadata,
        TensorInfo,
    )

    info = TensorInfo(dtype="BF16", shape=[2, 3], data_offsets=(0, 12))
    file = SafetensorsFileMetadata(metadata={}, tensors={"model.norm.weight": info})
    found = SafetensorsRepoMetadata(
        metadata=None, sharded=False, weight_map={}, files_metadata={"model.safetensors": file}
    )
    monkeypatch.setattr(
        huggingface_hub, "get_safetensors_metadata", lambda name, revision: found, raising=False
    )
    ((path, header),) = hub.fetch_headers("owner/model", None)
    assert path == Path("model.safetensors")
    assert header["model.norm.weight"]["shape"] == [2, 3]
    assert header["model.norm.weight"]["data_offsets"] == (0, 12)


def test_a_budget_is_planned_by_its_bundle_only() -> None:
    with pytest.raises(InputError, match=r"@2\.75 spends its bits layer by layer .* --bundle"):
        plain_scheme(parse_spec("kvq3@2.75"))
    assert plain_scheme(parse_spec("kvq3")).name == "kvq3"


def test_bits_by_token_are_planned_at_most_or_as_stated() -> None:
    scheme = plain_scheme(parse_spec("qaq-1%"))
    most = CacheModel((LAYER,), scheme.spec, 2, "float16")
    some = CacheModel((LAYER,), with_code_bits(scheme, 2.5).spec, 2, "float16")
    assert most.nbytes(1000) == most.nbytes(1000, bound=True) == some.nbytes(1000, bound=True)
    # 995 tokens of two sequences are past the window, in tiles of 16 rows; 1000 - 5, 8 pages.
    channels, rows = LAYER.geometry.elements, 2 * 995
    codes = {name: size for name, size in some.breakdown(1000).items() if "words" in name}
    half = 16 * -(-(rows // 2) // 16)
    assert sum(codes.values()) == half * channels * (2 + 3) // 8
    assert most.nbytes(1000) - some.nbytes(1000) == 16 * -(-rows // 16) * channels - sum(
        codes.values()
    )


def test_stated_bits_of_fixed_codes_are_refused() -> None:
    with pytest.raises(InputError, match="nuq3-1% fixes the bits of its codes"):
        with_code_bits(plain_scheme(parse_spec("nuq3-1%")), 3)
