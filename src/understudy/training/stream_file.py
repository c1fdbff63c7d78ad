"""A file of conversations through the online learner, into a run folder (`understudy train dvi --train-data-path FILE`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from understudy.core.errors import UserError
from understudy.data.conversations import Skipped
from understudy.decoding.acceptance import plain_ms_per_token
from understudy.drafting.protocols import Drafter
from understudy.target.target import Target
from understudy.telemetry.alignment import alignment
from understudy.telemetry.run import RunFolder
from understudy.telemetry.speculation import SpeculationMetrics
from understudy.training.online.learner import OnlineLearner
from understudy.training.rollouts.options import RunOptions
from understudy.training.streaming import PromptRecord, StreamResult, read_prompts, stream, summed

ENDS = 100  # prompts at the beginning and at the end of a file that are compared
UPDATES = (
    "global_step",
    "n",
    "loss",
    "ms",
    "skipped",
    "non_finite",
    "restored",
)  # metrics/updates.csv; then what else there is


def stream_file(
    path: Path,
    target: Target,
    drafter: Drafter,
    folder: RunFolder,
    config: RunOptions,
    *,
    limit: int | None = None,
    skip: int = 0,
    summary_every: int = 100,
    report: Callable[[int, dict[str, float]], None] | None = None,
    stop: Callable[[], str | None] = lambda: None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The prompts `skip`, ..., `skip + limit` of a file through the drafter's own online learner, into a run folder.

    Writes metrics/acceptance.csv, metrics/speed.csv, metrics/updates.csv and telemetry dumps of the phase train; the learner saves where
    its options say. `stop()` gives a reason to end before the next prompt, or None. Returns the run's figures, JSON-ready; `ended` is that
    reason, `num_prompts` if there were `limit` prompts, else `file`. UserError if the file has no prompt after `skip` ones.
    """
    learning = drafter.learning
    if learning is None:
        raise UserError("online learning needs a drafter whose head can learn: use --drafter dvi")
    timed = list(islice(read_prompts(path, target, Skipped()), config.time_prompts))
    plain = plain_ms_per_token(target, timed, config.time_max_new_tokens) if timed else None
    skipped, updates = Skipped(), folder.table("updates", UPDATES)
    learner = None
    if learning.dvi_online or learning.dvi_debug:
        learner = OnlineLearner(drafter, metrics=updates.append, seed=config.seed)
    metrics = SpeculationMetrics(
        folder.path, drafter.steps, every=summary_every, plain_ms_per_token=plain, summary=say,
        learns=learner is not None, report=report
    )  # fmt: skip

    telemetry = alignment(
        config,
        folder.path.resolve().name,
        "train",
        learner.policy if learner is not None else None,
        say,
        folder.telemetry,
    )
    ends = _Ends()
    prompts = _Until(islice(read_prompts(path, target, skipped), skip, None), limit, stop)
    listeners: list[Any] = [metrics, *([telemetry] if telemetry else [])]
    try:
        first, result = list(islice(prompts, 1)), StreamResult()
        if first or prompts.ended == "file":  # a stream without a prompt is an error, one that was stopped is none
            result = stream(
                target,
                drafter,
                chain(first, prompts),
                learner,
                listeners,
                config.max_new_tokens,
                lambda record, _: ends.add(record),
                seed=config.seed,
                keep=False,
            )
    finally:
        for closing in (*listeners, updates, *([learner] if learner else [])):
            closing.close()
    for line in skipped.first[:3]:
        say(f"skipped {line}")
    figures = {
        "ended": prompts.ended,
        **_figures(result, ends),
        "plain_ms_per_token": plain,
        "skipped": skipped.count,
    }
    figures |= {"learner": learner.summary() if learner else None}
    folder.event("end", **figures, first_skipped=skipped.first)
    return figures


class _Until(Iterator[list[int]]):
    """Prompts up to a limit, a reason to stop, or the end of their file, and in `ended` which of them it was."""

    def __init__(self, prompts: Iterator[list[int]], limit: int | None, stop: Callable[[], str | None]) -> None:
        self.ended: str | None = None
        self._prompts, self._left, self._stop = prompts, limit, stop

    def __next__(self) -> list[int]:
        if self.ended is None:
            self.ended = "num_prompts" if self._left == 0 else self._stop()
        if self.ended is None and (prompt := next(self._prompts, None)) is not None:
            self._left = None if self._left is None else self._left - 1
            return prompt
        self.ended = self.ended or "file"
        raise StopIteration


class _Ends:
    """The first and the last `ENDS` records of a stream."""

    def __init__(self) -> None:
        self.first: list[PromptRecord] = []
        self.last: deque[PromptRecord] = deque(maxlen=ENDS)

    def add(self, record: PromptRecord) -> None:
        if len(self.first) < ENDS:
            self.first.append(record)
        self.last.append(record)


def _figures(result: StreamResult, ends: _Ends) -> dict[str, Any]:
    total = result.total
    parts = {name: summed(records) for name, records in (("first", ends.first), ("last", ends.last))}
    return {
        "prompts": total.index,
        "tokens": total.tokens,
        "blocks": total.cycles,
        "tau": total.tau,
        "acceptance_rate": total.accepted / total.drafted if total.drafted else 0.0,
        "acc_1": total.acc_1,
        "tokens_per_s": total.tokens_per_s,
        "share_learning": result.share_learning,
        **{name: {"prompts": r.index, "tau": r.tau, "acc_1": r.acc_1} for name, r in parts.items()},
    }
