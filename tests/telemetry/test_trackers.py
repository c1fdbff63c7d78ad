"""Trackers: what is logged can be read back from the files they write; one that is missing or fails costs a warning and no run."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest

from understudy.cli.options import options as flags_of
from understudy.core.errors import UserError
from understudy.telemetry.options import TrackerOptions
from understudy.telemetry.trackers import MISSING, Trackers, markdown_table, trackers

COLUMNS, ROWS = ["step", "predicted", "match"], [[200, 'a|b "q"', True], [200, "two\nlines", False]]


def tell(told: Trackers) -> None:
    """Two steps of everything."""
    told.log(100, {"train/acc_0": 0.25, "loss": 3.0})
    told.log(200, {"train/acc_0": 0.5})
    told.table(200, "predictions/samples_table", COLUMNS, ROWS)
    told.text(200, "predictions/detailed_text", "step 200\n  <predicted>")
    told.close()


# wandb: the records of a .wandb file (LevelDB's log format: blocks of 32 KiB, after a header of 7 bytes)


def chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    at, block = 7, 1 << 15
    while at + 7 <= len(data):
        left = block - at % block
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        yield kind, data[at + 7 : at + 7 + length]
        at += 7 + length


def records(folder: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2 as proto

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found, parts = [], b""
    for kind, payload in chunks(path.read_bytes()):  # 1 = whole, 2 3 4 = first, middle, last
        parts = payload if kind in (1, 2) else parts + payload
        if kind in (1, 4):
            record = proto.Record()
            record.ParseFromString(parts)
            found.append(record)
    return found


def finished(folder: Path) -> list[Any]:
    """The records, once wandb's own process has written the last one: it may do so a moment after `finish` returns."""
    end = time.monotonic() + 20
    while True:
        found = records(folder)
        if (found and found[-1].WhichOneof("record_type") == "exit") or time.monotonic() > end:
            return found
        time.sleep(0.05)


def history(folder: Path) -> dict[int, dict[str, Any]]:
    steps: dict[int, dict[str, Any]] = {}
    for record in finished(folder):
        if record.WhichOneof("record_type") == "history":
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            steps.setdefault(record.history.step.num, {}).update(items)
    return steps


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.slow
def test_wandb_offline_holds_what_was_logged(offline, tmp_path):
    said: list[str] = []
    told = trackers(
        ["wandb"], "eagle3-production", "qwen-run1", tmp_path, {"lr": 1e-4, "taps": [1, 2]}, warn=said.append
    )
    assert told
    tell(told)
    assert said == []
    steps = history(tmp_path)
    assert steps[100]["train/acc_0"] == 0.25
    assert steps[100]["loss"] == 3.0
    assert steps[200]["train/acc_0"] == 0.5
    files = next(tmp_path.glob("wandb/offline-run-*/files"))
    table = json.loads((files / steps[200]["predictions/samples_table.path"]).read_text())
    assert (table["columns"], table["data"]) == (COLUMNS, ROWS)
    page = (files / steps[200]["predictions/detailed_text.path"]).read_text()
    assert page == "<pre>step 200\n  &lt;predicted&gt;</pre>"
    (run,) = [record.run for record in records(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("eagle3-production", "qwen-run1")
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert (config["lr"], config["taps"]) == (1e-4, [1, 2])


@pytest.mark.slow
def test_a_resumed_run_is_the_same_wandb_run(offline, tmp_path):
    for _ in range(2):
        trackers(["wandb"], "p", None, tmp_path, {}).close()
    assert len({path.stem for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 1


def test_wandb_that_does_not_start_is_one_clear_line(monkeypatch, tmp_path):
    class Error(Exception):
        pass

    def init(**_: Any) -> None:
        raise Error("No API key configured.\nUse wandb login.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Error=Error, init=init))
    with pytest.raises(UserError, match=r"^wandb does not start: No API key configured\.; .*WANDB_MODE=offline$"):
        trackers(["wandb"], "p", None, tmp_path, {})
    assert not (tmp_path / "wandb-id.txt").exists()


# tensorboard


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def texts(found: Any, key: str) -> list[tuple[int, str]]:
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(f"{key}/text_summary")]


@pytest.mark.slow
def test_tensorboard_holds_what_was_logged_and_resumes(tmp_path):
    pytest.importorskip("tensorboard")
    tell(trackers(["tensorboard"], "p", None, tmp_path, {"lr": 1e-4}))
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/acc_0")] == [(100, 0.25), (200, 0.5)]
    assert texts(found, "predictions/samples_table") == [(200, markdown_table(COLUMNS, ROWS))]
    assert texts(found, "predictions/detailed_text") == [(200, "    step 200\n      <predicted>")]
    assert texts(found, "config") == [(0, "    lr: 0.0001")]
    again = trackers(["tensorboard"], "p", None, tmp_path, {}, start=100)
    again.log(150, {"train/acc_0": 0.75})
    again.close()
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/acc_0")] == [(100, 0.25), (150, 0.75)]


def test_cells_of_a_markdown_table_stay_in_their_cells():
    assert markdown_table(["a", "b"], [["x|y", "1\n2"], [0.5, True]]) == (
        "| a | b |\n| --- | --- |\n| x\\|y | 1<br>2 |\n| 0.5 | True |"
    )


# trackio


def fake_trackio(calls: list[Any], old: bool = False) -> Any:
    """The part of trackio's interface (0.43) that is used."""

    class Run:
        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            calls.append((step, metrics))

        def finish(self) -> None:
            calls.append("finish")

    def init(
        project: str,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        resume: str = "never",
        embed: bool = True,
    ) -> Run:
        calls.append((project, name, config, resume, embed))
        return Run()

    def old_init(project: str, name: str | None = None, config: dict[str, Any] | None = None) -> Run:
        return Run()

    return SimpleNamespace(
        init=old_init if old else init, Table=lambda columns, data: (columns, data), Markdown=lambda text: text
    )


def test_trackio_is_told(monkeypatch, tmp_path):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "trackio", fake_trackio(calls))
    tell(trackers(["trackio"], "p", "n", tmp_path, {"lr": 1e-4}))
    assert calls == [
        ("p", "n", {"lr": 1e-4}, "allow", False),
        (100, {"train/acc_0": 0.25, "loss": 3.0}),
        (200, {"train/acc_0": 0.5}),
        (200, {"predictions/samples_table": (COLUMNS, ROWS)}),
        (200, {"predictions/detailed_text": "```\nstep 200\n  <predicted>\n```"}),
        "finish",
    ]


def test_an_old_trackio_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trackio", fake_trackio([], old=True))
    with pytest.raises(UserError, match=r"0\.43"):
        trackers(["trackio"], "p", "n", tmp_path, {})


def test_a_run_without_a_name_is_called_like_its_folder(monkeypatch, tmp_path):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "trackio", fake_trackio(calls))
    trackers(["trackio"], "p", None, tmp_path / "k2", {})
    assert calls[0][1] == "k2"


# all of them


@pytest.mark.parametrize(
    ("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")]
)
def test_a_missing_package_is_a_warning(name, module, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    told = trackers([name], "p", None, tmp_path, {})
    assert not told
    tell(told)
    out, err = capsys.readouterr()
    assert (out, err) == ("", MISSING[name] + "\n")
    assert MISSING["wandb"] == "wandb not available, skipping detailed predictions logging"


def test_one_that_fails_is_dropped_and_the_others_go_on(monkeypatch, tmp_path):
    calls: list[Any] = []
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "trackio", fake_trackio(calls))
    told = trackers(["trackio"], "p", "n", tmp_path, {}, warn=said.append)

    class Broken:
        def log(self, step: int, values: Any) -> None:
            raise OSError("disk full")

    told.members = {"wandb": Broken(), **told.members}
    tell(told)
    assert said == ["wandb failed (OSError: disk full); the run goes on without it"]
    assert calls[-1] == "finish"


def test_none_imports_nothing_and_hears_nothing(monkeypatch, tmp_path):
    for module in ("wandb", "torch.utils.tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    said: list[str] = []
    told = trackers(TrackerOptions().report_to, "p", None, tmp_path, {}, warn=said.append)
    assert not told
    tell(told)
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_options():
    assert {flag for option in flags_of(TrackerOptions) for flag in option.opts} == {
        "--report-to", "--wandb-project", "--wandb-run-name", "--config",
    }  # fmt: skip
    assert TrackerOptions(report_to="wandb, tensorboard").report_to == ["wandb", "tensorboard"]
    assert TrackerOptions(report_to=["wandb,trackio", "wandb"]).report_to == ["wandb", "trackio"]
    with pytest.raises(pydantic.ValidationError, match="none goes with no other tracker"):
        TrackerOptions(report_to=["none", "wandb"])
    with pytest.raises(pydantic.ValidationError, match="wandb"):
        TrackerOptions(report_to="comet")
    with pytest.raises(pydantic.ValidationError):
        TrackerOptions(report_to=3)
