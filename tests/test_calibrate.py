"""Calibration end to end: against NumPy on all states at once, and independent of how text came."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvqtool.bundle import Bundle, save_bundle
from kvqtool.calibrate import calibrate
from kvqtool.capture import KeyStates, Watcher, capture
from kvqtool.compensation import BlockFisher
from kvqtool.data import NO_BOS, Text, Windows
from kvqtool.errors import RunError
from kvqtool.identity import identify
from kvqtool.kmeans import weighted_kmeans
from kvqtool.models import LoadedModel
from kvqtool.probe import probe
from kvqtool.quantiles import BINS
from kvqtool.spec import parse_spec

WINDOWS, TOKENS = 3, 48


class Everything(Watcher):
    """Keeps every window's states and gradients."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}

    def key(self, layer: int, states: KeyStates, gradients: KeyStates | None) -> None:
        assert gradients is not None
        self._keep(layer, "key", states.before_rope, gradients.before_rope)
        self._keep(layer, "after", states.after_rope, gradients.after_rope)

    def value(self, layer: int, states: Tensor, gradients: Tensor | None) -> None:
        assert gradients is not None
        self._keep(layer, "value", states, gradients)

    def _keep(self, layer: int, side: str, states: Tensor, gradients: Tensor) -> None:
        self.kept.setdefault((layer, side), []).append((states.detach(), gradients.detach()))

    def rows(self, layer: int, side: str, sinks: int) -> tuple[Any, Any]:
        """Return all windows' states and gradients as float64, sinks left out."""
        pairs = self.kept[layer, side]
        return tuple(torch.cat([p[i][sinks:] for p in pairs]).double().numpy() for i in (0, 1))


@pytest.fixture(scope="module")
def loaded(tiny_llama: Callable[..., Any], builtin: LoadedModel) -> LoadedModel:
    model = tiny_llama()
    # Embeddings this large let attention matter, as in a trained model.
    model.model.embed_tokens.weight.data *= 20
    identity = identify(model, builtin.tokenizer, name="tiny")
    return LoadedModel(identity, model, builtin.tokenizer, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def windows() -> Windows:
    ids = torch.randint(0, 256, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 7  # one first token, as a BOS
    text = Text("some text", "text", "0123")
    return Windows(ids, torch.ones(WINDOWS, dtype=torch.int64), text, NO_BOS, TOKENS)


@pytest.fixture(scope="module")
def everything(loaded: LoadedModel, windows: Windows) -> Everything:
    watcher = Everything()
    with capture(loaded.model, probe(loaded.model), watcher, gradients=True) as run:
        for ids in windows.ids:
            run.run(ids)
    return watcher


def bundle_of(loaded: LoadedModel, windows: Windows, spec: str) -> Bundle:
    return calibrate(loaded, windows, [parse_spec(spec)])[0]


def thresholds(rows: Any, share: float) -> tuple[Any, Any]:
    return np.quantile(rows, share / 2, axis=0), np.quantile(rows, 1 - share / 2, axis=0)


def fitted(u: Any, weights: Any, kept: Any, count: int) -> Any:
    order = np.argsort(u[kept])
    return weighted_kmeans(u[kept][order][None], weights[kept][order][None], count)[0]


class TestRanges:
    @pytest.mark.parametrize("sinks", (0, 1))
    @pytest.mark.parametrize(("form", "side"), [("", "key"), ("-postrope", "after")])
    def test_thresholds_are_the_quantiles_of_all_keys_but_the_sinks(
        self,
        loaded: LoadedModel,
        windows: Windows,
        everything: Everything,
        sinks: int,
        form: str,
        side: str,
    ) -> None:
        spec = f"int4-4%{form}" + (f"-sink{sinks}" if sinks else "")
        bundle = bundle_of(loaded, windows, spec)
        for layer in (0, 1):
            rows, _ = everything.rows(layer, side, sinks)
            book, slack = bundle.codebooks[layer, "key"], np.ptp(rows, 0) * 2 / BINS + 4e-3
            assert book.lower is not None
            assert book.upper is not None
            low, high = thresholds(rows, 0.04)
            assert (np.abs(book.lower.numpy() - low) <= slack).all()
            assert (np.abs(book.upper.numpy() - high) <= slack).all()

    def test_without_outliers_the_range_is_least_to_greatest(
        self, loaded: LoadedModel, windows: Windows, everything: Everything
    ) -> None:
        book = bundle_of(loaded, windows, "int4").codebooks[1, "key"]
        rows, _ = everything.rows(1, "key", 0)
        assert book.lower is not None
        assert book.upper is not None
        assert book.lower.numpy() == pytest.approx(rows.min(0), rel=2e-3, abs=1e-6)
        assert book.upper.numpy() == pytest.approx(rows.max(0), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("weighting", ("", "-fisher", "-nofisher"))
@pytest.mark.parametrize("sinks", (0, 2))
class TestLevels:
    """The whole of eq. 1 and eq. 7 again, in float64 on all states at once."""

    def weights(self, gradients: Any, scale: Any, weighting: str) -> Any:
        if weighting == "-nofisher":
            return np.ones_like(gradients)
        return gradients**2 * (1.0 if weighting == "-fisher" else scale**2)

    def spec(self, weighting: str, sinks: int) -> str:
        return "nuq2-4%" + (f"-sink{sinks}" if sinks else "") + weighting

    def test_key_levels_are_the_optimum_over_all_keys(
        self,
        loaded: LoadedModel,
        windows: Windows,
        everything: Everything,
        sinks: int,
        weighting: str,
    ) -> None:
        bundle = bundle_of(loaded, windows, self.spec(weighting, sinks))
        for layer in (0, 1):
            book = bundle.codebooks[layer, "key"]
            assert book.lower is not None
            assert book.upper is not None
            rows, gradients = everything.rows(layer, "key", sinks)
            low, high = book.lower.double().numpy(), book.upper.double().numpy()
            scale, u = (high - low) / 2, (rows - (high + low) / 2) / ((high - low) / 2)
            weights = self.weights(gradients, scale, weighting)
            expected = fitted(u, weights, (rows >= low) & (rows <= high), 4)
            assert book.levels.tolist() == pytest.approx(expected.tolist(), abs=4e-3)

    def test_value_levels_are_the_optimum_over_all_values(
        self,
        loaded: LoadedModel,
        windows: Windows,
        everything: Everything,
        sinks: int,
        weighting: str,
    ) -> None:
        bundle = bundle_of(loaded, windows, self.spec(weighting, sinks))
        for layer in (0, 1):
            rows, gradients = everything.rows(layer, "value", sinks)
            inner = np.sort(rows, 1)[:, 1:-1]  # 32 channels at 4 %: one outlier at each end
            low, high = inner[:, :1], inner[:, -1:]
            scale, u = (high - low) / 2, (rows - (high + low) / 2) / ((high - low) / 2)
            weights = self.weights(gradients, np.broadcast_to(scale, u.shape), weighting)
            expected = fitted(u, weights, (rows >= low) & (rows <= high), 4)
            found = bundle.codebooks[layer, "value"].levels
            assert found.tolist() == pytest.approx(expected.tolist(), abs=4e-3)


@pytest.mark.parametrize("side", ("key", "value"))
def test_feedback_is_that_of_all_gradients(
    loaded: LoadedModel, windows: Windows, everything: Everything, side: str
) -> None:
    """Of u, not of x: a gradient times its scale."""
    bundle = bundle_of(loaded, windows, "nuq2-4%-sink2-comp/nuq2-4%-comp")
    for layer, heads in ((0, 2), (1, 2)):
        book = bundle.codebooks[layer, side]
        rows, gradients = everything.rows(layer, side, 2)
        if book.lower is not None and book.upper is not None:
            scale = ((book.upper - book.lower) / 2).double().numpy()[None]
        else:
            inner = np.sort(rows, 1)[:, 1:-1]  # 32 channels at 4 %: one outlier at each end
            scale = (inner[:, -1:] - inner[:, :1]) / 2
        slopes = torch.from_numpy(gradients * scale)
        fisher = BlockFisher(heads, rows.shape[1] // heads, slopes.device)
        fisher.update(slopes)
        feedback, order = fisher.feedback()
        assert book.feedback is not None
        assert book.order is not None
        assert torch.equal(book.order, order)
        assert (book.feedback - feedback).abs().max() < 5e-3 * feedback.abs().max()


def same_books(one: Bundle, two: Bundle, tolerance: float) -> bool:
    named = one.tensors(), two.tensors()
    return named[0].keys() == named[1].keys() and all(
        torch.allclose(t.float(), named[1][n].float(), atol=tolerance) for n, t in named[0].items()
    )


SPECS = (
    "nuq3-2%-sink1",
    "nuq2-qnorm",
    "nuq2-2%-pc",
    "nuq2-pertoken-nofisher",
    "int4-2%",
    "nuq2-2%-pc-comp/nuq3-comp-vrot",
)


class TestReproducible:
    @pytest.mark.parametrize("spec", SPECS)
    def test_the_order_of_windows_does_not_matter(
        self, loaded: LoadedModel, windows: Windows, spec: str
    ) -> None:
        turned = dataclasses.replace(windows, ids=windows.ids.flip(0))
        # Sums of float64 in another order may round levels to the next fp16 number.
        assert same_books(
            bundle_of(loaded, windows, spec), bundle_of(loaded, turned, spec), tolerance=1e-3
        )

    def test_equal_inputs_give_equal_bytes(
        self, loaded: LoadedModel, windows: Windows, tmp_path: Path
    ) -> None:
        for name in ("one", "two"):
            save_bundle(bundle_of(loaded, windows, SPECS[0]), tmp_path / name)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    def test_specs_together_are_those_alone(self, loaded: LoadedModel, windows: Windows) -> None:
        together = calibrate(loaded, windows, [parse_spec(spec) for spec in SPECS])
        assert [str(bundle.spec) for bundle in together] == list(SPECS)
        for bundle in together:
            assert same_books(bundle, bundle_of(loaded, windows, str(bundle.spec)), tolerance=0.0)

    def test_what_is_written_of_a_run_has_no_date(
        self, loaded: LoadedModel, windows: Windows
    ) -> None:
        provenance = calibrate(loaded, windows, [parse_spec("int4")], seed=5)[0].provenance
        assert provenance["dataset"] == "text"
        assert provenance["dataset_sha256"] == "0123"
        assert (provenance["samples"], provenance["seq_len"]) == (WINDOWS, TOKENS)
        assert provenance["seed"] == 5
        assert not {key for key in provenance if "date" in key or "time" in key}


@pytest.mark.parametrize("spec", ("nuq3-2%", "nuq2-2%-pc"))
def test_memory_does_not_grow_with_windows(
    loaded: LoadedModel, windows: Windows, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    from kvqtool import collect, ranges
    from kvqtool.histogram import LevelHistogram
    from kvqtool.quantiles import ChannelQuantiles

    def sizes(count: int) -> Sequence[int]:
        made: list[Any] = []
        for module, kind in ((collect, LevelHistogram), (ranges, ChannelQuantiles)):

            def keep(*args: Any, kind: Any = kind) -> Any:
                made.append(kind(*args))
                return made[-1]

            monkeypatch.setattr(module, kind.__name__, keep)
        bundle_of(loaded, dataclasses.replace(windows, ids=windows.ids[:count]), spec)
        return [
            sum(t.untyped_storage().nbytes() for t in vars(each).values() if isinstance(t, Tensor))
            for each in made
        ]

    assert sizes(3) == sizes(1)
    assert len(sizes(1)) == 6  # key sketches, key and value histograms of two layers


class TestProgress:
    def test_every_window_of_both_passes_is_told(
        self, loaded: LoadedModel, windows: Windows
    ) -> None:
        told: list[tuple[str, int, int]] = []
        calibrate(loaded, windows, [parse_spec("nuq2")], progress=lambda *event: told.append(event))
        for phase in ("sketching key ranges", "measuring sensitivity"):
            done = [event[1] for event in told if event[0] == phase]
            assert done == list(range(WINDOWS + 1))


class TestRefused:
    def test_nan_activations_are_named(
        self, tiny_llama: Callable[..., Any], builtin: LoadedModel, windows: Windows
    ) -> None:
        model = tiny_llama()
        identity = identify(model, builtin.tokenizer, name="tiny")
        broken = LoadedModel(identity, model, builtin.tokenizer, torch.device("cpu"), torch.float32)
        _ = broken.seam
        model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
        with pytest.raises(RunError, match="NaN or infinity; calibrate in float32"):
            bundle_of(broken, windows, "nuq3-2%")
