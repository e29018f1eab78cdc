"""The spec string: what it means, that it prints as it parses, and how it is refused."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvqtool.adaptive import Adaptive
from kvqtool.errors import SpecError
from kvqtool.side import METHOD_BITS, WEIGHTINGS, QuantSpec
from kvqtool.spec import DEFAULT_SPEC, PRESETS, KvSpec, parse_spec

HEADS = tuple(f"{method}{bits}" for method, widths in METHOD_BITS.items() for bits in widths)
SHARED_WORDS = ("", "-sink1", "-r128", "-sink4-r32")
WORDS = {
    "nuq": (
        ("", "-1%", "-0.1%"),
        ("", "-cap4"),
        SHARED_WORDS,
        ("", "-qnorm"),
        ("", "-postrope"),
        ("", "-pertoken"),
        ("", "-fisher", "-nofisher"),
        ("", "-pc"),
        ("", "-comp"),
        ("", "-vrot"),
    ),
    "int": (
        ("", "-1%", "-2.5%"),
        ("", "-g8", "-g64"),
        ("", "-cap4"),
        SHARED_WORDS,
        ("", "-postrope"),
        ("", "-pertoken"),
        ("", "-comp"),
        ("", "-vrot"),
    ),
    "kivi": (("-g32", "-g128"), SHARED_WORDS, ("", "-postrope")),
    "had": (("", "-g64"), SHARED_WORDS, ("", "-postrope")),
    "tq": (("", "-g64"), SHARED_WORDS, ("", "-postrope")),
    "nf": (("", "-1%"), ("", "-cap4"), SHARED_WORDS, ("", "-postrope"), ("", "-pertoken")),
    "qaq": (("", "-1%"), SHARED_WORDS, ("", "-vrot")),
}


def canonical_strings() -> Iterator[str]:
    """Yield every string of one scheme with its words in the printed order."""
    yield from (
        "".join(parts) for parts in itertools.product(["fp"], SHARED_WORDS, ["", "-postrope"])
    )
    for method, widths in METHOD_BITS.items():
        heads = [f"{method}{bits}" for bits in widths]
        yield from ("".join(parts) for parts in itertools.product(heads, *WORDS[method]))


def is_sensible(text: str) -> bool:
    """Whether the words of a string agree with each other, by the rules of the grammar's page."""
    per_token = "-pertoken" in text or "-g" in text
    return not (
        ("-cap" in text and ("%" not in text or per_token))
        or ("-pc" in text and per_token)
        or ("-g" in text and ("-pertoken" in text or "-comp" in text))
    )


class TestMeaning:
    def test_kvquant_is_nuq_with_outliers_and_a_sink(self) -> None:
        spec = parse_spec("nuq3-1%-sink1")
        shared = {"method": "nuq", "bits": 3, "outlier_fraction": 0.01}
        assert spec.key == QuantSpec(**shared, pre_rope=True, per_channel=True)  # type: ignore[arg-type]
        assert spec.value == QuantSpec(**shared)  # type: ignore[arg-type]
        assert (spec.sink_tokens, spec.residual_length) == (1, 0)

    @pytest.mark.parametrize("bits", (4, 3, 2))
    def test_a_preset_is_its_recipe(self, bits: int) -> None:
        spec = parse_spec(f"kvq{bits}")
        assert (spec.key.bits, spec.value.bits, spec.sink_tokens) == (bits, bits, 1)
        assert spec.mixed
        assert spec.key.channel_levels
        assert spec.key.compensated
        assert spec.value.compensated
        assert str(spec) == PRESETS[f"kvq{bits}"]

    def test_the_default_is_a_preset(self) -> None:
        assert DEFAULT_SPEC in PRESETS

    def test_mixed_stands_at_the_end_of_any_nuq_scheme(self) -> None:
        assert str(parse_spec("nuq3@mixed")) == "nuq3@mixed"
        assert parse_spec("nuq4-1%/nuq3@mixed").mixed

    @pytest.mark.parametrize("text", ("nuq3-1%@2.75", "nuq3-1%-pc-comp/nuq3-comp@12.345678"))
    def test_bits_to_spend_are_read_back(self, text: str) -> None:
        spec = parse_spec(text)
        assert spec.mixed
        assert str(spec) == text
        assert spec.target_bits == float(text.rpartition("@")[2])

    def test_a_preset_can_spend_other_bits(self) -> None:
        spec = parse_spec("kvq3@2.5")
        assert spec == replace(parse_spec("kvq3"), target_bits=2.5)
        assert (spec.name, parse_spec("kvq3").name) == (str(spec), "kvq3")

    def test_a_preset_keeps_recent_tokens_exact(self) -> None:
        spec = parse_spec("kvq3-r3")
        assert spec == replace(parse_spec("kvq3"), residual_length=3)
        assert spec.name == "kvq3-r3"
        assert parse_spec(str(spec)) == spec
        assert parse_spec("kvq2-r5@2.5") == replace(parse_spec("kvq2@2.5"), residual_length=5)

    def test_one_string_is_for_both_sides(self) -> None:
        spec = parse_spec("int4-1%-g64")
        assert spec.key.group_size == spec.value.group_size == 64
        assert not spec.key.per_channel

    def test_two_strings_are_keys_then_values(self) -> None:
        spec = parse_spec("nuq4-1%-pc-sink1/nf3")
        assert (spec.key.method, spec.key.bits, spec.key.channel_levels) == ("nuq", 4, True)
        assert (spec.value.method, spec.value.bits) == ("nf", 3)
        assert spec.sink_tokens == 1

    @pytest.mark.parametrize(
        ("word", "field", "expected"),
        [
            ("postrope", "pre_rope", False),
            ("pertoken", "per_channel", False),
            ("qnorm", "moment_match", True),
            ("fisher", "weighting", "fisher"),
            ("nofisher", "weighting", "none"),
            ("pc", "channel_levels", True),
            ("comp", "compensated", True),
            ("2%", "outlier_fraction", 0.02),
            ("0.1%", "outlier_fraction", 0.001),
        ],
    )
    def test_a_word_sets_one_field(self, word: str, field: str, expected: object) -> None:
        plain, changed = parse_spec("nuq3").key, parse_spec(f"nuq3-{word}").key
        assert getattr(changed, field) == expected
        assert {n for n in vars(plain) if vars(plain)[n] != vars(changed)[n]} == {field}

    def test_one_string_compensates_keys_and_rotates_values(self) -> None:
        spec = parse_spec("nuq3-comp-vrot")
        assert (spec.key.compensated, spec.value.compensated) == (True, False)
        assert (spec.key.rotated, spec.value.rotated) == (False, True)

    def test_two_strings_compensate_each_for_itself(self) -> None:
        spec = parse_spec("nuq3/nuq3-comp")
        assert (spec.key.compensated, spec.value.compensated) == (False, True)

    def test_qaq_without_bits_decides_them_by_token(self) -> None:
        spec = parse_spec("qaq-k0.1-v0.05-1%-w7-head-released")
        assert spec.adaptive == Adaptive("head", "released")
        assert (spec.key.error_budget, spec.value.error_budget) == (0.1, 0.05)
        assert (spec.residual_length, spec.key.outlier_fraction) == (7, 0.01)
        assert not (spec.key.pre_rope or spec.key.per_channel or spec.needs_calibration)

    def test_qaq_says_its_defaults(self) -> None:
        assert str(parse_spec("qaq-1%")) == "qaq-k0.01-v3-w5-1%"
        assert parse_spec("qaq").needs_queries

    def test_qaq_bits_over_nuq_codebooks_keep_what_nuq_does(self) -> None:
        spec, plain = parse_spec("qaq-nuq-1%-sink1-pc"), parse_spec("nuq4-1%-sink1-pc")
        bare = replace(spec.key, error_budget=None, bits=4)
        assert bare == plain.key
        assert spec.needs_gradients

    def test_order_and_surrounding_space_do_not_matter(self) -> None:
        assert parse_spec(" nuq3-sink1-qnorm-1% \n") == parse_spec("nuq3-1%-sink1-qnorm")

    def test_sink_may_stand_on_either_side_or_both(self) -> None:
        specs = {parse_spec(f"nuq4{a}/nuq3{b}") for a, b in [("-sink1", ""), ("", "-sink1")]}
        assert specs == {parse_spec("nuq4-sink1/nuq3-sink1")}

    @pytest.mark.parametrize(
        ("text", "calibration", "gradients"),
        [
            ("fp", False, False),
            ("nuq3", True, True),
            ("nuq3-fisher", True, True),
            ("nuq3-nofisher", True, False),
            ("int4", True, False),
            ("int4-pertoken", False, False),
            ("int4-g64", False, False),
            ("nf4-pertoken", False, False),
            ("int4-g64/nuq3", True, True),
            ("int4-comp", True, True),
            ("int4-g64/int4-comp", True, True),
            ("int4-pertoken-vrot", False, False),
            ("nuq3-nofisher-comp", True, True),
            ("nuq3-pertoken-nofisher", True, False),
        ],
    )
    def test_what_calibration_must_bring(
        self, text: str, calibration: bool, gradients: bool
    ) -> None:
        spec = parse_spec(text)
        assert (spec.needs_calibration, spec.needs_gradients) == (calibration, gradients)


class TestRoundTrip:
    def test_every_sensible_string_prints_as_it_was_written(self) -> None:
        strings = [text for text in canonical_strings() if is_sensible(text)]
        assert len(strings) > 2000
        wrong = {text: str(parse_spec(text)) for text in strings if str(parse_spec(text)) != text}
        assert not wrong

    def test_every_other_string_is_refused(self) -> None:
        for text in canonical_strings():
            if not is_sensible(text):
                with pytest.raises(SpecError):
                    parse_spec(text)

    def test_every_pair_is_read_back(self) -> None:
        keys = (
            "nuq2",
            "nuq4-1%-sink1-qnorm-pc",
            "int4-g64",
            "int3-1%-cap4-postrope",
            "nf4-pertoken",
            "nuq3-1%-pc-comp",
            "kivi2-g32",
            "had4-g64",
        )
        values = ("nuq2", "nuq3-1%-qnorm", "int4-g64", "int3-vrot", "nf4", "nuq8-nofisher-comp")
        values += ("kivi3-g64", "tq3-g64")
        for pair in itertools.product(keys, values):
            spec = parse_spec("/".join(pair))
            assert parse_spec(str(spec)) == spec, pair

    def test_every_valid_value_is_read_back(self) -> None:
        found = list(valid_specs())
        assert len(found) > 600
        wrong = {str(spec): spec for spec in found if parse_spec(str(spec)) != spec}
        assert not wrong

    def test_equal_sides_print_once(self) -> None:
        assert str(parse_spec("nuq3-1%-sink1/nuq3-1%")) == "nuq3-1%-sink1"
        assert str(parse_spec("nuq3-1%-pc/nuq3-1%")) == "nuq3-1%-pc"

    @pytest.mark.parametrize("percent", ["1.2345678", "0.00001", "33.3333333", "49.9", "10"])
    def test_any_outlier_share_is_read_back(self, percent: str) -> None:
        spec = parse_spec(f"nuq3-{percent}%")
        assert str(spec) == f"nuq3-{percent}%"
        assert parse_spec(str(spec)) == spec


def valid_specs() -> Iterator[KvSpec]:
    """Yield the specs that can be built from a grid of fields and are not refused."""
    methods = [("nuq", 3), ("int", 4), ("nf", 2), ("fp", 16)]
    grid = itertools.product(
        methods,
        (0.0, 0.01, 0.005),
        (None, 8, 64),
        (None, 4),
        (False, True),
        (False, True),
        (False, True),
        WEIGHTINGS,
        (False, True),
        (False, True),
    )
    for (method, bits), *rest in grid:
        try:
            key = QuantSpec(method, bits, *rest)
        except SpecError:
            continue
        for value in ("nuq4-1%", "int4-g64", "nf3", "fp"):
            try:
                yield KvSpec(key, parse_spec(value).value, sink_tokens=1, residual_length=32)
            except SpecError:
                continue


ADAPTIVE_WORDS = (
    ("", "-nuq"),
    ("-k0.01", "-k12.5"),
    ("-v0.05",),
    ("-w1", "-w128"),
    ("", "-token", "-head"),
    ("", "-released"),
    ("", "-shadow"),
    ("", "-1%"),
    ("", "-sink4"),
    ("", "-pc"),
    ("", "-comp"),
    ("", "-vrot"),
)


def test_qaq_strings_print_as_they_are_written_or_are_refused() -> None:
    printed = 0
    for parts in itertools.product(["qaq"], *ADAPTIVE_WORDS):
        text = "".join(parts)
        is_plain = "-nuq" not in text
        if ("-head" in text and not is_plain) or (is_plain and ("-pc" in text or "-comp" in text)):
            with pytest.raises(SpecError):
                parse_spec(text)
        elif "-token" in text and "-shadow" in text:
            with pytest.raises(SpecError, match="keep one"):
                parse_spec(text)
        else:
            assert str(parse_spec(text)) == text
            printed += 1
    assert printed > 250


class TestRefusal:
    @pytest.mark.parametrize(
        ("text", "value", "remedy"),
        [
            ("", "''", "start with nuq3, int4, nf4 or fp"),
            ("q4_0", "'q4_0'", "start with nuq3, int4, nf4 or fp"),
            ("NUQ3", "'NUQ3'", "start with nuq3"),
            ("nuq5", "nuq5", "use fp or one of: nuq2 nuq3"),
            ("nf8", "nf8", "use fp or one of"),
            ("nuq3-1", "'1'", "known: 1% g64"),
            ("nuq3-", "''", "known: 1% g64"),
            ("nuq3-sinks1", "'sinks1'", "known:"),
            ("nuq3--1%", "''", "known:"),
            ("nuq3-1%-2%", "percent", "keep one"),
            ("nuq3-sink1-sink2", "sink", "keep one"),
            ("nuq3-qnorm-qnorm", "qnorm", "keep one"),
            ("nuq3-fisher-nofisher", "fisher and nofisher", "keep one"),
            ("nuq3-50%", "50%", "use 1% or less"),
            ("nuq3-g64", "-g64", "drop -g or use int"),
            ("int4@mixed", "@mixed", "use nuq without -nofisher"),
            ("nuq3-nofisher@mixed", "@mixed", "use nuq without -nofisher"),
            ("nuq3@mixed-sink1", "'nuq3@mixed'", "start with nuq3"),
            ("nuq3-vrot/nuq3", "vrot", "write it after the /"),
            ("int4-g64-comp", "-g64", "drop -g or -comp"),
            ("fp-vrot", "vrot", "do not apply"),
            ("int4-g4", "-g4", "groups of 8 or more"),
            ("int4-qnorm", "int4", "belong to nuq"),
            ("nf4-pc", "nf4", "belong to nuq"),
            ("int4-nofisher", "int4", "belong to nuq"),
            ("int4-g64-pertoken", "-pertoken", "drop it"),
            ("nuq3-cap4", "-cap4", "nuq3-1%-cap4"),
            ("nuq3-1%-cap0", "-cap0", "nuq3-1%-cap4"),
            ("nuq3-1%-pertoken-cap4", "-cap4", "nuq3-1%-cap4"),
            ("nuq3-pertoken-pc", "-pc", "drop -pertoken"),
            ("fp-1%", "fp", "do not apply"),
            ("fp/nuq3", "fp", "or neither"),
            ("nuq3/fp", "fp", "or neither"),
            ("nuq3/nuq3/nuq3", "3 parts", "write KEYS/VALUES"),
            ("nuq3-sink1/nuq3-sink2", "sink", "holds for the whole cache"),
            ("nuq3-r1/nuq3-r2", "r differs", "holds for the whole cache"),
            ("nuq3/nuq3-pc", "pc", "write it before the /"),
            ("nuq3/nuq3-postrope", "postrope", "write it before the /"),
            ("nuq3/nuq3-1%-cap4", "cap", "write it before the /"),
            ("nuq3/nuq3-pertoken", "pertoken", "write it before the /"),
            ("qaq0", "qaq0", "qaq2 qaq3 qaq4 qaq8"),
            ("qaq-r5", "r does not go with qaq", "window is -wN"),
            ("qaq-g64", "g does not go with qaq", "drop one"),
            ("nuq3-w5", "w does not go with nuq3", "drop one"),
            ("qaq-w0", "-w0", "use -w1 or more"),
            ("qaq-k0", "0", "use 0.01"),
            ("qaq-comp", "comp", "add nuq, as in qaq-nuq-comp"),
            ("qaq-nuq-head", "-head", "drop -head or nuq"),
            ("qaq-token-head", "-token and -head", "keep one"),
            ("qaq/nuq3", "both", "write qaq for each"),
            ("qaq@mixed", "@mixed", "keep one"),
            ("qaq-k1/qaq-k2", "k differs", "holds for the whole cache"),
        ],
    )
    def test_a_string_is_refused_with_value_and_remedy(
        self, text: str, value: str, remedy: str
    ) -> None:
        with pytest.raises(SpecError) as info:
            parse_spec(text)
        message = str(info.value)
        assert value in message
        assert remedy in message
        assert "\n" not in message

    def test_values_are_per_token(self) -> None:
        key = QuantSpec("nuq", 3, pre_rope=True, per_channel=True)
        with pytest.raises(SpecError, match=r"values are quantized per token"):
            KvSpec(key=key, value=key)

    @pytest.mark.parametrize("sizes", [(-1, 0), (0, -1)])
    def test_lengths_are_not_negative(self, sizes: tuple[int, int]) -> None:
        side = QuantSpec("nuq", 3)
        with pytest.raises(SpecError, match=r"must not be negative"):
            KvSpec(side, side, *sizes)

    def test_weighting_is_known(self) -> None:
        with pytest.raises(SpecError, match=r"'hessian'; use one of: fisher-scale, fisher, none"):
            QuantSpec("nuq", 3, weighting="hessian")

    def test_a_spec_error_ends_a_command_with_two(self) -> None:
        assert SpecError.exit_code == 2
