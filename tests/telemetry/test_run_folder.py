"""The run folder: what it holds, whom it refuses, and that a kill at any moment leaves files that read."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.core.config import Config, option
from understudy.core.errors import UserError
from understudy.telemetry.run import RunFolder, Table, read_events, read_table


class Settings(Config):
    """A config with the kinds of values that configs have."""

    rate: float = option(5e-5, "rate")
    save: Path | None = option(None, "folder")
    kind: Literal["a", "b"] = option("a", "kind")
    names: list[str] = option(["x", "ÿ"], "names")


def test_a_run_is_described_by_its_folder(tmp_path):
    run = RunFolder(tmp_path / "deep" / "run")
    assert not run.resumed
    run.begin(Settings(save=Path("out")), seed=7)
    run.event("eval", step=3, tau=2.5, broken=math.nan, note="ü\u2028")
    run.close()
    assert yaml.safe_load((run.path / "run.yaml").read_text()) == {
        "rate": 5e-5, "save": "out", "kind": "a", "names": ["x", "ÿ"],
    }  # fmt: skip
    assert Settings(**run.config()) == Settings(save=Path("out"))
    environment = json.loads((run.path / "env.json").read_text())
    assert environment["seed"] == 7
    assert {"argv", "git", "versions"} <= set(environment)
    first, second = run.events()
    assert first["event"] == "begin"
    assert second == {
        "time": second["time"],
        "event": "eval",
        "step": 3,
        "tau": 2.5,
        "broken": "nan",
        "note": "ü\u2028",
    }
    assert (run.metrics, run.telemetry, run.checkpoints) == tuple(
        run.path / name for name in ("metrics", "telemetry", "checkpoints")
    )
    assert sorted(path.name for path in run.path.iterdir()) == ["env.json", "events.jsonl", "run.yaml"]


def test_a_folder_with_content_is_refused_unless_it_is_resumed(tmp_path):
    run = RunFolder(tmp_path / "run", resume=True)  # nothing there to resume: a new run
    assert not run.resumed
    run.begin(Settings(), seed=1)
    run.close()
    with pytest.raises(UserError, match="holds a run: resume it"):
        RunFolder(tmp_path / "run")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(UserError, match="holds no run"):
            RunFolder(tmp_path / "foreign", resume)
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / ".run.yaml.x1").write_text("half")  # what a killed process leaves of an atomic write
    RunFolder(tmp_path / "fresh")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunFolder(tmp_path / "file" / "run")


def test_resuming_keeps_where_it_began_and_says_what_changed(tmp_path):
    first = RunFolder(tmp_path)
    first.begin(Settings(), seed=1)
    first.close()
    began = (tmp_path / "env.json").read_text()
    again = RunFolder(tmp_path, resume=True)
    assert again.resumed
    again.begin(Settings(rate=1e-4), seed=2)
    again.close()
    assert (tmp_path / "env.json").read_text() == began
    assert again.config()["rate"] == 1e-4
    resumed = again.events()[-1]
    assert (resumed["event"], resumed["changed"]) == ("resume", {"rate": [5e-5, 1e-4]})
    assert resumed["environment"]["seed"] == 2


def test_a_run_that_was_killed_before_it_said_where_it_runs_says_so_when_resumed(tmp_path):
    run = RunFolder(tmp_path)
    run.begin(Settings(), seed=1)
    run.close()
    for name in ("env.json", "events.jsonl"):
        (tmp_path / name).unlink()
    again = RunFolder(tmp_path, resume=True)
    again.begin(Settings(), seed=2)
    again.close()
    assert json.loads((tmp_path / "env.json").read_text())["seed"] == 2
    assert [event["event"] for event in again.events()] == ["resume"]


def test_a_torn_event_is_skipped_and_then_cut_off(tmp_path):
    run = RunFolder(tmp_path)
    run.event("one")
    run.close()
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "tw\xc3')
    assert [e["event"] for e in read_events(path)] == ["one"]
    run.event("three")
    run.close()
    assert [e["event"] for e in read_events(path)] == ["one", "three"]
    path.write_text(path.read_text() + "what\n")
    with pytest.raises(UserError, match="line 3"):
        read_events(path)
    assert read_events(tmp_path / "none.jsonl") == []


CELLS = st.one_of(
    st.none(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="ascii", categories=["L"]), min_size=4).map(lambda text: f'"{text}", x'),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=8), cut=st.integers(0, 400), data=st.data())
def test_a_table_cut_anywhere_reads_and_goes_on(tmp_path_factory, rows, cut, data):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    table = Table(path, ["step", "a", "b"])
    for step, (a, b) in enumerate(rows, 1):
        table.append({"step": step, "a": a, "b": b})
    table.close()
    want = [{"step": s, "a": a, "b": b} for s, (a, b) in enumerate(rows, 1)]

    def same(got, expected):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert one.keys() == other.keys()
            for key, value in other.items():
                assert one[key] == (pytest.approx(value, rel=1e-8) if isinstance(value, float) else value)

    same(read_table(path), want)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    lines = whole[:cut].count(b"\n")
    same(read_table(path), want[: max(lines - 1, 0)])
    table = Table(path, ["step", "a", "b"])
    table.append({"step": 99, "b": 0.5})
    table.close()
    same(read_table(path), [*want[: max(lines - 1, 0)], {"step": 99, "a": None, "b": 0.5}])
    assert path.read_text().count("step,a,b") == 1


def test_a_table_goes_back_to_the_step_that_a_run_resumes_at(tmp_path):
    path = tmp_path / "t.csv"
    table = Table(path, ["step", "loss"])
    for step in range(1, 6):
        table.append({"step": step, "loss": step / 10})
    table.close()
    table = Table(path, ["step", "loss"], upto=3)
    table.append({"step": 4, "loss": 9.0})
    table.close()
    assert [(row["step"], row["loss"]) for row in read_table(path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]


def test_columns_may_be_added_by_a_row_or_when_it_is_opened_again(tmp_path):
    path = tmp_path / "t.csv"
    table = Table(path, ["step", "loss"])
    table.append({"step": 1, "loss": 0.5})
    table.append({"step": 2, "tau": 2.0})
    table.close()
    table = Table(path, ["step", "acc", "tau"])
    table.append({"step": 3, "acc": 1.0, "tau": 3.0})
    table.close()
    assert path.read_text().splitlines() == ["step,loss,tau,acc", "1,0.5,,", "2,,2,", "3,,3,1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv"]


def test_a_row_is_on_disk_when_append_returns(tmp_path):
    table = RunFolder(tmp_path).table("loss", ["step", "loss"])
    for step in range(3):
        table.append({"step": step, "loss": math.inf})
        assert [row["step"] for row in read_table(tmp_path / "metrics" / "loss.csv")] == list(range(step + 1))
    table.close()


def test_a_table_of_other_shape_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(UserError, match=r"t\.csv, line 3: 1 cells under 2 columns"):
        read_table(tmp_path / "t.csv")
    assert read_table(tmp_path / "none.csv") == []


WRITER = """
import sys
from understudy.telemetry.run import RunFolder
run = RunFolder(sys.argv[1], resume=True)
table = run.table("speed", ["step", "wall_ms"])
print("ready", flush=True)
step = 0
while True:
    step += 1
    table.append({"step": step, "wall_ms": step / 7, **({"late": 1.0} if step == 50 else {})})
    run.event("step", step=step, note="x" * 500)
"""


@pytest.mark.slow
def test_kill_at_any_moment_leaves_files_that_read_and_go_on(tmp_path):
    for wait in (0.0, 0.01, 0.05, 0.2):
        folder = tmp_path / str(wait)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, env=env)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(wait)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        rows, events = read_table(folder / "metrics" / "speed.csv"), read_events(folder / "events.jsonl")
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert [event["step"] for event in events] == list(range(1, len(events) + 1))
        assert abs(len(rows) - len(events)) <= 1
        table = Table(folder / "metrics" / "speed.csv", ["step", "wall_ms"])
        table.append({"step": 0, "wall_ms": 1})
        table.close()
        assert len(read_table(folder / "metrics" / "speed.csv")) == len(rows) + 1
