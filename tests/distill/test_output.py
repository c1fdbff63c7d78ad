"""The files of a run: whatever moment it is stopped at, going on gives every conversation's rows once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.core.errors import UserError
from understudy.distill import output
from understudy.distill.output import Output, agree


def rows(number: int) -> list[dict]:
    """Between no row and two."""
    return [{"number": number, "part": part, "text": "é" * number} for part in range(number % 3)]


def write(folder: Path, numbers: range) -> None:
    with Output(folder, "train", 0) as opened:
        for number in numbers:
            if number in opened.done:
                continue
            failed = [{"number": number, "reason": "loops"}] if number % 2 else []
            opened.add(number, rows(number), failed, Counter(rows=number % 3, dropped=number % 2))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_run_that_is_killed_goes_on_without_duplicates_or_halves(tmp_path_factory, data):
    """A kill leaves each file with any length that its order of writing allows."""
    folder = tmp_path_factory.mktemp("killed")
    whole = tmp_path_factory.mktemp("whole")
    with patch("os.fsync"):  # a kill takes nothing that was written; only a power cut would
        killed(folder, whole, data)


def killed(folder: Path, whole: Path, data: st.DataObject) -> None:
    write(whole, range(9))
    write(folder, range(data.draw(st.integers(0, 8), "conversations done")))
    done, text, failed = (folder / name for name in ("train-0.done", "train-0.jsonl", "train-0.failed.jsonl"))
    where = data.draw(st.sampled_from(["rows", "failed", "done"]), "killed while writing")
    with text.open("ab") as file:
        half = json.dumps({"number": 8, "text": "é" * 8}).encode() + b"\n"
        file.write(half[: data.draw(st.integers(0, len(half)))] if where == "rows" else half)
    if where != "rows":
        with failed.open("ab") as file:
            half = b'{"number": 8, "reason": "loops"}\n'
            file.write(half[: data.draw(st.integers(0, len(half)))] if where == "failed" else half)
    if where == "done":
        with done.open("ab") as file:
            half = b'{"number": 8, "end": 1, "counts": {"rows": 2}}'  # without its end of line
            file.write(half[: data.draw(st.integers(0, len(half)))])
    write(folder, range(9))
    for name in ("train-0.jsonl", "train-0.failed.jsonl", "train-0.done"):
        assert lines(folder / name) == lines(whole / name), name
    with Output(folder, "train", 0) as opened:
        assert opened.counts == Counter(rows=9, dropped=4) and opened.done == set(range(9))


def test_what_failed_for_a_passing_reason_is_tried_again(tmp_path):
    with Output(tmp_path, "train", 0) as opened:
        opened.failed({"number": 4, "reason": "the server did not answer"})
        opened.add(5, rows(5), [{"number": 5, "reason": "loops"}], Counter())
    assert [line["number"] for line in lines(tmp_path / "train-0.failed.jsonl")] == [4, 5]
    with Output(tmp_path, "train", 0) as opened:
        assert opened.done == {5}
    assert [line["number"] for line in lines(tmp_path / "train-0.failed.jsonl")] == [5]


def test_two_processes_do_not_write_one_file(tmp_path):
    with Output(tmp_path, "train", 0):
        with pytest.raises(UserError, match=r"another process writes .*train-0\.jsonl"):
            Output(tmp_path, "train", 0)
        Output(tmp_path, "train", 1).__exit__()
        Output(tmp_path, "eval", 0).__exit__()


def test_rows_that_are_gone_are_an_error(tmp_path):
    write(tmp_path, range(4))
    (tmp_path / "train-0.jsonl").write_text("")
    with pytest.raises(UserError, match=r"lost rows .* delete .*train-0\.done"):
        Output(tmp_path, "train", 0)


def test_a_run_goes_on_with_its_own_settings_only(tmp_path):
    settings = {"seed": 1, "sampling": {"temperature": 0.5}, "top": (1, 2)}
    assert not agree(tmp_path, "train", settings, {"python": "3"})
    assert agree(tmp_path, "train", settings, {"python": "4"}), "where it runs does not matter"
    with pytest.raises(UserError, match=r"rows of another run \(seed was 1, is 2\)"):
        agree(tmp_path, "train", settings | {"seed": 2}, {})
    assert not agree(tmp_path, "eval", settings | {"seed": 2}, {}), "another split is another run"
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        agree(tmp_path, "train", settings, {})


def test_rows_come_to_disk_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "SYNC", 0.0)
    with Output(tmp_path, "train", 0) as open_output:
        open_output.add(5, rows(5), [], Counter())
        assert lines(tmp_path / "train-0.jsonl") == rows(5) and lines(tmp_path / "train-0.done")[0]["number"] == 5
        monkeypatch.setattr(output, "SYNC", 1000.0)
        open_output.add(8, rows(8), [], Counter())
        assert len(lines(tmp_path / "train-0.done")) == 1, "not said to be done before its rows are on disk"
