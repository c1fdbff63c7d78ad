"""Running a grid: each run is a process of its own with a folder of its own, so that one crash loses one run.

    ROOT/NAME/RUN/seed_S/         the run folder, written by the command
    ROOT/NAME/RUN/seed_S.json     what was run, and how it ended; replaced atomically at the end
    ROOT/NAME/RUN/seed_S.log      what the command printed
    ROOT/NAME/COLUMN.png, table.md, results.json

What is finished is not run again. What was killed or failed begins anew in an empty folder.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from understudy.bench.endstate import Curves, check_tables, end_mean, markdown, read_curve, summarise, without_first
from understudy.bench.grid import Cell, Grid, cells
from understudy.bench.places import Place, plan
from understudy.core.errors import UserError
from understudy.core.files import check_writable, write_json, write_text
from understudy.core.provenance import environment
from understudy.report.plots import curves as draw_curves
from understudy.report.plots import pyplot
from understudy.training.progress import clock
from understudy.training.stops import StopRequest

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
POLL_S, GRACE_S = 0.05, 10.0  # between looks at running processes; from asking one to end to killing it


@contextmanager
def locked(root: Path) -> Iterator[int]:
    """Hold `root` for one ablation. Its runs inherit the lock: while one that outlived its parent still writes, nobody else begins."""
    check_writable(root / ".lock")
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another ablation is at work in {root}, or a run that it left; wait for it, or end it"
            ) from None
        yield file.fileno()


class Running:
    """A cell's process, from start to end."""

    def __init__(self, place: Place, lock: int) -> None:
        self.place, self.began = place, time.monotonic()
        place.folder.parent.mkdir(parents=True, exist_ok=True)
        place.write("unfinished")
        if place.folder.exists():
            shutil.rmtree(place.folder)
        self._log: IO[bytes] = place.log.open("wb")
        # unbuffered: what went wrong is then the last line of the log
        settings = {**os.environ, "PYTHONUNBUFFERED": "1"}
        try:
            self.process = subprocess.Popen(
                place.argv, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, env=settings, pass_fds=[lock]
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise UserError(f"cannot run {place.argv[0]}: {error.strerror}") from None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def end(self, grid: Grid) -> str | None:
        """The process has ended: record how. What went wrong, or None."""
        self._log.close()
        code, says = self.process.returncode, None
        if code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            says = f"{self.place.last_line().removeprefix('error: ')} ({how}; {self.place.log})"
        elif signal := self.place.stopped():
            says = f"stopped by {signal} before its end"
        else:
            try:
                check_tables(self.place.folder, grid)
            except UserError as error:
                says = str(error)
        self.place.write("failed" if says else "finished", seconds=round(self.seconds, 3), error=says)
        return says


def stop_all(running: Sequence[Running]) -> None:
    """End the processes, and wait for them."""
    for one in running:
        one.process.terminate()
    until = time.monotonic() + GRACE_S
    for one in running:
        try:
            one.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()


def run_cells(waiting: Sequence[Place], grid: Grid, lock: int, jobs: int, console: Console) -> dict[str, str]:
    """Run the cells, at most `jobs` at once; what went wrong, by cell. Interrupted, it ends what runs, and keeps what is finished."""
    failed: dict[str, str] = {}
    left, running = list(waiting), list[Running]()
    columns = TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
    with StopRequest() as stop, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(grid.name, total=len(waiting))
        try:
            while left or running:
                while left and len(running) < jobs:
                    place = left.pop(0)
                    place_number = len(waiting) - len(left)
                    console.print(
                        f"[{place_number}/{len(waiting)}] {place.cell.title}: {shlex.join(place.argv)}", **PLAIN
                    )
                    running.append(Running(place, lock))
                time.sleep(POLL_S)
                if stop.reason is not None:
                    raise KeyboardInterrupt
                for one in [r for r in running if r.process.poll() is not None]:
                    running.remove(one)
                    says, title = one.end(grid), one.place.cell.title
                    if says:
                        failed[title] = says
                    console.print(
                        f"{title}: {f'FAILED: {says}' if says else 'finished'} after {clock(one.seconds)}", **PLAIN
                    )
                    bar.advance(task)
        except BaseException:
            stop_all(running)
            console.print("stopped; finished runs are kept, and the same command goes on with the others", **PLAIN)
            raise
    return failed


def dry_run(places: Sequence[Place], console: Console) -> None:
    """Print what would be run, each command under a comment with its cell and state: the output is a shell script."""
    for place in places:
        console.print(f"# {place.cell.title}: {place.state()}\n{shlex.join(place.argv)}", **PLAIN)


def gather(grid: Grid, root: Path) -> tuple[dict[str, dict[int, Path]], dict[str, str], list[str]]:
    """What is finished with the settings of `grid`: run -> seed -> folder. What failed: cell -> why. What is neither."""
    finished: dict[str, dict[int, Path]] = {name: {} for name, _ in grid.variants()}
    failed, missing = dict[str, str](), list[str]()
    for cell in cells(grid):
        place = Place(cell, root)
        state, record = place.state(), place.record()
        if state == "finished":
            finished[cell.name][cell.seed] = place.folder
        elif state == "failed" and record is not None and record["digest"] == cell.digest:
            failed[cell.title] = record["error"]
        else:
            missing.append(cell.title)
    return finished, failed, missing


def report(grid: Grid, root: Path) -> dict[str, Any]:
    """Write curves, table.md and results.json of what is finished; the results."""
    finished, failed, missing = gather(grid, root)
    metrics: dict[str, Any] = {}
    for table in grid.metrics:
        for column in table.y:
            found: Curves = {
                name: {seed: read_curve(folder, table, column) for seed, folder in by_seed.items()}
                for name, by_seed in finished.items()
            }
            drawn = {
                name: [without_first(x, y, table.first) for x, y in by_seed.values()]
                for name, by_seed in found.items()
                if by_seed
            }
            plot = f"{column.replace('/', '_')}.png"
            if drawn:
                draw_curves(root / plot, drawn, table.x, column, f"{grid.name}: {column}", reference=grid.baseline)
            ends = {
                name: {seed: end_mean(x, y, table.last) for seed, (x, y) in by_seed.items()}
                for name, by_seed in found.items()
            }
            metrics[column] = {
                "file": table.file,
                "x": table.x,
                "last": table.last,
                "plot": plot if drawn else None,
                "runs": summarise(ends, grid.baseline),
            }
    results = {
        "grid": grid.model_dump(mode="json"),
        "finished": {name: sorted(by_seed) for name, by_seed in finished.items()},
        "failed": failed,
        "missing": missing,
        "metrics": metrics,
        "env": environment(),
    }
    write_json(root / "results.json", results)
    write_text(root / "table.md", markdown(results))
    return results


def ablate(
    grid: Grid, output_dir: Path, chosen: Sequence[Cell], jobs: int, force: bool, console: Console
) -> tuple[dict[str, Any], dict[str, str]]:
    """Run what of `chosen` is not finished, then report on everything that is: the results, and what failed just now."""
    pyplot()  # what is missing for the plots is said before the runs, not after
    root = output_dir / grid.name
    with locked(root) as lock:
        places = [Place(cell, root) for cell in chosen]
        waiting = plan(places, force)
        if done := len(places) - len(waiting):
            console.print(f"{done} of {len(places)} runs are finished already", **PLAIN)
        failed = run_cells(waiting, grid, lock, jobs, console)
        return report(grid, root), failed
