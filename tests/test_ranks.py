"""Several processes find what one finds: same bundles, same perplexity, one voice, one failure."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks_worker

from kvqtool.cli.failures import one_voice
from kvqtool.errors import InputError
from kvqtool.models import LoadedModel, rank_device
from kvqtool.ranks import ALONE, Ranks, read_ranks

ROOT = Path(__file__).parents[1]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SUM_ERROR = 1e-12  # of float64 sums of some hundred terms in another order
PROCESSES = 2


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(rank: int, world_size: int, port: str) -> dict[str, str]:
    """Return what torchrun sets."""
    ours = dict(zip(NAMES, map(str, (rank, world_size, rank, world_size)), strict=True))
    rest = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, **rest, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, builtin: LoadedModel) -> Path:
    """What one process and two have found."""
    made, port = tmp_path_factory.mktemp("ranks"), free_port()
    command = [sys.executable, ranks_worker.__file__, str(made)]
    running = [
        subprocess.Popen(command, env=environment(rank, PROCESSES, port), stderr=-1, text=True)
        for rank in range(PROCESSES)
    ]
    ranks_worker.run(builtin, made)
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return made


def found(folder: Path, rank: int, world_size: int) -> Any:
    return json.loads((folder / f"{rank}-of-{world_size}.json").read_text())


@pytest.mark.parametrize("rank", range(PROCESSES))
class TestTwoProcesses:
    def test_sketches_merge_to_the_bit(self, folder: Path, rank: int) -> None:
        merged = found(folder, rank, PROCESSES)["sketches"]
        assert merged["sketch_is_exact"]
        assert merged["own_sketch_is_kept"]

    def test_histograms_merge_within_their_bound(self, folder: Path, rank: int) -> None:
        merged = found(folder, rank, PROCESSES)["sketches"]
        assert merged["counts_are_exact"]
        assert merged["histogram_error"] <= SUM_ERROR

    @pytest.mark.parametrize("number", (0, 1))
    def test_every_process_has_the_bundle_of_one(
        self, folder: Path, rank: int, number: int
    ) -> None:
        one = (folder / f"0-of-1.{number}.safetensors").read_bytes()
        assert (folder / f"{rank}-of-{PROCESSES}.{number}.safetensors").read_bytes() == one

    def test_every_process_has_the_results_of_one(self, folder: Path, rank: int) -> None:
        one, several = (found(folder, *at)["results"] for at in ((0, 1), (rank, PROCESSES)))
        # What a process's own first window shows is that of one process in the first only.
        per_window = {"paper_bytes", "quantized_share", "layers"} if rank else set()
        for row, other in zip(one, several, strict=True):
            assert row.keys() == other.keys()
            for key in row.keys() - per_window:
                assert row[key] == other[key], key

    def test_what_fails_in_one_ends_all(self, folder: Path, rank: int) -> None:
        told = found(folder, rank, PROCESSES)["failures"]
        own = rank == PROCESSES - 1
        known, bug = "a wrong text; name another", "by zero"
        assert told["known"] == f"InputError: {known if own else f'process 1: {known}'}"
        shared_bug = f"RunError: process 1: ZeroDivisionError: {bug}"
        assert told["bug"] == (f"ZeroDivisionError: {bug}" if own else shared_bug)
        assert told["all"] == f"InputError: rank {rank} of all"
        assert told["after"] == "met"


def torchrun(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", PROCESSES)
    port = ("--master-port", free_port())
    words = [sys.executable, *map(str, (*launch, *port, "-m", "kvqtool", *arguments))]
    plain = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=plain, capture_output=True, text=True)


def test_under_torchrun_one_process_speaks_and_writes(tmp_path: Path) -> None:
    spec = ("--spec", "nuq2", "--calibration-samples", 2, "--calibration-seq-len", 32)
    scored = ("--windows", 2, "--seq-len", 32, "-o", "ppl.json", "--json")
    done = torchrun(tmp_path, "ppl", "builtin", *spec, *scored)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["protocol"]["windows"] == 2
    assert (tmp_path / "ppl.json").read_text() == done.stdout
    assert done.stderr.count("model builtin on 2 x cpu, float32") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ppl.json"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "builtin", "--prompt", "a"], "error: generate runs in one process; start"),
        (["ppl", "builtin", "--bogus"], "No such option: --bogus"),
        (
            ["calibrate", "builtin", "-o", "x", "--dataset", "-"],
            "error: standard input reaches one",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_process_complains_and_all_end_alike(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", "kvqtool", *arguments]
    running = [
        subprocess.Popen(command, env=environment(rank, 2, "1"), stderr=-1, stdout=-1, text=True)
        for rank in range(2)
    ]
    (out, err), other = (process.communicate(timeout=60) for process in running)
    assert [process.returncode for process in running] == [2, 2]
    assert out == ""
    assert says in err
    assert other == ("", "")


class TestEnvironment:
    def test_without_torchrun_a_process_is_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        assert read_ranks() is ALONE
        assert ALONE.is_first
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert read_ranks() is ALONE

    def test_what_torchrun_sets_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in zip(NAMES, "3814", strict=True):
            monkeypatch.setenv(name, value)
        assert read_ranks() == Ranks(3, 8, 1, 4)

    @pytest.mark.parametrize(
        "values", [("", "2", "0", "2"), ("2", "2", "0", "2"), ("0", "x", "", "")]
    )
    def test_nonsense_is_refused(
        self, values: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        for name, value in zip(NAMES, values, strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=r"WORLD_SIZE=.*unset WORLD_SIZE"):
            read_ranks()
        with pytest.raises(SystemExit) as stop, one_voice():
            pass
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: RANK=")


def test_shares_are_every_nth_window() -> None:
    shares = [list(Ranks(rank, 3).share(7)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_process_without_a_window_is_refused() -> None:
    with pytest.raises(InputError, match="3 processes cannot share 2 windows; start 2 or fewer"):
        Ranks(0, 3).share(2)


class TestDevice:
    @pytest.fixture(autouse=True)
    def _two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def test_a_process_takes_the_gpu_of_its_local_rank(self) -> None:
        assert rank_device("auto", Ranks(3, 4, 1, 2)) == "cuda:1"
        assert rank_device("cuda", Ranks(3, 4, 1, 2)) == "cuda:1"

    def test_a_choice_that_leaves_no_question_stands(self) -> None:
        assert rank_device("cpu", Ranks(1, 2, 1, 2)) == "cpu"
        assert rank_device("cuda:1", ALONE) == "cuda:1"

    def test_one_gpu_for_all_is_refused(self) -> None:
        with pytest.raises(InputError, match="'cuda:1' is one GPU for 2 processes"):
            rank_device("cuda:1", Ranks(1, 2, 1, 2))

    def test_more_processes_than_gpus_are_refused(self) -> None:
        with pytest.raises(InputError, match="3 processes cannot share 2 GPUs"):
            rank_device("auto", Ranks(0, 3, 0, 3))
