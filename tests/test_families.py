"""Every family: exact where it must be, close at 8 bits, and what the probe found of each."""

import pytest
from families import FAMILIES, RELEASE, check
from models_page import IS_PINNED, checked, written_rows

# Greatest difference of float32 logits with quantization off, and divergence at 8 bits (nats).
EXACT, CLOSE = 1e-4, 0.01
REFUSED = {"deepseek_v2", "deepseek_v3"}  # latent attention in every layer
# No rotary tables reach the attention module; gptj's do from transformers 5.24 on.
PASS_THROUGH = {"opt", "gpt2", "bloom"} | ({"gptj"} if RELEASE < (5, 24) else set())
# By family, not by test: a process runs a family once, and xdist hands out neighbours.
every_family = pytest.mark.parametrize("family", FAMILIES, scope="module")
as_pinned = pytest.mark.skipif(not IS_PINNED, reason="docs/models.md is of another transformers")


@every_family
def test_quantization_off_gives_stock_logits_and_greedy_tokens(family: str) -> None:
    verdict = check(family)
    if family in REFUSED:
        assert verdict.refusal is not None and "latent attention (MLA)" in verdict.refusal
        return
    assert verdict.refusal is None
    assert verdict.logits_error is not None and verdict.logits_error < EXACT
    assert verdict.tokens_are_equal


@every_family
def test_eight_bits_stay_close(family: str) -> None:
    verdict = check(family)
    assert family in REFUSED or (verdict.kld is not None and verdict.kld < CLOSE)


@every_family
def test_every_packed_layer_says_how_its_keys_rotate(family: str) -> None:
    verdict = check(family)
    for layer in verdict.seam.packed if verdict.seam else ():
        is_unrotated = "NoPE" in layer.note or "as they come" in layer.note
        assert (layer.rotation is None) == (is_unrotated or "no rotation verified" in layer.note)
        assert ("as they come" in layer.note) == (family in PASS_THROUGH)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["full: half 16 of 16"] * 2),
        ("phi", ["full: half 8 of 16"] * 2),
        ("glm4", ["full: interleaved 8 of 16"] * 2),
        ("gemma3", ["sliding: half 16 of 16", "full: half 16 of 16"]),
        ("smollm3", ["full: half 16 of 16", "full: keys are not rotated (NoPE)"]),
        ("hunyuan_v1_dense", ["full: keys post-RoPE: no rotation verified"] * 2),
    ],
)
def test_the_probe_finds_what_is_known_of_a_family(family: str, expected: list[str]) -> None:
    assert check(family).layers == expected


@as_pinned
@every_family
def test_the_models_page_says_what_the_check_finds(family: str) -> None:
    assert written_rows()[family].startswith(checked(family))


@as_pinned
def test_the_models_page_has_every_family_in_order() -> None:
    assert list(written_rows()) == list(FAMILIES)
