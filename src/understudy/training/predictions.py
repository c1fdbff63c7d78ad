"""Detailed predictions while a drafter trains: every `--log-samples-interval` steps, on one batch that never changes.

    watchers = prediction_watchers(objective, features, batches, tokenizer, options, ranks, log)
    train(objective, ..., watchers=watchers)

The batch is chosen at the first look and the frozen target's part of it is computed once, so what changes from one look to the next
is the drafter. Any `Objective` with `predictions` can be looked at. In the run folder:

    metrics/predictions.csv            the samples, one row per draft position     (trackers: predictions/samples_table)
    predictions/step_000200.txt        the same for reading                        (trackers: predictions/detailed_text)
    metrics/training.csv               predictions/* and hidden_states/*           (trackers: the same names)
    events.jsonl                       `log` with the scalars, `predictions` with accuracies and verdict
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from understudy.core.files import write_text
from understudy.drafting.objective import Batch, Features, Objective, Predictions
from understudy.telemetry.predictions import (
    COLUMNS,
    Draft,
    Row,
    Sample,
    block,
    rows,
    summary,
    verdict,
    visible,
    visible_token,
)
from understudy.telemetry.run import RunFolder
from understudy.training.distributed import Ranks
from understudy.training.options import TrainOptions
from understudy.training.protocols import FeatureSource, Watcher
from understudy.training.runlog import RunLog

CONTEXT_TOKENS, CONTEXT_CHARS = 64, 80  # most that is decoded, and shown, of the text before a draft
BLIND = (
    "WARNING: no batch at hand has a place where decoding would draft: detailed predictions are not logged;"
    " check --eval-data-path, chat template, --max-length"
)


class Words:
    """Ids as text that shows what it is: whitespace and special tokens too. Without a tokenizer, ids as `<token 17>`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def token(self, token: int) -> str:
        """One token. A part of a character, or an id that the tokenizer does not know, is `<token 17>`."""
        if self.tokenizer is None:
            return f"<token {token}>"
        text = self.tokenizer.decode([token])
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
            text = f" {text}"  # decoding a text drops the space that it begins with (SentencePiece)
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            return f"<token {token}>"
        return visible_token(text)

    def context(self, ids: Sequence[int]) -> str:
        """The end of a text, `...` where it was cut and where the drafts go on."""
        near = list(ids[-CONTEXT_TOKENS:])
        text = "".join(map(self.token, near)) if self.tokenizer is None else self.tokenizer.decode(near)
        cut = len(near) < len(ids) or len(text) > CONTEXT_CHARS
        return ("..." if cut else "") + visible(text[-CONTEXT_CHARS:]) + "..."


def choose(found: Predictions, batch: Batch, count: int) -> list[int]:
    """Columns of `found` to show: at most `count`, in the order of the batch, spread over its documents as evenly as may be.

    Documents in which more draft positions are asked for go first (as a rule all are, unless answers are short); of a document's slots
    only those with the most asked positions compete. The j-th of m samples of the i-th of n documents is the slot at
    (j + (i + 1/2) / n) / m of them, so that together the samples show beginnings, middles and ends of answers: first words are
    much alike in all answers and say little.
    """
    slots = found.slots.cpu()
    starts = slots - batch.positions.cpu().flatten()[slots]  # of the slot's document, in the flattened batch
    documents: dict[int, dict[int, list[int]]] = {}  # start -> positions asked -> columns
    for column, (start, asked) in enumerate(zip(starts.tolist(), found.asked.sum(0).tolist(), strict=True)):
        if asked:
            documents.setdefault(start, {}).setdefault(asked, []).append(column)
    fullest = {start: max(by_asked) for start, by_asked in documents.items()}
    best = sorted(sorted(documents, key=lambda start: -fullest[start])[:count])
    out = []
    for i, start in enumerate(best):
        columns, n = documents[start][fullest[start]], len(best)
        m = min(count // n + (i < count % n), len(columns))
        out += [columns[(2 * n * j + 2 * i + 1) * len(columns) // (2 * n * m)] for j in range(m)]
    return out


def samples(found: Predictions, batch: Batch, columns: Sequence[int], words: Words) -> list[Sample]:
    """What the slots of `columns` look like in text. Positions that decoding would not ask for are left out."""
    ids, positions = batch.ids.cpu().flatten(), batch.positions.cpu().flatten()
    out = []
    for column in columns:
        slot = int(found.slots[column])
        before = ids[slot - int(positions[slot]) : slot + 1].tolist()
        drafts = [
            Draft(
                position=position,
                predicted=words.token(int(found.predicted[position, column])),
                target=words.token(int(found.target[position, column])),
                match=bool(found.predicted[position, column] == found.target[position, column]),
                pred_conf=float(found.pred_conf[position, column]),
                target_conf=float(found.target_conf[position, column]),
            )
            for position in found.asked[:, column].nonzero()[:, 0].tolist()
        ]
        out.append(Sample(words.context(before), drafts))
    return out


class PredictionWatcher:
    """A `Watcher`. `log` None = another rank than 0: it has nothing to look at and nothing to write.

    `batches`: candidates for the fixed batch, the best first; the first one with something to draft is it. `features` is asked once for it.
    """

    def __init__(
        self,
        objective: Objective,
        features: FeatureSource,
        batches: Iterable[Batch],
        words: Words,
        options: TrainOptions,
        ranks: Ranks,
        log: RunLog | None,
        console: Console,
    ) -> None:
        self.interval, self.count = options.log_samples_interval, options.num_samples_to_log
        self.objective, self.features, self.batches = objective, features, batches
        self.words, self.ranks, self.log, self.console = words, ranks, log, console
        self._looked, self._began = False, 0.0
        self._fixed: Features | None = None  # on the CPU between looks: accelerator memory is for training
        self._columns: list[int] = []

    def __call__(self, step: int) -> None:
        if self.log is None:
            return
        self._began = time.perf_counter()
        if not self._looked:
            self._look(step, self.log)
        if self._fixed is not None:
            self._write(step, self._predict(_moved(self._fixed, self.ranks.device)), self._fixed.batch, self.log)

    def _predict(self, features: Features) -> Predictions:
        with self.ranks.accelerator.autocast():
            return self.objective.predictions(features)

    def _look(self, step: int, log: RunLog) -> None:
        """Choose batch and samples, once."""
        self._looked = True
        for batch in self.batches:
            features = self.features(batch.to(self.ranks.device))
            found = self._predict(features)
            if found.asked.any():
                self._fixed = _moved(features, torch.device("cpu"))
                self._columns = choose(found, self._fixed.batch, self.count)
                return
        log.event("predictions", step=step, text=BLIND)
        self.console.print(BLIND, markup=False, highlight=False, soft_wrap=True)

    def _write(self, step: int, found: Predictions, batch: Batch, log: RunLog) -> None:
        of = summary(
            found.predicted == found.target, found.pred_conf, found.target_conf, found.asked, hidden=found.hidden
        )
        shown = samples(found, batch, self._columns, self.words)
        table, text = rows(step, shown, of), block(step, shown, of)
        log.log(step, of.scalars)
        _append(log.folder, step, table)
        place = text_file(log.folder, step)
        write_text(place, text)
        log.event(
            "predictions",
            step=step,
            file=str(place.relative_to(log.folder.path)),
            count=of.count,
            accuracy=of.by_position,
            high_confidence_wrong=of.high_confidence_wrong,
            verdict=verdict(of.gap, of.accuracy),
            seconds=round(time.perf_counter() - self._began, 4),
        )
        log.trackers.table(step, "predictions/samples_table", COLUMNS, table)
        log.trackers.text(step, "predictions/detailed_text", text)


def _moved(features: Features, device: torch.device) -> Features:
    last: Tensor | None = None if features.last is None else features.last.to(device)
    taps = {tap: states.to(device) for tap, states in features.taps.items()}
    return dataclasses.replace(features, batch=features.batch.to(device), taps=taps, last=last)


def text_file(folder: RunFolder, step: int) -> Path:
    return folder.path / "predictions" / f"step_{step:06d}.txt"


def _append(folder: RunFolder, step: int, table: Sequence[Row]) -> None:
    """Rows of a step to `metrics/predictions.csv`. It is open only while it is written: nobody has to close it."""
    file = folder.table("predictions", COLUMNS)
    for row in table:
        file.append(dict(zip(COLUMNS, row, strict=True)))
    file.close()


def _forget(folder: RunFolder, upto: int) -> None:
    """What lies beyond the step that a resumed run goes on from is made again."""
    if (folder.metrics / "predictions.csv").exists():
        folder.table("predictions", COLUMNS, upto).close()
    for path in text_file(folder, 0).parent.glob("step_*.txt"):
        if int(path.stem.removeprefix("step_")) > upto:
            path.unlink()


def prediction_watchers(
    objective: Objective,
    features: FeatureSource,
    batches: Iterable[Batch],
    tokenizer: Any,
    options: TrainOptions,
    ranks: Ranks,
    log: RunLog | None,
    console: Console | None = None,
) -> list[Watcher]:
    """What to give to `train(watchers=...)`, on every rank; nothing with `--log-samples-interval 0`.

    `batches`: where the fixed batch comes from: the held-out batches if there are any, then the first training batch. They are drawn
    at the first look, on rank 0 only. `tokenizer` None = tokens are shown as ids. `log`: of the run on rank 0, None on the others.
    """
    if log is not None and log.upto is not None:
        _forget(log.folder, log.upto)
    if not options.log_samples_interval:
        return []
    console = console or Console(stderr=True)
    return [PredictionWatcher(objective, features, batches, Words(tokenizer), options, ranks, log, console)]
