"""How well drafting does while it runs: two tables that grow, and a line now and then.

A block is one verify pass, so `step` counts verify passes. All shares are over a rolling window of the last blocks:

    acc@k       share of blocks whose first k drafts were all accepted. Of all blocks: one with fewer than k drafts has no first
                k drafts that were accepted, so that 1 + acc@1 + ... + acc@K = tau where nothing was cut at a stop
    block_acc   accepted / drafted, in tokens; empty while nothing was drafted
    tau         committed tokens per block

and of the block itself:

    wall_ms                    the whole block, with what listeners did after it: learning and telemetry cost time, too
    drafter_ms, verifier_ms    its sections draft and verify
    speedup                    committed tokens x plain milliseconds per token / wall_ms; empty when plain was not measured

What listeners cost is known after all of them have run, so a block is written when the next one comes, or at `close()`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from understudy.core.files import check_writable
from understudy.core.records import Cycle, Needs
from understudy.telemetry.run import Table, read_table

SPEED = ("wall_ms", "speedup", "drafter_ms", "verifier_ms")


class Block(NamedTuple):
    """One block in the window; times in seconds."""

    accepted: int
    drafted: int
    committed: int
    wall: float
    listen: float


def share_names(depth: int) -> list[str]:
    return [*(f"acc@{k}" for k in range(1, depth + 1)), "block_acc"]


class Window:
    """The last `size` blocks. Counts are summed as integers, so what leaves takes away exactly what it brought."""

    def __init__(self, size: int, depth: int) -> None:
        self.size = size
        self.blocks: deque[Block] = deque()
        self.reached = [0] * depth  # blocks whose first k drafts were all accepted, k = 1 ... depth
        self.accepted = self.drafted = self.committed = 0

    def add(self, block: Block) -> None:
        self.blocks.append(block)
        self._count(block, 1)
        if len(self.blocks) > self.size:
            self._count(self.blocks.popleft(), -1)

    def _count(self, block: Block, sign: int) -> None:
        for k in range(block.accepted):
            self.reached[k] += sign
        self.accepted += sign * block.accepted
        self.drafted += sign * block.drafted
        self.committed += sign * block.committed

    def shares(self) -> dict[str, float | None]:
        """acc@1 ... acc@K and block_acc, of a window that is not empty."""
        values = [*(count / len(self.blocks) for count in self.reached), None]
        if self.drafted:
            values[-1] = self.accepted / self.drafted
        return dict(zip(share_names(len(self.reached)), values, strict=True))

    def figures(self, plain: float | None, learns: bool) -> dict[str, float]:
        """The shares and what the window's time gives: tau, tokens_per_s, speedup over `plain` ms per token, and listening."""
        wall, listen = sum(b.wall for b in self.blocks), sum(b.listen for b in self.blocks)
        out = {name: value for name, value in self.shares().items() if value is not None}
        out["tau"] = self.committed / len(self.blocks)
        if wall:
            out["tokens_per_s"] = self.committed / wall
            if plain is not None:
                out["speedup"] = self.committed * plain / (1000 * wall)
            if learns:
                out["listening"] = listen / wall
        return out


def describe(step: int, figures: Mapping[str, float]) -> str:
    """The figures as one line."""
    words = {
        "tokens_per_s": "{:.1f} tokens/s",
        "speedup": "speedup {:.2f}x",
        "listening": "learning and telemetry {:.1%} of the time",
    }
    parts = (words.get(name, name + " {:.2f}").format(value) for name, value in figures.items())
    return f"step {step}: {', '.join(parts)}"


def _last_step(path: Path) -> int:
    rows = read_table(path)
    return int(rows[-1]["step"] or 0) if rows else 0


class SpeculationMetrics:
    """A listener that writes `metrics/acceptance.csv` and `metrics/speed.csv` under `folder`, one flushed line per block.

    `max_depth`: K of acc@K, the most drafts in a row. `window`: blocks of the rolling window. `every`: blocks between summaries (0 =
    none), which go to `summary` as a line and to `report` as (step, figures), for trackers. `plain_ms_per_token`: milliseconds of
    plain decoding per token, measured by the caller. `metrics_out`: one CSV file with the columns of both tables, written anew.
    `learns`: summaries give `listening`, the share of time that listeners took: learning and telemetry together, this one included.

    Tables that the folder holds already go on after their last row. With `state` (of `state_dict`) they go on where it was taken:
    later rows go, the window is what it was, and `metrics_out` goes on as well.
    """

    needs = Needs()

    def __init__(
        self,
        folder: Path | None,
        max_depth: int,
        window: int = 100,
        every: int = 100,
        plain_ms_per_token: float | None = None,
        summary: Callable[[str], None] | None = None,
        metrics_out: Path | None = None,
        learns: bool = False,
        report: Callable[[int, dict[str, float]], None] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        assert window >= 1 and max_depth >= 0 and every >= 0
        self.window, self.every, self.plain = Window(window, max_depth), every, plain_ms_per_token
        self.summary, self.report, self.learns = summary, report, learns
        self.step = 0  # verify passes written so far
        acceptance = ["step", *share_names(max_depth)]
        files: dict[Path, list[str]] = {}
        if folder is not None:
            files |= {folder / "metrics/acceptance.csv": acceptance, folder / "metrics/speed.csv": ["step", *SPEED]}
        if state is not None:
            self.step = int(state["step"])
            for block in state["window"]:
                self.window.add(Block(*block))
        elif files:  # a killed process may have written its last block to one table only
            self.step = min(map(_last_step, files))
        if metrics_out is not None:
            files[metrics_out] = [*acceptance, *SPEED]
            if state is None:
                check_writable(metrics_out)
                metrics_out.unlink(missing_ok=True)
        self._tables = [Table(path, columns, self.step) for path, columns in files.items()]
        self._last: tuple[int, int, int, dict[str, float]] | None = None  # accepted, drafted, committed, seconds
        self._said = self.step  # the step of the last summary

    def on_cycle(self, cycle: Cycle) -> None:
        self._write()
        if cycle.index:
            self._last = cycle.accepted, len(cycle.drafted), len(cycle.committed), cycle.seconds

    def close(self) -> None:
        """Write the last block, sum up what no summary has told, and close the files."""
        self._write()
        if self.every and self._said < self.step:
            self._tell()
        for table in self._tables:
            table.close()

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; to be asked for between cycles, when all listeners have run."""
        self._write()
        return {"step": self.step, "window": [list(block) for block in self.window.blocks]}

    def _write(self) -> None:
        """The block that waited: all its listeners have run by now."""
        if self._last is None:
            return
        accepted, drafted, committed, seconds = self._last
        self._last = None
        self.step += 1
        wall = sum(seconds.values())
        self.window.add(Block(accepted, drafted, committed, wall, seconds["listen"]))
        ms = 1000 * wall
        speedup = committed * self.plain / ms if self.plain is not None and ms else None
        times = (ms, speedup, 1000 * seconds["draft"], 1000 * seconds["verify"])
        row = {"step": self.step, **self.window.shares(), **dict(zip(SPEED, times, strict=True))}
        for table in self._tables:
            table.append({name: row[name] for name in table.columns if name in row})
        if self.every and self.step % self.every == 0:
            self._tell()

    def _tell(self) -> None:
        self._said = self.step
        figures = self.window.figures(self.plain, self.learns)
        if self.summary is not None:
            self.summary(describe(self.step, figures))
        if self.report is not None:
            self.report(self.step, figures)
