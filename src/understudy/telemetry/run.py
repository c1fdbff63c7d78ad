"""The folder of one run: what was asked for, where it ran, what happened. Whole at any moment, whenever the process is killed.

    run.yaml       the resolved config                     env.json       argv, versions, git, machine, seed
    events.jsonl   one JSON object per line                metrics/*.csv  tables that grow line by line
    telemetry/     alignment dumps                         checkpoints/   what training saves

Files that are written at once are replaced atomically. Files that grow are written line by line: a line that a killed process left
torn is no line. Readers skip it, and whoever appends next cuts it off.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from understudy.core.config import Config
from understudy.core.errors import UserError
from understudy.core.files import check_writable, replacing, write_json, write_text
from understudy.core.provenance import environment

Cell: TypeAlias = float | int | str | None


def plain(value: Any) -> Any:
    """A value as JSON knows it. Numbers that are none become the words `nan`, `inf` and `-inf`: JSON has no other way to say them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _whole_lines(path: Path) -> str:
    """The text up to the last line end."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].decode("utf-8")


def _cut_torn_line(path: Path) -> None:
    """Drop what follows the last line end, in place."""
    with path.open("r+b") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position:
            step = min(position, 1 << 16)
            position -= step
            file.seek(position)
            found = file.read(step).rfind(b"\n")
            if found >= 0:
                position += found + 1
                break
        if position != end:
            file.truncate(position)


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of an `events.jsonl`, oldest first. A file that is not there has none; a line that is no event is a UserError."""
    path, events = Path(path), []
    if not path.exists():
        return []
    for number, line in enumerate(_whole_lines(path).split("\n")[:-1], 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number}: no event (not JSON); remove the line") from None
    return events


def _cell(text: str) -> Cell:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def _text(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:.9g}"
    text = "" if value is None else str(value)
    assert "\n" not in text and "\r" not in text, "a table's row is one line"
    return text


def _line(cells: Iterable[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


def read_table(path: str | Path) -> list[dict[str, Cell]]:
    """The rows of a CSV table: numbers as numbers, empty cells as None. A table that is not there has no rows."""
    path = Path(path)
    if not path.exists():
        return []
    header, *rows = list(csv.reader(io.StringIO(_whole_lines(path)))) or [[]]
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UserError(f"{path}, line {number}: {len(row)} cells under {len(header)} columns; remove the line")
    return [dict(zip(header, map(_cell, row), strict=True)) for row in rows]


class Table:
    """A CSV file that grows by one flushed line per row.

    Opening one that exists goes on with it: the header is written once, columns that are new come last (older rows are empty
    there), and with `upto` the rows whose first cell is larger go: a run that resumes at a checkpoint does those steps again.
    A row may bring columns of its own too; the file is then rewritten, atomically.
    """

    def __init__(self, path: str | Path, columns: Iterable[str], upto: int | None = None) -> None:
        self.path, self.columns = Path(path), list(columns)
        assert self.columns and len(set(self.columns)) == len(self.columns)
        check_writable(path)
        if self.path.exists():
            _cut_torn_line(self.path)
            self._adopt(upto)
        self._open()
        if not self._file.tell():
            self._write(self.columns)

    def _open(self) -> None:
        try:
            self._file = self.path.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None

    def _write(self, cells: Iterable[str]) -> None:
        self._file.write(_line(cells))
        self._file.flush()

    def _adopt(self, upto: int | None) -> None:
        rows = list(csv.reader(io.StringIO(_whole_lines(self.path))))
        if not rows:
            return
        header, rows = rows[0], rows[1:]
        kept = [row for row in rows if upto is None or float(row[0]) <= upto]
        self.columns = [*header, *(column for column in self.columns if column not in header)]
        if len(kept) < len(rows) or len(self.columns) > len(header):
            self._rewrite(kept)

    def _rewrite(self, rows: Iterable[list[str]]) -> None:
        width = len(self.columns)
        lines = [_line([*row, *[""] * (width - len(row))]) for row in [self.columns, *rows]]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def append(self, row: Mapping[str, Cell]) -> None:
        """One row. What it does not name is empty."""
        if new := [column for column in row if column not in self.columns]:
            self.close()
            self.columns += new
            self._rewrite(list(csv.reader(io.StringIO(_whole_lines(self.path))))[1:])
            self._open()
        self._write([_text(row.get(column)) for column in self.columns])

    def close(self) -> None:
        self._file.close()


class RunFolder:
    """A run's folder. A folder with content is refused, unless `resume` says to go on with the run that is in it.

    Files whose names begin with a dot are no content. `resumed` says whether there was a run to go on with.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path = Path(path)
        check_writable(self.path / "run.yaml")
        content = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")]
        self.resumed = (self.path / "run.yaml").exists()
        if self.resumed and not resume:
            raise UserError(f"{self.path} holds a run: resume it, or choose another folder")
        if content and not self.resumed:
            raise UserError(f"{self.path} is not empty and holds no run: choose another folder")
        self._events: io.TextIOWrapper | None = None

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    @property
    def telemetry(self) -> Path:
        return self.path / "telemetry"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def begin(self, config: Config | Mapping[str, Any], seed: int | None = None) -> None:
        """Write `run.yaml` and `env.json`, and the event `begin`.

        When resumed, `env.json` stays that of the beginning (or, where that was killed before it wrote one, is that of now), `run.yaml`
        becomes the config now in force, and the event `resume` holds the present environment and every setting that changed, as
        [before, now].
        """
        now = config.model_dump(mode="json") if isinstance(config, Config) else plain(config)
        was = self.config() if self.resumed else {}
        write_text(self.path / "run.yaml", yaml.safe_dump(now, sort_keys=False, allow_unicode=True))
        if not (self.path / "env.json").exists():
            write_json(self.path / "env.json", environment(seed))
        if not self.resumed:
            self.event("begin")
            return
        changed = {key: [was.get(key), now.get(key)] for key in {**was, **now} if was.get(key) != now.get(key)}
        self.event("resume", environment=environment(seed), changed=changed)

    def config(self) -> dict[str, Any]:
        """What `run.yaml` says."""
        loaded = yaml.safe_load((self.path / "run.yaml").read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise UserError(f"{self.path / 'run.yaml'} is no run's config")
        return loaded

    def event(self, event: str, step: int | None = None, **facts: Any) -> None:
        """Append `{"time": UTC, "event": ..., "step": ..., **facts}` to `events.jsonl`."""
        if self._events is None:
            path = self.path / "events.jsonl"
            if path.exists():
                _cut_torn_line(path)
            self._events = path.open("a", encoding="utf-8")
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"time": time, "event": event, **({} if step is None else {"step": step}), **facts}
        self._events.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._events.flush()

    def events(self) -> list[dict[str, Any]]:
        return read_events(self.path / "events.jsonl")

    def table(self, name: str, columns: Iterable[str], upto: int | None = None) -> Table:
        """`metrics/NAME.csv`, to append to."""
        return Table(self.metrics / f"{name}.csv", columns, upto)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None
