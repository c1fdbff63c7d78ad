"""Where each run of a grid lives, what is known of it there, and which runs are still to be done."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from understudy.bench.grid import Cell, text_of
from understudy.core.errors import UserError
from understudy.core.files import write_json

State = Literal["new", "unfinished", "failed", "finished", "changed"]
ENDS = ("ended", "reason")  # keys under which commands say how they ended


@dataclass(frozen=True)
class Place:
    """Where one cell lives, and what is known of it there."""

    cell: Cell
    root: Path  # ROOT/NAME

    @property
    def folder(self) -> Path:
        return self.root / self.cell.name / f"seed_{self.cell.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def argv(self) -> list[str]:
        return self.cell.argv(self.folder)

    def record(self) -> dict[str, Any] | None:
        path = self.folder.with_suffix(".json")
        if not path.exists():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is damaged; remove it and {self.folder} to run {self.cell.title} anew") from None
        return record

    def write(self, state: State, **facts: Any) -> None:
        told = {"state": state, "digest": self.cell.digest, "options": dict(self.cell.options), "argv": self.argv}
        write_json(self.folder.with_suffix(".json"), told | facts)

    def state(self) -> State:
        record = self.record()
        if record is None:
            return "new"
        state: State = record["state"]
        if state != "finished":
            return state
        if not self.folder.exists():
            return "new"
        return "finished" if record["digest"] == self.cell.digest else "changed"

    def difference(self) -> str:
        """What was changed since the cell finished."""
        record = self.record()
        assert record is not None
        was, now = record["options"], dict(self.cell.options)
        changed = [
            f"{key} was {json.dumps(was.get(key))}, is {json.dumps(now.get(key))}"
            for key in {**was, **now}
            if text_of(was.get(key)) != text_of(now.get(key))
        ]
        return "; ".join(changed) or "another command"

    def last_line(self) -> str:
        """The last line that the command printed."""
        lines = [line.strip() for line in re.split(r"[\r\n]+", self.log.read_text(encoding="utf-8", errors="replace"))]
        return next((line for line in reversed(lines) if line), "it printed nothing")

    def stopped(self) -> str | None:
        """The signal at which the command stopped early and in good order, as its last line says (`ENDS`); None = it did not."""
        try:
            told = json.loads(self.last_line())
        except ValueError:
            return None  # no JSON: the command says nothing of how it ended
        how = [told.get(key) for key in ENDS] if isinstance(told, dict) else []
        return next((word for word in how if isinstance(word, str) and word.startswith("SIG")), None)


def plan(places: Sequence[Place], force: bool = False) -> list[Place]:
    """The cells that have to be run. A finished one whose settings have changed is a UserError, unless `force` runs it anew."""
    waiting = []
    for place in places:
        state = place.state()
        if state == "changed" and not force:
            raise UserError(
                f"{place.cell.title} is finished with other settings ({place.difference()}): choose another --output-dir,"
                " or run it anew with --force"
            )
        if state == "new" and place.folder.exists() and any(place.folder.iterdir()):
            raise UserError(f"{place.folder} is no run of an ablation: move it, or choose another --output-dir")
        if state != "finished":
            waiting.append(place)
    return waiting
