"""Experiment trackers behind one small interface. Every package is imported only when its tracker is asked for.

    told = trackers(["wandb", "tensorboard"], "understudy", "run-1", folder, config)
    told.log(200, {"train/acc_0": 0.71})
    told.table(200, "predictions/samples_table", ["step", "predicted"], [[200, "world"]])
    told.text(200, "predictions/detailed_text", "...")
    told.close()

The run's files do not depend on any of this: a tracker whose package is missing, or that fails on the way, costs a warning.
wandb keeps its own modes (`WANDB_MODE=offline`); a run folder that is resumed goes on with its wandb run. trackio needs 0.43 or newer.
"""

from __future__ import annotations

import html
import importlib
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from understudy.core.errors import UserError
from understudy.core.files import check_writable, write_text

MISSING = {
    "wandb": "wandb not available, skipping detailed predictions logging",
    "tensorboard": "tensorboard not available, skipping tensorboard logging",
    "trackio": "trackio not available, skipping trackio logging",
}

Rows = Sequence[Sequence[Any]]


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars by name."""

    def table(self, step: int, key: str, columns: Sequence[str], rows: Rows) -> None: ...

    def text(self, step: int, key: str, text: str) -> None: ...

    def close(self) -> None: ...


def markdown_table(columns: Sequence[str], rows: Rows) -> str:
    """A table of Markdown; bars and line ends inside cells are escaped."""

    def line(cells: Sequence[Any]) -> str:
        plain = (str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>") for cell in cells)
        return f"| {' | '.join(plain)} |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


class WandbTracker:
    """Weights & Biases. The run's id is kept in the run folder, so that a resumed run goes on with the same charts."""

    def __init__(self, project: str, name: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        known = folder / "wandb-id.txt"
        ident = known.read_text(encoding="utf-8").strip() if known.exists() else secrets.token_hex(4)
        try:
            self.run = wandb.init(
                project=project, name=name, dir=str(folder), config=dict(config), id=ident, resume="allow"
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"wandb does not start: {reason}; `wandb login`, or set WANDB_MODE=offline") from None
        write_text(known, ident + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def table(self, step: int, key: str, columns: Sequence[str], rows: Rows) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        self.run.log({key: table}, step=step)

    def text(self, step: int, key: str, text: str) -> None:
        self.run.log({key: self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorboardTracker:
    """Event files in `tensorboard/` of the run folder. `start`: the step that a resumed run goes on from; later ones are hidden."""

    def __init__(self, folder: Path, config: Mapping[str, Any], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        if not start:
            self.text(0, "config", "\n".join(f"{key}: {value}" for key, value in config.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def table(self, step: int, key: str, columns: Sequence[str], rows: Rows) -> None:
        self._add(step, key, markdown_table(columns, rows))

    def text(self, step: int, key: str, text: str) -> None:
        self._add(
            step, key, "\n".join(f"    {line}" for line in text.splitlines())
        )  # indented: Markdown leaves it as it is

    def _add(self, step: int, key: str, text: str) -> None:
        self.writer.add_text(key, text, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class TrackioTracker:
    """trackio, which keeps its runs in its own folder (`TRACKIO_DIR`)."""

    def __init__(self, project: str, name: str | None, config: Mapping[str, Any]) -> None:
        self._trackio = importlib.import_module("trackio")
        try:
            self.run = self._trackio.init(project=project, name=name, config=dict(config), resume="allow", embed=False)
        except TypeError:
            raise UserError("this trackio is too old: install trackio 0.43 or newer") from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def table(self, step: int, key: str, columns: Sequence[str], rows: Rows) -> None:
        self.run.log({key: self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def text(self, step: int, key: str, text: str) -> None:
        self.run.log({key: self._trackio.Markdown(f"```\n{text}\n```")}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackers:
    """All trackers of a run; none is fine. One that fails is dropped with a warning: hours of training outlive a chart."""

    def __init__(self, members: Mapping[str, Tracker], warn: Callable[[str], None]) -> None:
        self.members, self._warn = dict(members), warn

    def __bool__(self) -> bool:
        """Whether anybody listens: then figures are worth making."""
        return bool(self.members)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def table(self, step: int, key: str, columns: Sequence[str], rows: Rows) -> None:
        """`rows` under `columns`; cells are numbers, text or truth values."""
        self._each(lambda tracker: tracker.table(step, key, columns, rows))

    def text(self, step: int, key: str, text: str) -> None:
        self._each(lambda tracker: tracker.text(step, key, text))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self.members.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.members.items()):
            try:
                call(tracker)
            except Exception as error:  # whatever a foreign package raises; the files have it all
                del self.members[name]
                self._warn(f"{name} failed ({type(error).__name__}: {error}); the run goes on without it")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def trackers(
    names: Sequence[str],
    project: str,
    run_name: str | None,
    folder: Path,
    config: Mapping[str, Any],
    start: int = 0,
    warn: Callable[[str], None] = _to_stderr,
) -> Trackers:
    """The trackers of `--report-to`. `run_name` None = the folder's name; `config`: JSON-ready settings; `start`: step resumed from.

    A package that is not installed costs the warning in `MISSING`. A tracker that is there and does not start is a UserError, before
    hours of work.
    """
    check_writable(folder / "tracker")
    run_name = run_name or folder.resolve().name
    makers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: WandbTracker(project, run_name, folder, config),
        "tensorboard": lambda: TensorboardTracker(folder, config, start),
        "trackio": lambda: TrackioTracker(project, run_name, config),
    }
    made: dict[str, Tracker] = {}
    for name in names:
        if name == "none":
            continue
        try:
            made[name] = makers[name]()
        except ImportError:
            warn(MISSING[name])
    return Trackers(made, warn)
