"""Spending bytes by predicted loss: against trying everything, and against what is measured."""

import itertools
from dataclasses import replace

import pytest
import torch

from kvqtool import allocate as allocate_module
from kvqtool.allocate import FITTED, Ground, Option, Place, Specs, allocate, options, variants
from kvqtool.attach import attach
from kvqtool.bundle import Bundle, load_bundle, save_bundle
from kvqtool.calibrate import MIXED_AT, calibrate, ground_of, observe
from kvqtool.data import Windows, calibration_windows, evaluation_windows, load_text
from kvqtool.layers import Angles, CacheLayer
from kvqtool.memory import LayerGeometry, Outliers, layer_buffers, position_buffer
from kvqtool.models import LoadedModel
from kvqtool.perplexity import evaluate
from kvqtool.spec import SIDES, parse_spec

SCHEME = parse_spec("nuq3-1%-sink1")
LAYERS = {
    0: CacheLayer("full", LayerGeometry(2, 64, 64), angles=Angles("0", 64)),
    3: CacheLayer("full", LayerGeometry(1, 64, 32), angles=Angles("0", 64)),
}
GROUND = Ground(SCHEME, LAYERS, 1000, "float16")


def choices(losses: dict[Place, tuple[float, ...]]) -> dict[Place, list[Option]]:
    """Return options of 2, 3 and 4 bits with given losses."""
    found = {}
    for place, row in losses.items():
        quants = [replace(SCHEME.side(place[1]), bits=bits) for bits in (2, 3, 4)]
        found[place] = [
            Option(quant, GROUND.side_bytes(quant, place), loss)
            for quant, loss in zip(quants, row, strict=True)
        ]
    return found


LOSSES = choices(
    {
        (0, "key"): (9.0, 2.0, 0.5),
        (0, "value"): (4.0, 1.1, 0.3),
        (3, "key"): (1.0, 0.3, 0.1),
        (3, "value"): (0.7, 0.2, 0.05),
    }
)


def loss_of(specs: Specs) -> float:
    return sum(
        option.loss
        for (layer, side), row in LOSSES.items()
        for option in row
        if option.quant == specs[layer].side(side)
    )


def every() -> list[Specs]:
    found = []
    for widths in itertools.product((2, 3, 4), repeat=4):
        it = iter(widths)
        found.append(
            {
                layer: replace(
                    SCHEME,
                    key=replace(SCHEME.key, bits=next(it)),
                    value=replace(SCHEME.value, bits=next(it)),
                )
                for layer in LAYERS
            }
        )
    return found


class TestBudget:
    @pytest.mark.parametrize("bits", (2.8, 3.0, 3.3, 3.7, 4.0, 4.5))
    def test_it_is_at_most_a_step_from_the_best_of_all(self, bits: float) -> None:
        """Greedy on convex options is the optimum of what it spends, and spends all but a step."""
        budget = int(bits * GROUND.elements / 8)
        found = allocate(GROUND, LOSSES, budget)
        assert found is not None
        assert GROUND.nbytes(found) <= budget
        step = max(
            right.nbytes - left.nbytes
            for row in LOSSES.values()
            for left, right in itertools.pairwise(row)
        )
        rivals = [loss_of(specs) for specs in every() if GROUND.nbytes(specs) <= budget - step]
        assert all(loss_of(found) <= rival for rival in rivals)

    def test_a_sliding_layer_counts_what_it_keeps(self) -> None:
        sliding = replace(LAYERS[0], kind="sliding", window=200)
        ground = Ground(SCHEME, {0: sliding}, 1000, "float16")
        kept = sum(sliding.parts(SCHEME, 1000))
        assert kept < 400
        assert ground.elements == kept * 256
        whole = Ground(SCHEME, {0: LAYERS[0]}, 1000, "float16")
        assert ground.nbytes({0: SCHEME}) < whole.nbytes({0: SCHEME}) / 2

    def test_too_few_bytes_are_said(self) -> None:
        assert allocate(GROUND, LOSSES, 1000) is None

    def test_weights_move_bytes(self) -> None:
        budget = int(3.3 * GROUND.elements / 8)
        plain = allocate(GROUND, LOSSES, budget)
        turned = allocate(
            GROUND, LOSSES, budget, lambda place: 100.0 if place == (3, "value") else 1.0
        )
        assert plain is not None
        assert turned is not None
        assert turned[3].value.bits == 4
        assert plain[3].value.bits < 4

    def test_no_more_outliers_are_counted_than_a_cap_allows(self) -> None:
        capped = parse_spec("nuq3-1%-cap2-sink1")
        most = replace(GROUND, scheme=capped, key_excess=100.0).nbytes(
            dict.fromkeys(LAYERS, capped)
        )
        rows = 1000 - capped.sink_tokens
        table = sum(
            buffer.nbytes
            for layer in LAYERS.values()
            for buffer in layer_buffers(
                capped,
                layer.geometry,
                1,
                1000,
                Outliers(2 * rows, layer.outliers(capped, rows, bound=False).value),
                "float16",
            ).values()
        )
        assert most == table + position_buffer(1, 1000).nbytes

    def test_bytes_are_those_of_the_memory_table(self) -> None:
        specs = dict.fromkeys(LAYERS, SCHEME)
        fixed = GROUND.nbytes(specs) - sum(
            GROUND.side_bytes(SCHEME.side(side), (layer, side))
            for layer in LAYERS
            for side in SIDES
        )
        sinks = sum(2 * layer.geometry.elements for layer in LAYERS.values())
        assert fixed == sinks + position_buffer(1, 1000).nbytes


@pytest.fixture(scope="module")
def windows(builtin: LoadedModel) -> Windows:
    text = load_text(None, part="calibration")
    return calibration_windows(text, builtin.tokenizer, samples=4, seq_len=256, seed=0)


@pytest.fixture(scope="module")
def mixed(builtin: LoadedModel, windows: Windows) -> Bundle:
    return calibrate(builtin, windows, [parse_spec("kvq3")])[0]


def with_options(builtin: LoadedModel, windows: Windows, spec: str) -> dict[Place, list[Option]]:
    scheme = parse_spec(spec)
    fitter = observe(builtin, windows, variants(scheme))
    return options(ground_of(builtin, scheme, 8192), fitter, windows.ids.numel())


class TestOptions:
    def test_every_step_costs_more_and_saves_less(
        self, builtin: LoadedModel, windows: Windows
    ) -> None:
        for row in with_options(builtin, windows, "nuq3-1%-pc-comp/nuq3-1%").values():
            slopes = [(b.loss - a.loss) / (b.nbytes - a.nbytes) for a, b in itertools.pairwise(row)]
            assert len(row) > 2
            assert all(slope < 0 for slope in slopes)
            assert slopes == sorted(slopes)

    def test_keys_without_outliers_count_twice_where_outliers_may_be_had(
        self, builtin: LoadedModel, windows: Windows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(allocate_module, "_worthwhile", list)
        scheme = parse_spec("nuq3-1%-sink1-pc")
        fitter = observe(builtin, windows, variants(scheme))
        ground, positions = ground_of(builtin, scheme, 8192), windows.ids.numel()
        for (index, side), row in options(ground, fitter, positions).items():
            for option in row:
                place = scheme.with_side(side, option.quant), side, index
                errors = fitter.predict([place], FITTED)[0]
                plain = allocate_module.loss_of(errors, option.quant.bits, positions)
                is_bare = side == "key" and not option.quant.outlier_fraction
                assert option.loss == pytest.approx(plain * (2 if is_bare else 1))

    @pytest.mark.parametrize("spec", ("nuq3-sink1-pc", "nuq3-sink1-pc-comp/nuq3-sink1-comp"))
    def test_predictions_are_near_what_is_measured(
        self, builtin: LoadedModel, windows: Windows, spec: str
    ) -> None:
        scheme = parse_spec(spec)
        fitter = observe(builtin, windows, [scheme])
        places = [(scheme, side, layer.index) for layer in builtin.seam.packed for side in SIDES]
        predicted = sum(row[7] for row in fitter.predict(places, 8)) / 2 / windows.ids.numel()
        text = load_text(None, part="evaluation")
        judged = evaluation_windows(text, builtin.tokenizer, seq_len=256, windows=6)
        (result,) = evaluate(builtin, judged, calibrate(builtin, windows, [scheme]))
        assert 0.5 < result.kld_mean / predicted < 2.0


class TestMixedBundle:
    def test_it_spends_no_more_than_the_scheme_as_it_stands(
        self, builtin: LoadedModel, mixed: Bundle
    ) -> None:
        uniform = replace(mixed.spec, mixed=False)
        ground = ground_of(builtin, uniform, MIXED_AT)
        most = ground.nbytes(dict.fromkeys(ground.layers, uniform))
        assert most * 0.95 < ground.nbytes(mixed.layer_specs) <= most

    def test_layers_differ_and_are_read_back(self, mixed: Bundle, tmp_path: object) -> None:
        path = f"{tmp_path}/mixed"
        save_bundle(mixed, path)
        loaded = load_bundle(path)
        assert len(set(mixed.layer_specs.values())) > 1
        assert loaded.layer_specs == mixed.layer_specs
        assert loaded.spec == mixed.spec == parse_spec("kvq3")

    def test_equal_inputs_give_equal_bundles(
        self, builtin: LoadedModel, windows: Windows, mixed: Bundle
    ) -> None:
        (again,) = calibrate(builtin, windows, [parse_spec("kvq3")])
        assert again.metadata() == mixed.metadata()
        assert all(torch.equal(t, mixed.tensors()[name]) for name, t in again.tensors().items())

    def test_its_cache_allocates_what_the_table_says(
        self, builtin: LoadedModel, mixed: Bundle, windows: Windows
    ) -> None:
        with attach(builtin.model, mixed) as session, torch.no_grad():
            cache = session.new_cache(mixed)
            builtin.model(windows.ids[:1, :200], past_key_values=cache)
        expected = position_buffer(1, 200).nbytes
        for store in cache.stores:
            outliers = Outliers(*(body.outliers for body in store.bodies))
            spec = mixed.layer_specs[store.layer]
            table = layer_buffers(spec, store.geometry, 1, 200, outliers, "float32")
            expected += sum(buffer.nbytes for buffer in table.values())
        assert cache.nbytes == expected

    def test_decode_exact_equals_decoding_token_by_token(
        self, builtin: LoadedModel, mixed: Bundle
    ) -> None:
        text = load_text(None, part="evaluation")
        judged = evaluation_windows(text, builtin.tokenizer, seq_len=32, windows=2)
        one, by_token = (
            evaluate(builtin, judged, [mixed], protocol=protocol)[0]
            for protocol in ("decode-exact", "true-decode")
        )
        assert one.kld_mean == pytest.approx(by_token.kld_mean, rel=0.05)
        assert one.cache_bytes == by_token.cache_bytes
