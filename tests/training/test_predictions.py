"""The detailed log of predictions: what is chosen, what lands where, and that looking changes nothing."""

from __future__ import annotations

import functools
import html
import json
import os
import shutil
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

import tiny
from telemetry.test_trackers import history as wandb_history
from training import toy
from understudy import cli
from understudy.assets import pocket_path
from understudy.cli import offline
from understudy.drafting.objective import Batch, Features, Predictions
from understudy.target.target import Target
from understudy.telemetry.predictions import COLUMNS
from understudy.telemetry.run import RunFolder, read_events, read_table
from understudy.telemetry.trackers import MISSING, Trackers, markdown_table, trackers
from understudy.training.distributed import Ranks
from understudy.training.figures import zeros
from understudy.training.options import TrainOptions
from understudy.training.predictions import BLIND, Words, choose, prediction_watchers, samples
from understudy.training.runlog import RunLog
from understudy.training.step import StepReport

ROOT = Path(__file__).parents[2]
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


@functools.cache
def target() -> Target:
    model = tiny.build("Qwen3ForCausalLM", "Qwen3Config", vocab_size=4096, eos_token_id=2, max_position_embeddings=512)
    return Target(model, tokenizer(), "tiny")


class Run:
    """A run folder under way, as `offline` makes it."""

    def __init__(self, path: Path, resume: bool = False, upto: int | None = None) -> None:
        self.path = path
        self.folder = RunFolder(path, resume=resume)
        self.folder.begin({})
        self.log = RunLog(self.folder, Trackers({}, print), upto)

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
def test_samples_are_spread_over_documents_and_have_as_many_positions_as_these(case):
    batch, positions, count = case
    found = found_in(batch, positions)
    columns = choose(found, batch, count)
    row_of = [int(s) // batch.ids.shape[1] for s in found.slots]
    document = [(row_of[c], int(batch.documents.flatten()[s])) for c, s in enumerate(found.slots)]
    reach = found.asked.sum(0).tolist()
    best: dict[Any, int] = {}
    for c in range(len(document)):
        best[document[c]] = max(best.get(document[c], 0), reach[c])
    assert columns == sorted(set(columns)) and len(columns) <= count
    assert all(reach[c] == best[document[c]] for c in columns)
    taken = {key: sum(document[c] == key for c in columns) for key in best}
    room = {key: sum(reach[c] == best[key] for c in range(len(reach)) if document[c] == key) for key in best}
    assert sum(taken.values()) == count or all(n == room[key] or n >= count // len(best) for key, n in taken.items())
    if count <= len(best):
        assert sorted(taken.values(), reverse=True) == [1] * count + [0] * (len(best) - count)
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
    assert [int(found.slots[c]) for c in choose(found, batch, 4)] == [2, 12, 25, 37]
    # the second document has one slot with the most positions; the others get two samples each
    assert [int(found.slots[c]) for c in choose(found, batch, 8)] == [2, 5, 12, 23, 26, 34, 37]


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
    assert figures[0]["predictions/pos_1_target_confidence"] == pytest.approx(
        float(found.target_conf[1][asked[1]].mean())
    )
    assert figures[0]["hidden_states/max"] == pytest.approx(float(found.hidden.max()))
    share = float((found.predicted == found.target)[0][asked[0]].float().mean())
    assert {r["accuracy"] for r in last if r["draft_position"] == 0} == {f"{share:.0%}"}
    (event,) = [e for e in run.events("predictions") if e["step"] == 6]
    assert event["file"] == "predictions/step_000006.txt" and event["count"] == int(asked.sum())
    assert event["accuracy"][0] == pytest.approx(share) and event["verdict"] in text
    assert any("hidden_states/std" in e for e in run.events("log") if e["step"] == 6)
    assert not (run.path / "wandb").exists() and not (run.path / "tensorboard").exists()


def test_options(tmp_path):
    assert (TrainOptions().log_samples_interval, TrainOptions().num_samples_to_log) == (200, 5)
    every, fewer, never = (Run(tmp_path / name) for name in ("every", "fewer", "never"))
    every.train(log_samples_interval=1, num_samples_to_log=3)
    fewer.train(log_samples_interval=5, num_samples_to_log=1)
    never.train(log_samples_interval=0)
    assert [{r["step"] for r in run.rows()} for run in (every, fewer, never)] == [{1, 2, 3, 4, 5, 6}, {5}, set()]
    assert [{r["sample"] for r in run.rows()} for run in (every, fewer, never)] == [{0, 1, 2}, {0}, set()]
    assert never.texts() == [] and never.events("predictions") == []
    for wrong in ({"log_samples_interval": -1}, {"num_samples_to_log": 0}):
        with pytest.raises(pydantic.ValidationError):
            TrainOptions(**wrong)  # type: ignore[arg-type]


def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path):
    """Saved at 3 and 6; killed while it saved the second time: rows and text of steps 4 and 6 are made again."""
    whole = Run(tmp_path / "run")
    whole.train(save_interval=3)
    before, text = whole.rows(), (whole.path / "predictions" / "step_000004.txt").read_text()
    shutil.rmtree(whole.path / "checkpoints" / "step_000006")
    again = Run(whole.path, resume=True, upto=3)
    never = TrainOptions(log_samples_interval=0)
    assert prediction_watchers(Seer(), toy.features, [], None, never, Ranks(never, "cpu"), again.log) == []
    assert {r["step"] for r in again.rows()} == {2}, "what is made again goes, also when nobody looks any more"
    assert again.texts() == ["step_000002.txt"]
    again.train(save_interval=3, resume=True)
    assert again.rows() == before
    assert (again.path / "predictions" / "step_000004.txt").read_text() == text


# -- looking changes nothing


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_goes_on_as_if_nobody_had_looked(tmp_path, precision):
    looked = Run(tmp_path / "a").train(Seer(dropout=0.3), log_samples_interval=1, mixed_precision=precision)
    alone = Run(tmp_path / "b").train(Seer(dropout=0.3), log_samples_interval=0, mixed_precision=precision)
    assert looked.calls and not alone.calls
    assert set(looked.calls) == {(False, False, precision == "bf16")}, "evaluation mode, no gradient, as in training"
    assert looked.training
    assert all(
        torch.equal(x, y) for x, y in zip(toy.weights(looked).values(), toy.weights(alone).values(), strict=True)
    )


def test_the_batch_is_fixed_and_its_features_are_computed_once(tmp_path):
    asked: list[Batch] = []

    def features(batch: Batch) -> Features:
        asked.append(batch)
        return toy.features(batch)

    run, settings = Run(tmp_path / "run"), TrainOptions(log_samples_interval=2)
    watchers = prediction_watchers(
        Seer(), features, iter([batch(), batch()]), None, settings, Ranks(settings, "cpu"), run.log
    )
    with torch.no_grad():
        for step in (2, 4, 6):
            watchers[0](step)
    assert len(asked) == 1
    table = run.rows()
    two, four, six = ([{**r, "step": 0} for r in table if r["step"] == step] for step in (2, 4, 6))
    assert two and two == four == six, "the same rows: weights did not change"
    assert str(table[0]["predicted"]).startswith('"<token ')


def test_a_batch_without_a_slot_is_passed_over(tmp_path, capsys):
    empty = toy.Rows(empty=(3, 6)).batch([3, 6])
    run = Run(tmp_path / "run")
    run.train(batches=[empty, batch()])
    assert {r["step"] for r in run.rows()} == {2, 4, 6}
    assert BLIND not in capsys.readouterr().err
    none = Run(tmp_path / "none")
    none.train(batches=[empty, empty])
    assert capsys.readouterr().err.count(BLIND) == 1
    assert none.rows() == [] and none.texts() == []
    assert [(e["step"], e["text"]) for e in none.events("predictions")] == [(2, BLIND)]


def test_other_ranks_look_at_nothing_and_write_nothing(tmp_path):
    def nothing(batch: Batch) -> Features:
        raise AssertionError

    settings, objective = TrainOptions(output_dir=tmp_path, log_samples_interval=3), Seer()
    (watcher,) = prediction_watchers(objective, nothing, [batch()], None, settings, Ranks(settings, "cpu"), None)
    assert watcher.interval == 3
    watcher(3)
    assert objective.calls == [] and list(tmp_path.iterdir()) == []


# -- trackers


def told_to(name: str, path: Path, said: list[str]) -> Run:
    """A run of 6 steps that reports to a tracker."""
    run = Run(path)
    run.log.trackers = trackers([name], "p", None, path, {}, warn=said.append)
    run.train()
    assert {r["step"] for r in run.rows()} == {2, 4, 6} and len(run.texts()) == 3
    return run


def test_without_wandb_everything_else_lands(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    told_to("wandb", tmp_path / "run", said)
    assert said == [MISSING["wandb"]] == ["wandb not available, skipping detailed predictions logging"]


def table_of(run: Run, step: int) -> list[list[Any]]:
    return [list(r.values()) for r in run.rows() if r["step"] == step]


@pytest.mark.slow
def test_wandb_offline_has_scalars_table_and_text(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    said: list[str] = []
    run = told_to("wandb", tmp_path / "run", said)
    assert said == []
    history = wandb_history(run.path)
    files = next(run.path.glob("wandb/offline-run-*/files"))
    for step in (2, 4, 6):
        logged = history[step]
        table = json.loads((files / logged["predictions/samples_table.path"]).read_text())
        assert table["columns"] == list(COLUMNS) and table["data"] == table_of(run, step)
        page = (files / logged["predictions/detailed_text.path"]).read_text()
        text = (run.path / "predictions" / f"step_{step:06d}.txt").read_text()
        assert html.unescape(page) == f"<pre>{text}</pre>"
        (row,) = [r for r in run.rows("training") if r["step"] == step and r["hidden_states/std"] is not None]
        scalars = {key: value for key, value in row.items() if value is not None and key != "step"}
        assert len(scalars) == 3 + 2 * P + 4
        assert {key: logged[key] for key in scalars} == pytest.approx(scalars)


@pytest.mark.slow
def test_tensorboard_has_scalars_table_and_text(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = told_to("tensorboard", tmp_path / "run", [])
    found = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    rows = [r for r in run.rows("training") if r["hidden_states/std"] is not None]
    for key in ("predictions/confidence_gap", "predictions/pos_1_pred_confidence", "hidden_states/min"):
        assert [(e.step, e.value) for e in found.Scalars(key)] == [(r["step"], pytest.approx(r[key])) for r in rows]
    tables, texts = (
        [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(f"predictions/{key}/text_summary")]
        for key in ("samples_table", "detailed_text")
    )
    assert [step for step, _ in tables] == [step for step, _ in texts] == [2, 4, 6]
    assert tables[0][1] == markdown_table(COLUMNS, table_of(run, 2))
    text = (run.path / "predictions" / "step_000004.txt").read_text()
    assert texts[1][1] == "\n".join(f"    {line}" for line in text.splitlines())


# -- what `--verbose` says of a step that learned nothing


@pytest.mark.parametrize(
    ("masked", "count", "norm", "skipped", "says"),
    [
        (0, 0, 0.0, "empty", "zero because the loss mask is empty: chat template, --is-preformatted or data"),
        (5, 0, 0.0, "empty", "zero because no slot of the mask is supervised: documents are too short for this drafter"),
        (5, 4, 0.0, None, "gradients are zero: the loss does not depend on what is trained, or it is at its minimum"),
        (5, 4, 0.1, None, None),
        (5, 4, 0.0, "not finite", None),
    ],
)  # fmt: skip
def test_zeros_have_a_cause(masked, count, norm, skipped, says):
    assert zeros(StepReport(1.0, count, masked, 9, 0, norm, skipped, False)) == says
    page = (ROOT / "docs" / "training-logs.md").read_text(encoding="utf-8")
    assert says is None or f"| `{says.split(':')[0]}: ...` |" in page
    assert BLIND.split(";")[0] in page and MISSING["wandb"] in page


# -- through the command


def test_training_from_the_command_line(capsys, monkeypatch, tmp_path):
    """Without wandb, and with it asked for: the warning, and everything else. The held-out conversations are what is shown."""
    monkeypatch.setattr(offline, "load", lambda config: target())
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name in ("train", "eval"):
        talks = [
            [
                {"from": "human", "value": f"Write {name}{i}."},
                {"from": "gpt", "value": f"def {name}{i}(x):\n    return {i}"},
            ]
            for i in range(8)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"conversations": talk}) + "\n" for talk in talks))
    folder = tmp_path / "run"
    options = (
        "--train-data-path", tmp_path / "train.jsonl", "--eval-data-path", tmp_path / "eval.jsonl", "--output-dir", folder,
        "--batch-size", 1, "--max-length", 512, "--max-steps", 4, "--eval-interval", 0, "--device", "cpu",
        "--log-samples-interval", 2, "--num-samples-to-log", 3, "--report-to", "wandb", "--verbose",
    )  # fmt: skip
    assert cli.main(["train", "kangaroo", *map(str, options)]) == 0
    said = capsys.readouterr().err
    assert said.count("wandb not available, skipping detailed predictions logging") == 1
    assert "mask sum" in said and "gradient norm" in said and "trainable weights" in said
    table = read_table(folder / "metrics" / "predictions.csv")
    assert list(table[0]) == list(COLUMNS) and {r["step"] for r in table} == {2, 4}
    assert {r["sample"] for r in table} == {0, 1, 2}
    text = (folder / "predictions" / "step_000004.txt").read_text()
    contexts = [line for line in text.splitlines() if line.startswith("Context: ")]
    assert len(contexts) == 3 and all("Write eval" in line and "train" not in line for line in contexts)
    assert all("<|assistant|>" in line for line in contexts), "special tokens are seen"
    figures = [r for r in read_table(folder / "metrics" / "training.csv") if r["hidden_states/std"] is not None]
    assert [r["step"] for r in figures] == [2, 4] and figures[0]["hidden_states/std"] != figures[1]["hidden_states/std"]


# -- several processes


def process(path: str) -> None:
    """One rank of a run under torchrun: PATH holds the options as JSON."""
    options = json.loads(Path(path).read_text())
    settings = TrainOptions(**options)
    ranks, out, objective = Ranks(settings, "cpu"), Path(options["output_dir"]), Seer()
    log = Run(out).log if ranks.main else None
    watchers = prediction_watchers(objective, toy.features, [batch()], tokenizer(), settings, ranks, log)
    rest = {name: value for name, value in options.items() if name != "output_dir"}
    toy.run(out, objective=objective, ranks=ranks, log=log or toy.Lines(), watchers=watchers, **rest)  # type: ignore[arg-type]
    assert bool(objective.calls) == ranks.main
    ranks.leave(0)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_one_of_two_processes_looks_at_whole_weights(fsdp, tmp_path):
    Run(tmp_path / "one").train(batch_size=2, max_grad_norm=0)
    options = {"output_dir": str(tmp_path / "two"), "batch_size": 1, "max_steps": 6, "max_grad_norm": 0, "fsdp": fsdp}
    (tmp_path / "task.json").write_text(json.dumps({**options, "log_samples_interval": 2, "num_samples_to_log": 2}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", "-m", "training.test_predictions", str(tmp_path / "task.json")]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (read_table(tmp_path / name / "metrics" / "predictions.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 3 * 2 * P
    for a, b in zip(one, two, strict=True):
        assert {**a, "pred_conf": 0, "target_conf": 0} == {**b, "pred_conf": 0, "target_conf": 0}
        assert b["pred_conf"] == pytest.approx(a["pred_conf"], abs=2e-3)


if __name__ == "__main__":
    process(sys.argv[1])
