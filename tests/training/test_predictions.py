"""The detailed log of predictions: what is chosen, what lands where, and that looking changes nothing."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from training import toy
from understudy.assets import pocket_path
from understudy.drafting.objective import Batch, Features, Predictions
from understudy.telemetry.predictions import COLUMNS
from understudy.telemetry.run import RunFolder, read_events, read_table
from understudy.telemetry.trackers import MISSING, Trackers, trackers
from understudy.training.distributed import Ranks
from understudy.training.figures import zeros
from understudy.training.options import TrainOptions
from understudy.training.predictions import BLIND, Words, choose, prediction_watchers, samples
from understudy.training.runlog import RunLog
from understudy.training.step import StepReport

P = 2
TEACHER = torch.randn(toy.V, toy.V, generator=torch.Generator().manual_seed(5))  # the target's logits after each token


def slots_of(batch: Batch, positions: int) -> tuple[list[int], list[list[bool]]]:
    """The obvious walk: a cycle can begin where the next token is the assistant's, and goes on as far as the answer does."""
    rows, columns = batch.ids.shape
    slots, asked = [], []
    for row in range(rows):
        for at in range(columns):
            reach = [
                at + d < columns
                and all(bool(batch.mask[row, at + k]) and batch.documents[row, at + k] == batch.documents[row, at] >= 0
                        for k in range(1, d + 1))
                for d in range(1, positions + 1)
            ]  # fmt: skip
            if reach[0]:
                slots.append(row * columns + at)
                asked.append(reach)
    return slots, asked


def batch() -> Batch:
    return toy.Rows().batch([3, 6, 5, 4])


class Seer(toy.Toy):
    """A toy that says what it predicts; `calls` = (training, gradient, autocast) at every call."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[tuple[bool, bool, bool]] = []

    def predictions(self, features: Features) -> Predictions:
        assert features.last is not None
        torch.rand(3)  # a careless method: random numbers are used up
        self.calls.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        slots, asked = slots_of(features.batch, P)
        at = torch.tensor(slots, dtype=torch.int64)
        every = features.last.flatten(0, 1)
        logits = self.drafter.head(self.dropout(self.drafter.up(self.drafter.norm(every)))).float().softmax(-1)
        reads = torch.stack([(at + p).clamp(max=len(every) - 1) for p in range(P)])  # [P, N]
        sure, predicted = logits[reads].max(-1)
        target = TEACHER[features.batch.ids.flatten()[reads]].argmax(-1)
        right = logits[reads].gather(-1, target[..., None])[..., 0]
        return Predictions(at, predicted, target, sure, right, torch.tensor(asked).view(-1, P).T, every[at])


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(pocket_path())


class Run:
    """A run folder under way, as `offline` makes it."""

    def __init__(self, path: Path, resume: bool = False, upto: int | None = None, told: Trackers | None = None) -> None:
        self.path = path
        self.folder = RunFolder(path, resume=resume)
        self.folder.begin({})
        self.log = RunLog(self.folder, told or Trackers({}, print), upto)

    def train(self, objective: Seer | None = None, batches: Sequence[Batch] = (), **options: Any) -> Seer:
        objective = objective or Seer()
        options = {"max_steps": 6, "log_samples_interval": 2, "num_samples_to_log": 2} | options
        asked = [name for name in options if name in TrainOptions.model_fields]
        settings = TrainOptions(output_dir=self.path, **{name: options[name] for name in asked})
        ranks = Ranks(settings, "cpu")
        given_ = batches or [batch()]
        watchers = prediction_watchers(objective, toy.features, given_, tokenizer(), settings, ranks, self.log)
        toy.run(self.path, objective=objective, log=self.log, watchers=watchers, ranks=ranks, **options)  # type: ignore[arg-type]
        self.log.close()
        return objective

    def rows(self, name: str = "predictions") -> list[dict[str, Any]]:
        return read_table(self.path / "metrics" / f"{name}.csv")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_events(self.path / "events.jsonl") if e["event"] == kind]

    def texts(self) -> list[str]:
        return sorted(path.name for path in self.path.glob("predictions/*"))


# -- what is shown


@st.composite
def packed(draw: st.DrawFn) -> tuple[Batch, int, int]:
    """Rows of several documents with random masks; P; how many samples."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(2, 14))
    documents, positions = torch.full((rows, columns), -1), torch.zeros(rows, columns, dtype=torch.int64)
    for row in range(rows):
        at = number = 0
        while at < columns and draw(st.integers(0, 9)):
            length = min(draw(st.integers(1, 6)), columns - at)
            documents[row, at : at + length], positions[row, at : at + length] = number, torch.arange(length)
            at, number = at + length, number + 1
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) < 0.7
    ids = torch.arange(rows * columns).view(rows, columns)
    return Batch(ids, mask & (documents >= 0), documents, positions), draw(st.integers(1, 4)), draw(st.integers(1, 5))


def found_in(batch: Batch, positions: int) -> Predictions:
    slots, asked = slots_of(batch, positions)
    at, reach = torch.tensor(slots, dtype=torch.int64), torch.tensor(asked).view(-1, positions).T.bool()
    ids = at.expand(positions, -1)
    return Predictions(at, ids, ids, torch.ones(ids.shape), torch.ones(ids.shape), reach, torch.zeros(len(at), 2))


@given(packed())
def test_a_sample_is_a_document_and_as_many_positions_as_it_has(case):
    batch, positions, count = case
    found = found_in(batch, positions)
    columns = choose(found, batch, count)
    row_of = [int(s) // batch.ids.shape[1] for s in found.slots]
    document = [(row_of[c], int(batch.documents.flatten()[s])) for c, s in enumerate(found.slots)]
    reach = found.asked.sum(0).tolist()
    best: dict[Any, int] = {}
    for c in range(len(document)):
        best[document[c]] = max(best.get(document[c], 0), reach[c])
    assert len(columns) == min(count, len(best))
    assert columns == sorted(columns)
    assert len({document[c] for c in columns}) == len(columns)
    assert all(reach[c] == best[document[c]] for c in columns)
    left = [asked for key, asked in best.items() if key not in {document[c] for c in columns}]
    assert max(left, default=0) <= min((reach[c] for c in columns), default=0), "fuller documents go first"
    for c, sample in zip(columns, samples(found, batch, columns, Words(None)), strict=True):
        slot = int(found.slots[c])
        start = next(i for i in range(slot, -1, -1) if batch.positions.flatten()[i] == 0)
        whole = "".join(f"<token {i}>" for i in range(start, slot + 1))
        assert sample.context == ("..." if len(whole) > 80 else "") + whole[-80:] + "..."
        assert [d.position for d in sample.drafts] == list(range(reach[c]))


def test_samples_show_beginnings_middles_and_ends():
    """Three answers of 7 tokens after a prompt of 3; 6 slots of each have both positions. One document is too short for both."""
    ids = torch.arange(40).view(4, 10)
    mask, positions = torch.zeros(4, 10).bool(), torch.arange(10).expand(4, 10)
    mask[:, 3:] = True
    documents = torch.zeros(4, 10, dtype=torch.int64)
    mask[1, 4:] = False  # one draft position only
    batch = Batch(ids, mask, documents, positions)
    found = found_in(batch, P)
    assert [int(found.slots[c]) for c in choose(found, batch, 3)] == [3, 25, 37]
    assert [int(found.slots[c]) for c in choose(found, batch, 1)] == [5]
    assert [int(found.slots[c]) for c in choose(found, batch, 9)] == [2, 12, 25, 37]


def test_tokens_are_seen():
    words, ids = Words(tokenizer()), tokenizer()("def f(x):\n    return 'é'").input_ids
    assert [words.token(i) for i in ids] == [
        "def", "␣f", "(", "x", "):", "↵␣␣␣␣", "return", "␣'", "<token 135>", "<token 110>", "'",
    ]  # fmt: skip
    assert words.token(tokenizer().convert_tokens_to_ids("<|end|>")) == "<|end|>"
    assert words.token(999_999) == "<token 999999>" and Words(None).token(5) == "<token 5>"
    assert words.context(ids) == "def f(x):↵    return 'é'..."
    long = words.context(ids * 9)
    assert long.startswith("...") and long.endswith("return 'é'...") and len(long) == 86
    assert words.context([ids[2]] * 64) == "(" * 64 + "..."
    assert words.context([ids[2]] * 65) == "..." + "(" * 64 + "..."  # at most 64 tokens are looked at


def test_a_space_that_decoding_drops_is_seen():
    class SentencePiece:
        def decode(self, ids: list[int]) -> str:
            return {3: "and", 4: "ly", 5: ""}[ids[0]]

        def convert_ids_to_tokens(self, token: int) -> str:
            return {3: "▁and", 4: "ly", 5: "▁"}[token]

    assert [Words(SentencePiece()).token(i) for i in (3, 4, 5)] == ["␣and", "ly", "␣"]


# -- what lands in the run folder


def test_everything_is_in_the_run_folder_without_a_tracker(tmp_path):
    run = Run(tmp_path / "run")
    objective = run.train()
    table = run.rows()
    assert list(table[0]) == list(COLUMNS)
    assert [(r["step"], r["sample"], r["draft_position"]) for r in table] == [
        (step, sample, position) for step in (2, 4, 6) for sample in (0, 1) for position in range(P)
    ]
    assert run.texts() == ["step_000002.txt", "step_000004.txt", "step_000006.txt"]
    text = (run.path / "predictions" / "step_000006.txt").read_text()
    assert "\nStep 6 - Detailed Predictions\n" in text and "at 2 positions\n" in text and "[Sample 1]" in text
    last = [r for r in table if r["step"] == 6]
    for row in last:
        word, sign = str(row["predicted"])[1:-1], row["match"]
        assert f"Position {row['draft_position']} (Acc: {row['accuracy']}) {sign}" in text
        assert f"Predicted: {word} (conf: {row['pred_conf']:.3f})" in text
        assert f"Context: {str(row['context'])[1:-1]}\n" in text
    # figures against the objective as it is at the end of the run
    with torch.no_grad():
        found = objective.eval().predictions(toy.features(batch()))
    asked = found.asked
    figures = [r for r in run.rows("training") if r["step"] == 6 and r["predictions/confidence_gap"] is not None]
    assert len(figures) == 1
    assert figures[0]["predictions/overall_pred_confidence"] == pytest.approx(float(found.pred_conf[asked].mean()))
    assert figures[0]["predictions/pos_1_target_confidence"] == pytest.approx(float(found.target_conf[1][asked[1]].mean()))
    assert figures[0]["hidden_states/max"] == pytest.approx(float(found.hidden.max()))
    share = float((found.predicted == found.target)[0][asked[0]].float().mean())
    assert {r["accuracy"] for r in last if r["draft_position"] == 0} == {f"{share:.0%}"}
    (event,) = [e for e in run.events("predictions") if e["step"] == 6]
    assert event["file"] == "predictions/step_000006.txt" and event["count"] == int(asked.sum())
    assert event["accuracy"][0] == pytest.approx(share) and event["verdict"] in text
    assert any("hidden_states/std" in e for e in run.events("log") if e["step"] == 6)
    assert not (run.path / "wandb").exists() and not (run.path / "tensorboard").exists()
