"""Texts and windows: which tokens calibration sees and evaluation scores."""

import hashlib
import io
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvqtool import data
from kvqtool.data import Text, calibration_windows, evaluation_windows, load_text
from kvqtool.errors import InputError
from kvqtool.models import LoadedModel


class CountingTokenizer:
    """Turn a text into the numbers 1, 2, 3, ... one a character; 0 opens a text if asked to."""

    def __init__(self, opens: bool = False) -> None:
        self.opens = opens

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        opening = [0] if self.opens and add_special_tokens else []
        return {"input_ids": opening + list(range(1, len(text) + 1))}


def text_of(length: int) -> Text:
    return Text("x" * length, "some text", "")


def evaluate(length: int, **options: Any) -> data.Windows:
    tokenizer: Any = CountingTokenizer()
    return evaluation_windows(text_of(length), tokenizer, **options)


def calibrate(length: int, **options: Any) -> data.Windows:
    tokenizer: Any = CountingTokenizer()
    return calibration_windows(text_of(length), tokenizer, **options)


class TestBuiltinText:
    def test_halves_are_disjoint_and_together_everything(self) -> None:
        from pydoc_data.topics import topics

        halves = [load_text(None, part=part).text for part in data.PARTS]
        assert sum(len(half) for half in halves) == sum(map(len, topics.values())) + 2 * (
            len(topics) - 2
        )
        assert all((t in halves[0]) != (t in halves[1]) for t in topics.values() if len(t) > 500)

    @pytest.mark.parametrize("part", data.PARTS)
    def test_it_says_what_it_is(self, part: str) -> None:
        text = load_text(None, part=part)
        assert text.name == f"builtin:{part}"
        assert text.python == platform.python_version()
        assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()

    def test_a_half_can_be_named(self) -> None:
        named = load_text("builtin:calibration", part="evaluation")
        assert named == load_text("builtin", part="calibration")

    def test_unknown_part_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"'test' is unknown; use calibration or evaluation"):
            load_text(None, part="test")

    @pytest.mark.parametrize("part", data.PARTS)
    def test_both_halves_hold_the_default_windows(self, builtin: LoadedModel, part: str) -> None:
        text = load_text(None, part=part)
        windows = evaluation_windows(text, builtin.tokenizer, seq_len=2048)
        assert len(windows.ids) >= 16


class TestFiles:
    def test_plain_text_keeps_its_newlines(self, tmp_path: Path) -> None:
        path = tmp_path / "novel.txt"
        path.write_bytes("one\r\ntwo\n\n é\n".encode())
        text = load_text(str(path), part="calibration")
        assert text.text == "one\r\ntwo\n\n é\n"
        assert text.name == str(path)
        assert text.python is None

    def test_standard_input_is_read_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\r\nb")))
        text = load_text("-", part="evaluation")
        assert (text.text, text.name) == ("a\r\nb", "-")

    @pytest.mark.parametrize("content", ["", " \n\n"])
    def test_empty_text_is_refused(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "empty.txt"
        path.write_text(content)
        with pytest.raises(InputError, match=r"empty\.txt' holds no text; name another"):
            load_text(str(path), part="calibration")

    def test_other_encodings_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.txt"
        path.write_bytes("é".encode("latin-1"))
        with pytest.raises(InputError, match=r"not UTF-8 at byte 0; convert"):
            load_text(str(path), part="calibration")

    def test_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"is a folder; name a file"):
            load_text(str(tmp_path), part="calibration")

    @pytest.mark.parametrize(
        "name",
        ["nothing.txt", "./nothing", "/nowhere/text", "texts/novel.txt", "a/b/c", "wikitext"],
    )
    def test_missing_file_is_not_looked_for_on_the_hub(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data, "read_hub", lambda *_: pytest.fail("asked the hub"))
        with pytest.raises(InputError, match=r"no such file; name a file, -, or a hub data set"):
            load_text(name, part="calibration")

    def test_hub_name_gives_config_and_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data, "read_hub", lambda *asked: repr(asked))
        text = load_text("me/set:raw@train[:1%]", part="evaluation", text_column="body")
        assert text.text == "('me/set', 'raw', 'train[:1%]', 'body')"
        assert text.name == "me/set:raw@train[:1%]"
        assert load_text("me/set", part="calibration").text == "('me/set', None, 'train', 'text')"
        assert load_text("me/set", part="evaluation").text == "('me/set', None, 'test', 'text')"


class TestEvaluationWindows:
    def test_windows_follow_each_other_and_the_tail_is_dropped(self) -> None:
        windows = evaluate(10, seq_len=4)
        assert windows.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
        assert windows.scored_from.tolist() == [1, 1]
        assert windows.stride == 4
        assert windows.ids.dtype == windows.scored_from.dtype == torch.int64

    @pytest.mark.parametrize("stride", [1, 2, 3, 4])
    @pytest.mark.parametrize("length", [4, 7, 10, 23])
    def test_overlapping_windows_score_each_token_once(self, length: int, stride: int) -> None:
        windows = evaluate(length, seq_len=4, stride=stride)
        scored = [
            token
            for row, start in zip(windows.ids.tolist(), windows.scored_from.tolist(), strict=True)
            for token in row[start:]
        ]
        assert len(scored) == len(set(scored))
        if stride < 4:
            assert scored == list(range(2, windows.ids.max().item() + 1))

    def test_first_windows_only(self) -> None:
        assert evaluate(100, seq_len=4, windows=3).ids[-1].tolist() == [9, 10, 11, 12]

    @pytest.mark.parametrize("windows", [0, -1, 26])
    def test_more_windows_than_there_are_is_an_error(self, windows: int) -> None:
        with pytest.raises(InputError, match=rf"{windows} windows.*has 25 of 4.*--windows 1 to 25"):
            evaluate(100, seq_len=4, windows=windows)

    @pytest.mark.parametrize("stride", [0, 5])
    def test_stride_outside_the_window_is_an_error(self, stride: int) -> None:
        with pytest.raises(InputError, match=rf"stride {stride} is not in 1\.\.4"):
            evaluate(100, seq_len=4, stride=stride)

    def test_text_shorter_than_a_window_names_both_lengths(self) -> None:
        with pytest.raises(InputError, match=r"has 9 tokens, a window needs 10; use --seq-len 9"):
            evaluate(9, seq_len=10)

    def test_one_token_predicts_nothing(self) -> None:
        with pytest.raises(InputError, match=r"--seq-len 2 or more"):
            evaluate(9, seq_len=1)

    def test_the_rows_do_not_share_memory(self) -> None:
        windows = evaluate(10, seq_len=4, stride=1)
        windows.ids[0, 1] = 99
        assert windows.ids[1, 0] == 2


class TestCalibrationWindows:
    def test_the_seed_decides_the_places(self) -> None:
        first, same, other = (
            calibrate(1000, samples=8, seq_len=10, seed=seed).ids for seed in (0, 0, 1)
        )
        assert first.equal(same)
        assert not first.equal(other)

    def test_global_randomness_is_untouched(self) -> None:
        before = torch.get_rng_state()
        calibrate(1000, samples=8, seq_len=10, seed=0)
        assert torch.get_rng_state().equal(before)

    def test_each_window_is_a_piece_of_the_text(self) -> None:
        windows = calibrate(50, samples=200, seq_len=10, seed=0)
        assert windows.ids.shape == (200, 10)
        assert (windows.ids.diff(dim=1) == 1).all()
        assert windows.ids[:, 0].unique().tolist() == list(range(1, 42))
        assert windows.scored_from.tolist() == [1] * 200

    def test_a_text_of_one_window_has_one_place(self) -> None:
        assert calibrate(10, samples=2, seq_len=10, seed=0).ids[:, 0].tolist() == [1, 1]

    def test_no_samples_is_an_error(self) -> None:
        with pytest.raises(InputError, match=r"0 samples.*--samples 1 or more"):
            calibrate(50, samples=0, seq_len=10, seed=0)


class TestOpening:
    @pytest.mark.parametrize(("opens", "says"), [(True, data.ONE_BOS), (False, data.NO_BOS)])
    def test_only_the_text_is_opened_not_each_window(self, opens: bool, says: str) -> None:
        tokenizer: Any = CountingTokenizer(opens=opens)
        windows = evaluation_windows(text_of(12), tokenizer, seq_len=4)
        assert windows.bos == says
        assert (windows.ids == 0).sum() == int(opens)

    def test_the_builtin_tokenizer_opens_a_text(self, builtin: LoadedModel) -> None:
        windows = evaluation_windows(text_of(100), builtin.tokenizer, seq_len=4)
        assert windows.bos == data.ONE_BOS
        assert windows.ids[0, 0] == builtin.tokenizer.bos_token_id

    def test_a_long_text_warns_nobody(
        self, builtin: LoadedModel, capfd: pytest.CaptureFixture[str]
    ) -> None:
        evaluation_windows(text_of(100_000), builtin.tokenizer, seq_len=4, windows=1)
        assert capfd.readouterr() == ("", "")
