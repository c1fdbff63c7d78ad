"""Where the figures of an offline run go: `events.jsonl`, `metrics/training.csv`, and the trackers that were asked for."""

from __future__ import annotations

from typing import Any

from understudy.telemetry.run import RunFolder, Table
from understudy.telemetry.trackers import Trackers


class RunLog:
    """One row of `metrics/training.csv` per log line; columns join as they first appear."""

    def __init__(self, folder: RunFolder, trackers: Trackers, upto: int | None = None) -> None:
        """`upto`: the step that a resumed run goes on from; rows beyond it are made again."""
        self.folder, self.trackers, self.upto = folder, trackers, upto
        self._table: Table | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        if self._table is None:
            self._table = self.folder.table("training", ["step", *values], self.upto)
        self._table.append({"step": step, **values})
        self.folder.event("log", step, **values)
        self.trackers.log(step, values)

    def event(self, kind: str, /, **fields: Any) -> None:
        self.folder.event(kind, **fields)

    def close(self) -> None:
        if self._table is not None:
            self._table.close()
        self.trackers.close()
        self.folder.close()
