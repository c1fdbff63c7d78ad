"""Regenerating a data set: which conversations this rank takes, who answers them, and where the rows go."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from understudy.core.errors import UserError
from understudy.data.conversations import Conversation
from understudy.data.encode import Rejected
from understudy.data.stream import Corpus, epoch_order
from understudy.distill.author import Author
from understudy.distill.dialogue import Dialogue, Style
from understudy.distill.output import Output

SAID_EVERY = 30.0  # seconds between two lines where there is no terminal


class Work:
    """The conversations of one rank in a shuffled order, so that a run that is stopped early has a fair sample of the data.

    The order depends on the data alone; of its first `samples` lines rank r takes every `world`-th from r on.
    """

    def __init__(self, paths: list[Path], samples: int | None, rank: int, world: int) -> None:
        self.corpus = Corpus(paths)
        order = epoch_order(len(self.corpus), 0, 0)[:samples]
        self.numbers = [int(number) for number in order[rank::world]]
        if not len(order):
            raise UserError(f"{', '.join(map(str, paths))} holds no conversations")

    def dialogues(self, style: Style, output: Output) -> Iterator[Dialogue]:
        """Those that are not done yet. Lines that are none are told to `output`."""
        for number in self.numbers:
            if number in output.done:
                continue
            try:
                row = self.corpus.row(number)
            except Rejected as why:
                line = {"number": number, "where": self.corpus.where(number), "reason": str(why)}
                output.add(number, [], [line], Counter({"malformed": 1}))
                continue
            if row is None:
                output.add(number, [], [], Counter())
            else:
                assert isinstance(row, Conversation)
                yield Dialogue(row, number, style)


def regenerate(work: Work, author: Author, output: Output, console: Console) -> dict[str, Any]:
    """Answer what is left and write it. Returns the summary: counts of all runs, tokens and seconds of this one."""
    answers = author.answers
    failures = 0
    before, began = len(output.done & set(work.numbers)), time.monotonic()
    with Meter(len(work.numbers), before, console) as meter:
        for dialogue in answers.answer(work.dialogues(author.style, output)):
            if dialogue.failure is not None:
                output.failed(
                    {"id": dialogue.id, "number": dialogue.number, "turn": dialogue.turn, "reason": dialogue.failure}
                )
                failures += 1
                continue
            failed = [{"id": dialogue.id, "number": dialogue.number, **each} for each in dialogue.dropped]
            output.add(
                dialogue.number, ({**row, "made": author.made} for row in dialogue.rows()), failed, dialogue.counts()
            )
            meter.show(len(output.done), answers.written)
    seconds = time.monotonic() - began
    counts = output.counts
    if counts["malformed"] and counts["malformed"] == len(output.done):
        raise UserError(f"no line of the data is a conversation: {output.failed_path} says what is wrong with each")
    return {
        "output": str(output.path),
        "conversations": len(work.numbers),
        "done": len(output.done & set(work.numbers)),
        **{name: counts[name] for name in ("rows", "answers", "cut", "tokens", "supervised", "malformed")},
        "failed": failures,
        "dropped": {
            name.removeprefix("dropped: "): n for name, n in sorted(counts.items()) if name.startswith("dropped: ")
        },
        "new_tokens": answers.written,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(answers.written / seconds, 1) if seconds else 0.0,
    }


class Meter:
    """Conversations done, tokens per second, time left: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, total: int, done: int, console: Console) -> None:
        self.total, self.console = total, console
        self.first = self.done = done
        self._began = self._said = time.monotonic()
        columns = (
            MofNCompleteColumn(),
            BarColumn(20),
            TextColumn("{task.fields[line]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("answers", total=total, completed=done, line="")

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int, tokens: int) -> None:
        now = time.monotonic()
        speed = tokens / max(now - self._began, 1e-9)
        self._bar.update(self._task, completed=done, line=f"{speed:,.0f} tokens/s")
        if self.console.is_terminal or now - self._said < SAID_EVERY:
            return
        self._said = now
        left = (self.total - done) * (now - self._began) / max(done - self.first, 1)
        self.console.print(
            f"{done:,}/{self.total:,} conversations  {speed:,.0f} tokens/s  {left / 60:,.0f} min left", highlight=False
        )
