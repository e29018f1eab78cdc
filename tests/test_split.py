"""A model split by head over two processes: each compresses its own heads, and whole heads only."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_ranks import environment, free_port
from torches import needs_split_models

from kvqtool.errors import InputError
from kvqtool.split import explain_split

WORKER = Path(__file__).with_name("split_worker.py")
LOGIT_ERROR = 1e-5  # of float32 sums split in two


@pytest.fixture(scope="module")
def found(tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each process finds."""
    folder, port = tmp_path_factory.mktemp("split"), free_port()
    tiny_llama().save_pretrained(folder / "two")
    tiny_llama(num_key_value_heads=1).save_pretrained(folder / "one")
    running = [
        subprocess.Popen(
            [sys.executable, WORKER, folder, folder / f"{rank}.json"],
            env=environment(rank, 2, port),
            stderr=-1,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@needs_split_models
@pytest.mark.parametrize("rank", (0, 1))
class TestSplitModel:
    def test_a_process_stores_its_own_heads(self, found: list[Any], rank: int) -> None:
        assert found[rank]["kv_heads"] == [1, 1]

    def test_behind_a_cache_it_is_the_whole_model(self, found: list[Any], rank: int) -> None:
        assert found[rank]["error"] <= LOGIT_ERROR

    def test_half_a_head_is_refused(self, found: list[Any], rank: int) -> None:
        says = "2 processes cannot split 1 KV heads; start a number that divides them, "
        assert found[rank]["refusal"].startswith(says)


def test_another_failure_is_left_as_it_is() -> None:
    config = SimpleNamespace(num_key_value_heads=4)
    whole = SimpleNamespace(get_text_config=lambda decoder: config)
    for processes in (None, 2):
        model: Any = SimpleNamespace(config=whole, tp_size=processes)
        with pytest.raises(RuntimeError, match="no memory"), explain_split(model):
            raise RuntimeError("no memory")
    model.tp_size = 3
    with pytest.raises(InputError, match="3 processes cannot split 4"), explain_split(model):
        raise RuntimeError("a shape")
