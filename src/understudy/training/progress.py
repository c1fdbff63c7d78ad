"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere. Only rank 0 shows anything."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

# name in the log -> (words, format)
SHOWN = {
    "train/loss": ("loss", "{:.4f}"),
    "train/lr": ("lr", "{:.2e}"),
    "train/tau_sim": ("tau_sim", "{:.2f}"),
    "measured/tau": ("tau", "{:.2f}"),
    "perf/tokens_per_s": ("tok/s", "{:,.0f}"),
}


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Bar:
    """Loss, learning rate, simulated and last measured accept length, tokens per second, time left.

    On a terminal a bar that stands still at the bottom; elsewhere one line per `show`. `total` and `start` in steps.
    """

    def __init__(self, total: int, start: int = 0, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, soft_wrap=True)
        self.total, self.start, self.enabled = total, start, enabled
        self._values: dict[str, float] = {}
        self._began = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self.enabled and self.console.is_terminal:
            columns = TextColumn("step {task.completed}/{task.total}"), BarColumn(20), TextColumn("{task.fields[line]}")
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("train", total=self.total, completed=self.start, line="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, step: int) -> None:
        """`step` is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=escape(self._line(step)))

    def show(self, step: int, values: dict[str, float], line: bool = True) -> None:
        """New figures. Those that are not given stay as they were; without a terminal, `line` prints them."""
        self._values |= {name: values[name] for name in SHOWN if name in values}
        if self._bar is not None:
            self.advance(step)
        elif line:
            self.say(f"step {step}/{self.total}  {self._line(step)}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.enabled:
            self.console.print(text, markup=False, highlight=False)

    def _line(self, step: int) -> str:
        parts = [
            f"{word} {form.format(self._values[name])}" for name, (word, form) in SHOWN.items() if name in self._values
        ]
        if step > self.start:
            per_step = (time.monotonic() - self._began) / (step - self.start)
            parts.append(f"eta {clock(per_step * (self.total - step))}")
        return "  ".join(parts)
