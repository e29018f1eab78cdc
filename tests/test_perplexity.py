"""What a cache costs: every protocol against a plain loop, every figure against its formula."""

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvqtool.attach import attach
from kvqtool.bundle import Bundle
from kvqtool.data import Windows, evaluation_windows, load_text
from kvqtool.errors import BundleError, InputError, RunError
from kvqtool.models import LoadedModel
from kvqtool.perplexity import PROTOCOLS, PplResult, _batches, evaluate
from kvqtool.ranks import ALONE, Ranks

Array = NDArray[np.float64]
TOKENS = 32
SPECS = (
    "nuq3-1%",
    "nuq2-1%-sink1",
    "nuq4-2%-cap3-sink4-r8",
    "int4-g32-r16",
    "nf4-pertoken-postrope-r100",
    "fp-sink2-r7",
    "nuq2-2%-sink2-r5-pc-comp/nuq3-comp-vrot",
    "kivi3-g16-sink1-r5",
    "had4-g64/tq4-g64",
    "qaq-k0.03-v1-w4-2%-sink1",
    "qaq-k0.03-v1-w5-head-released",
    "qaq-nuq-k0.1-v0.5-w3-1%-sink1-pc-comp/qaq-nuq-k0.1-v0.5-w3-1%-sink1-comp-vrot",
)


@pytest.fixture(scope="module")
def windows(builtin: LoadedModel) -> Windows:
    text = load_text(None, part="evaluation")
    return evaluation_windows(text, builtin.tokenizer, seq_len=TOKENS, windows=3, stride=None)


@pytest.fixture(scope="module")
def measured(
    builtin: LoadedModel, windows: Windows, calibrated: Callable[[str], Bundle]
) -> Callable[[str, str], PplResult]:
    """Return figures of a spec by a protocol over all windows; measured once."""

    @cache
    def measure(spec: str, protocol: str) -> PplResult:
        return evaluate(builtin, windows, [calibrated(spec)], protocol=protocol)[0]

    return measure


def some(windows: Windows, first: int, last: int) -> Windows:
    return dataclasses.replace(
        windows, ids=windows.ids[first:last], scored_from=windows.scored_from[first:last]
    )


@torch.no_grad()
def log_probabilities(
    loaded: LoadedModel, ids: Tensor, bundle: Bundle | None, protocol: str
) -> Array:
    """Return (tokens, vocabulary) float64 by calling the model as a user would."""
    if bundle is None:
        logits = loaded.model(ids[None]).logits[0]
    else:
        steps = {"true-decode": [1] * TOKENS, "prefill-exact": [TOKENS // 2] * 2}[protocol]
        prefill = "exact" if protocol == "prefill-exact" else "decode-exact"
        with attach(loaded.model, bundle) as session:
            cache = session.new_cache(bundle, prefill=prefill)
            parts = [
                loaded.model(part[None], past_key_values=cache).logits[0]
                for part in ids.split(steps)
            ]
        logits = torch.cat(parts)
    return torch.log_softmax(logits.double(), -1).numpy()


@pytest.mark.parametrize("spec", SPECS)
def test_decode_exact_equals_decoding_token_by_token(
    builtin: LoadedModel, windows: Windows, calibrated: Callable[[str], Bundle], spec: str
) -> None:
    """Every query attends to what decoding would have stored at that moment, itself included.

    In float64, for a rounding that moves one key to another level moves the loss by 1e-3.
    """
    model = copy.deepcopy(builtin.model).double()
    exact = dataclasses.replace(builtin, model=model, dtype=torch.float64)
    two = some(windows, 0, 2)
    one, by_token = (
        evaluate(exact, two, [calibrated(spec)], protocol=protocol)[0]
        for protocol in ("decode-exact", "true-decode")
    )
    assert math.log(one.ppl) == pytest.approx(math.log(by_token.ppl), abs=1e-4)
    assert one.kld_mean == pytest.approx(by_token.kld_mean, abs=1e-4)
    assert one.cache_bytes == by_token.cache_bytes


@pytest.mark.parametrize(
    ("spec", "protocol"),
    [
        ("nuq3-1%-r16", "true-decode"),
        ("nuq3-1%-r16", "prefill-exact"),
        ("nuq2-1%-sink1", "prefill-exact"),
    ],
)
def test_figures_are_those_of_a_plain_loop(
    builtin: LoadedModel,
    windows: Windows,
    calibrated: Callable[[str], Bundle],
    measured: Callable[[str, str], PplResult],
    spec: str,
    protocol: str,
) -> None:
    first = 1 if protocol == "true-decode" else TOKENS // 2 + 1
    plain, packed, kld, same = [], [], [], []
    for ids in windows.ids:
        p = log_probabilities(builtin, ids, None, protocol)[first - 1 : -1]
        q = log_probabilities(builtin, ids, calibrated(spec), protocol)[first - 1 : -1]
        target = ids[first:].numpy()
        plain.append(-p[np.arange(len(target)), target])
        packed.append(-q[np.arange(len(target)), target])
        kld.append((np.exp(p) * (p - q)).sum(1))
        same.append(p.argmax(1) == q.argmax(1))
    found = measured(spec, protocol)
    assert found.ppl == pytest.approx(np.exp(np.mean(packed)), rel=2e-4)
    assert found.ppl_baseline == pytest.approx(np.exp(np.mean(plain)), rel=1e-5)
    assert found.ppl_ratio == pytest.approx(found.ppl / found.ppl_baseline)
    assert found.kld_mean == pytest.approx(np.mean(kld), rel=2e-3)
    assert found.kld_p999 == pytest.approx(np.quantile(np.concatenate(kld), 0.999), rel=2e-2)
    assert found.same_top1 == pytest.approx(np.mean(same), abs=2 / np.size(same))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_quantization_off_costs_nothing(
    measured: Callable[[str, str], PplResult], protocol: str
) -> None:
    found = measured("fp", protocol)
    assert found.kld_mean < 1e-6
    assert found.ppl_ratio == pytest.approx(1.0, abs=1e-5)
    assert found.same_top1 == 1.0
    assert found.quantized_share == 0.0


class TestStandardError:
    def test_it_is_that_of_paired_windows(
        self,
        builtin: LoadedModel,
        windows: Windows,
        calibrated: Callable[[str], Bundle],
        measured: Callable[[str, str], PplResult],
    ) -> None:
        """Ratio times s / sqrt(n), s the sample deviation of the windows' loss differences."""
        spec, protocol = "nuq2-1%-sink1", "decode-exact"
        ratios = [
            evaluate(builtin, some(windows, i, i + 1), [calibrated(spec)])[0].ppl_ratio
            for i in range(len(windows.ids))
        ]
        differences = np.log(ratios)
        expected = np.exp(differences.mean()) * differences.std(ddof=1) / np.sqrt(len(ratios))
        found = measured(spec, protocol)
        assert found.ppl_ratio == pytest.approx(np.exp(differences.mean()), rel=1e-6)
        assert found.ppl_ratio_stderr == pytest.approx(expected, rel=1e-5)

    def test_one_window_has_none(
        self, builtin: LoadedModel, windows: Windows, calibrated: Callable[[str], Bundle]
    ) -> None:
        found = evaluate(builtin, some(windows, 0, 1), [calibrated("fp")])[0]
        assert found.ppl_ratio_stderr is None


class TestOverlap:
    def test_only_targets_from_scored_from_on_count(
        self, builtin: LoadedModel, windows: Windows, calibrated: Callable[[str], Bundle]
    ) -> None:
        late = dataclasses.replace(some(windows, 0, 1), scored_from=torch.tensor([26]))
        logs = log_probabilities(builtin, windows.ids[0], None, "")
        target = windows.ids[0, 26:].numpy()
        expected = np.exp(-logs[25:-1][np.arange(len(target)), target].mean())
        found = evaluate(builtin, late, [calibrated("fp")])[0]
        assert found.ppl_baseline == pytest.approx(expected, rel=1e-5)


class TestBatches:
    @staticmethod
    def cut(loaded: LoadedModel, device: str, shape: tuple[int, int], ranks: Ranks) -> list[range]:
        count, tokens = shape
        ids = torch.zeros(count, tokens, dtype=torch.int64)
        windows = Windows(ids, torch.ones(count, dtype=torch.int64), None, 0, "")  # type: ignore[arg-type]
        placed = dataclasses.replace(loaded, device=torch.device(device), ranks=ranks)
        return _batches(placed, windows)

    @pytest.mark.parametrize("processes", (2, 3))
    def test_processes_run_those_of_one(self, builtin: LoadedModel, processes: int) -> None:
        ranks = Ranks(1, processes, 1, processes)
        alone = self.cut(builtin, "cuda", (100, 512), ALONE)
        assert [len(each) for each in alone] == [25, 25, 25, 25]
        assert self.cut(builtin, "cuda", (100, 512), ranks) == alone
        assert [i for each in alone for i in each] == list(range(100))

    def test_fewer_than_processes_are_cut_further(self, builtin: LoadedModel) -> None:
        assert self.cut(builtin, "cuda", (8, 512), ALONE) == [range(8)]
        shared = self.cut(builtin, "cuda", (8, 512), Ranks(1, 3, 1, 3))
        assert [len(each) for each in shared] == [2, 3, 3]

    def test_on_a_cpu_every_window_is_one(self, builtin: LoadedModel) -> None:
        assert self.cut(builtin, "cpu", (3, 512), ALONE) == [range(i, i + 1) for i in range(3)]


def test_fewer_bits_cost_more(measured: Callable[[str, str], PplResult]) -> None:
    costs = [measured(f"nuq{bits}-1%-sink1", "decode-exact").kld_mean for bits in (4, 3, 2)]
    assert costs == sorted(costs)
    assert costs[0] > 1e-4


def test_protocol_says_all_that_a_perplexity_depends_on(
    measured: Callable[[str, str], PplResult], windows: Windows
) -> None:
    facts = measured("fp", "decode-exact").protocol
    assert (facts["name"], facts["seq_len"], facts["windows"]) == ("decode-exact", TOKENS, 3)
    assert facts["dataset_sha256"] == windows.source.sha256
    assert {"stride", "bos", "dataset", "python", "device", "dtype", "versions"} <= facts.keys()


class TestRefused:
    def test_text_it_was_calibrated_on(
        self, builtin: LoadedModel, windows: Windows, calibrated: Callable[[str], Bundle]
    ) -> None:
        text = load_text(None, part="calibration")
        same = dataclasses.replace(windows, source=text)
        with pytest.raises(InputError, match=r"calibrated on this very text .*--allow-calibration"):
            evaluate(builtin, same, [calibrated("nuq3-1%")])

    def test_unless_told_to(
        self, builtin: LoadedModel, windows: Windows, calibrated: Callable[[str], Bundle]
    ) -> None:
        text = load_text(None, part="calibration")
        same = dataclasses.replace(some(windows, 0, 1), source=text)
        found = evaluate(builtin, same, [calibrated("nuq3-1%")], allow_calibration_text=True)
        assert found[0].ppl > 1

    def test_a_bundle_of_another_model(
        self, builtin: LoadedModel, windows: Windows, calibrated: Callable[[str], Bundle]
    ) -> None:
        bundle = calibrated("fp")
        other = dataclasses.replace(bundle, model={**bundle.model, "num_layers": 28})
        with pytest.raises(BundleError, match="num_layers 28"):
            evaluate(builtin, windows, [other])

    def test_an_unknown_protocol(self, builtin: LoadedModel, windows: Windows) -> None:
        with pytest.raises(InputError, match=r"'fast' is unknown; use one of: decode-exact, true"):
            evaluate(builtin, windows, [], protocol="fast")

    @pytest.mark.parametrize("spec", ("fp", "nuq3-1%"))
    @pytest.mark.parametrize("place", ("k_proj", "down_proj"))
    def test_weights_that_are_not_numbers(
        self,
        builtin: LoadedModel,
        windows: Windows,
        calibrated: Callable[[str], Bundle],
        spec: str,
        place: str,
    ) -> None:
        broken = dataclasses.replace(builtin, model=copy.deepcopy(builtin.model))
        _ = broken.seam
        layer: Any = broken.model.model.layers[-1]
        module = layer.self_attn.k_proj if place == "k_proj" else layer.mlp.down_proj
        module.weight.data[3, 3] = float("nan")
        with pytest.raises(RunError, match="NaN"):
            evaluate(broken, some(windows, 0, 1), [calibrated(spec)])


@pytest.mark.parametrize("word", ("token", "shadow"))
@pytest.mark.parametrize("protocol", ("decode-exact", "prefill-exact"))
def test_bits_that_are_decided_step_by_step_are_not_read_at_once(
    builtin: LoadedModel,
    windows: Windows,
    calibrated: Callable[[str], Bundle],
    protocol: str,
    word: str,
) -> None:
    bundle = calibrated(f"qaq-k0.1-v0.5-w5-{word}")
    with pytest.raises(InputError, match="cannot follow; use --protocol true-decode"):
        evaluate(builtin, windows, [bundle], protocol=protocol)
