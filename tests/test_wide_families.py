"""Every family decoded from pages by the kernels' torch references: what torch gives, and which
layers are read how.
"""

import pytest
from families import FAMILIES, IS_OLD, RELEASE
from models_page import IS_PINNED, read_by, written_rows
from wide_families import read

ALIKE = 1e-5  # nats between read paths; they differ by the rounding of angles and tables to fp16
CLOSE = 0.1  # nats between 4 bits and none, of random models; half of all families are below 1e-3
EAGER = "torch: the model runs on eager attention, not on sdpa"
NO_FORMULA = "torch: positions that do not go on by one, or have no formula"
NO_FUNCTION = "torch: angles are not a function of position"
NO_CAP = "torch: sdpa of transformers before 5.23 leaves out the model's cap on scores"
# Every other family is read by the fused kernel in all of its packed layers.
OTHERWISE = {
    "gemma2": [NO_CAP if IS_OLD else "fused"] * 2,
    "gpt_oss": [EAGER] * 2,
    "gptj": [EAGER if RELEASE < (5, 24) else NO_FUNCTION] * 2,
    "bloom": [EAGER] * 2,
    "falcon": ["torch: FalconForCausalLM does not let its attention be replaced"] * 2,
    "phi3 (longrope)": [NO_FORMULA] * 2,
    "llama4 (text)": [NO_FUNCTION, "fused"],
    "qwen3_next": ["stock", "fused"],
    "gemma3n": ["fused"] * 2 + ([] if IS_OLD else ["stock"] * 2),
}
REFUSED = ("deepseek_v2", "deepseek_v3")
# By family, as in test_families.py.
every_family = pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f not in REFUSED], scope="module"
)


@every_family
def test_tokens_are_those_of_the_torch_path(family: str) -> None:
    reading = read(family)
    assert reading is not None and reading.same_tokens


@every_family
def test_next_tokens_are_as_likely_as_through_torch(family: str) -> None:
    reading = read(family)
    assert reading is not None and abs(reading.kld) < ALIKE


@every_family
def test_four_bits_stay_close_to_no_cache(family: str) -> None:
    reading = read(family)
    assert reading is not None and reading.kld_exact < CLOSE


@every_family
def test_each_layer_is_read_as_is_known(family: str) -> None:
    reading = read(family)
    assert reading is not None and reading.paths == OTHERWISE.get(family, ["fused"] * 2)


@every_family
def test_a_layer_for_kernels_is_read_by_nothing_else(family: str) -> None:
    reading = read(family)
    assert reading is not None
    for row in reading.rows:
        if row["read_path"] == "fused":
            calls = row["read_calls"]
            assert calls["fused"] and not calls["dequantize"] and not calls["materialise"]


@pytest.mark.skipif(not IS_PINNED, reason="docs/models.md is of another transformers")
@every_family
def test_the_models_page_says_how_it_is_read(family: str) -> None:
    assert written_rows()[family].endswith(read_by(family))
