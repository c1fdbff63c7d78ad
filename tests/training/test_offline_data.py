"""What an offline run looks at beside its loss: which tokens the data supervise, engines, replays, predictions."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from training.kangaroo import logged, run, target, train, write_rows
from understudy import cli
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.data.encode import Encoder
from understudy.data.stream import Corpus
from understudy.drafters.early_exit.objective import ExitObjective, ExitObjectiveConfig
from understudy.drafting.spec import specs
from understudy.target.fingerprint import fingerprint
from understudy.telemetry.run import read_events, read_table
from understudy.training import datasets, offline
from understudy.training.datasets import FileData, OfflineOptions, ShardData
from understudy.training.distributed import Ranks


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def counted(path: Path, lines: list[int], max_length: int = 64) -> Tensor:
    """Slow: how often each token of the vocabulary is supervised in some lines of a file."""
    encoder, corpus = Encoder(target().tokenizer, max_length=max_length, stop_ids=target().eos_ids), Corpus([path])
    counts = torch.zeros(target().vocab_size, dtype=torch.int64)
    for line in lines:
        row = corpus.row(line)
        assert row is not None
        document = encoder(row)
        for token, supervised in zip(document.ids, document.mask, strict=True):
            counts[token] += supervised
    return counts


def options(rows: Path, folder: Path, **more: Any) -> OfflineOptions:
    given = {"train_data_path": rows, "output_dir": folder, "max_length": 64, "max_steps": 1, "batch_size": 2}
    return OfflineOptions(**(given | more))


def opened(config: OfflineOptions) -> FileData | ShardData:
    kind = FileData if config.features is None else ShardData
    return kind(config, target(), Ranks(config, "cpu"))


def test_tokens_of_the_data_are_counted(tmp_path, rows):
    found = opened(options(rows, tmp_path / "run")).token_counts()
    assert found.dtype == torch.int64 and found.shape == (4096,)
    assert torch.equal(found, counted(rows, list(range(12)))) and found.sum() > 100
    few = opened(options(rows, tmp_path / "run", vocab_rows=3)).token_counts()
    assert torch.equal(few, counted(rows, [0, 6, 11])), "evenly spread"


def test_a_vocabulary_that_the_target_lacks_is_named(tmp_path, rows, monkeypatch):
    data = opened(options(rows, tmp_path / "run"))
    monkeypatch.setattr(target(), "vocab_size", 100)
    with pytest.raises(UserError, match="tokens beyond the target's vocabulary of 100: its tokenizer is another"):
        data.token_counts()
    monkeypatch.setattr(target(), "vocab_size", 5000)  # padded embeddings
    assert data.token_counts().shape == (5000,) and not data.token_counts()[4096:].any()


def test_captured_features_are_counted_as_their_texts(capsys, monkeypatch, tmp_path, rows):
    from understudy.cli import data_capture

    monkeypatch.setattr(data_capture, "load", lambda config: target())
    args = ("--train-data-path", str(rows), "--batch-size", "2", "--max-length", "64", "--no-pack")
    assert cli.main(["data", "capture", "--output", str(tmp_path / "stored"), "--taps", "2", *args]) == 0
    config = OfflineOptions(features=tmp_path / "stored")
    data = opened(config)
    assert torch.equal(data.token_counts(), counted(rows, list(range(12))))
    two = opened(config.model_copy(update={"vocab_rows": 4})).token_counts()
    data.bind(Needs(taps=frozenset({2})))
    assert isinstance(data, ShardData)
    ends = [data.stored.batch(0), data.stored.batch(len(data.stored) - 1)]
    assert torch.equal(two, sum(torch.bincount(b.ids[b.mask], minlength=4096) for b in ends))
    with pytest.raises(UserError, match="lacks tap 3"):
        opened(config).bind(Needs(taps=frozenset({3})))


@pytest.mark.parametrize(("vocab_rows", "looks"), [(20_000, [12]), (3, [3, 12])])
def test_an_objective_gets_the_counts_and_rows_are_not_looked_at_twice(
    capsys, monkeypatch, tmp_path, rows, vocab_rows, looks
):
    """The report at the start and the counts of all rows are one and the same look."""
    given: list[Tensor] = []
    limits: list[int] = []
    spec, plain = specs()["kangaroo"], datasets.inspect
    assert spec.objective is not None and spec.objective_config is not None

    def curious(config: Any, on: Any, start: Any, counts: Any) -> Any:
        given.append(counts())
        return spec.objective(config, on, start, counts)  # type: ignore[misc]

    def looking(corpus: Any, encoder: Any, limit: int, sizes: Any) -> Any:
        limits.append(limit)
        return plain(corpus, encoder, limit, sizes)

    monkeypatch.setattr(datasets, "inspect", looking)
    kind: Any = type("Options", (ExitObjectiveConfig, OfflineOptions), {"__module__": __name__})
    config = kind(**options(rows, tmp_path / "run", vocab_rows=vocab_rows).model_dump(exclude_unset=True))
    offline.run(dataclasses.replace(spec, objective=curious), config, target(), Ranks(config, "cpu"))
    assert torch.equal(given[0], counted(rows, [0, 6, 11] if vocab_rows == 3 else list(range(12))))
    assert limits == looks
    event = next(event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "data")
    assert event["report"]["rows"] == 12


@pytest.mark.parametrize(
    ("engines", "says"),
    [
        ("vllm", "--require vllm: it cannot serve this drafter: it has no early exit"),
        ("understudy, sglang", "--require sglang: it cannot serve this drafter: it has no early exit"),
        ("vlm", "--require vlm: no engine of that name is known; known: understudy, vllm, sglang, transformers"),
    ],
)
def test_an_engine_that_is_required_has_to_serve(capsys, monkeypatch, tmp_path, rows, engines, says):
    folder = tmp_path / "run"
    code, _, err = train(capsys, monkeypatch, rows, "--output-dir", str(folder), "--require", engines)
    assert code == 2 and f"error: {says}" in err
    assert not (folder / "events.jsonl").exists()
    run(capsys, monkeypatch, rows, folder, "--require", "understudy", "--max-steps", "1")


def test_a_replay_agrees_with_decoding(capsys, monkeypatch, tmp_path, rows):
    args = ("--threshold", "0", "--eval-max-new-tokens", "30", "--exit-layer", "3")
    folder = run(capsys, monkeypatch, rows, tmp_path / "run", *args)
    assert logged(folder, "measured/tau_replayed") == logged(folder, "measured/tau")
    assert max(logged(folder, "measured/tau")) > 1.1


def test_training_on_other_states_than_decoding_reads_is_an_event(capsys, monkeypatch, tmp_path, rows):
    """Training reads states one place too late, as a wrong shift would have it."""
    plain = ExitObjective.reads
    monkeypatch.setattr(ExitObjective, "reads", lambda self, features: plain(self, features).roll(1, dims=1))
    args = ("--threshold", "0", "--eval-max-new-tokens", "30", "--exit-layer", "3")
    folder = run(capsys, monkeypatch, rows, tmp_path / "run", *args)
    found = [event for event in read_events(folder / "events.jsonl") if event["event"] == "mismatch"]
    assert found and {event["cause"] for event in found} == {"serving"}
    assert all(abs(event["replayed"] - event["measured"]) > 0.05 * event["measured"] for event in found)


def test_detailed_predictions_are_written(capsys, monkeypatch, tmp_path, rows):
    args = ("--log-samples-interval", "2", "--num-samples-to-log", "1")
    folder = run(capsys, monkeypatch, rows, tmp_path / "run", *args)
    table = read_table(folder / "metrics" / "predictions.csv")
    assert {(row["step"], row["sample"]) for row in table} == {(2, 0)}
    assert (folder / "predictions" / "step_000002.txt").exists()
    three = run(capsys, monkeypatch, rows, tmp_path / "three", *args[:2], "--num-samples-to-log", "3")
    assert {row["sample"] for row in read_table(three / "metrics" / "predictions.csv")} == {0, 1, 2}
    none = run(capsys, monkeypatch, rows, tmp_path / "none", "--log-samples-interval", "0", eval_data=False)
    assert not (none / "predictions").exists()
    training = run(capsys, monkeypatch, rows, tmp_path / "training", *args, eval_data=False)
    assert read_table(training / "metrics" / "predictions.csv"), "without held-out data a training batch is shown"


def answered(folder: Path, target_hash: str, **made: str) -> Path:
    """A folder as `understudy data regenerate` leaves it, with rows that the target of this hash wrote."""
    row = {"input_ids": list(range(8, 28)), "loss_mask": [0] * 10 + [1] * 10, "made": {"target": target_hash, **made}}
    folder.mkdir()
    (folder / "train-0.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    return folder


def test_a_data_dir_is_read_as_what_it_holds(tmp_path, rows):
    folder = answered(tmp_path / "answers", "0" * 16)
    assert opened(options([], tmp_path / "run", data_dir=folder)).token_counts()[18:28].tolist() == [4] * 10
    (folder / "manifest.json").write_text("{}")
    assert OfflineOptions(data_dir=folder).features == folder
    again = OfflineOptions(**OfflineOptions(data_dir=folder).model_dump())  # as a resumed run reads its settings
    assert (again.features, again.train_data_path) == (folder, [])
    for given in ({"features": tmp_path}, {"train_data_path": rows}):
        with pytest.raises(ValueError, match="name data in three ways; give one"):
            OfflineOptions(data_dir=folder, **given)


@pytest.mark.parametrize("mine", [True, False])
def test_rows_that_another_target_wrote_are_warned_of(tmp_path, mine):
    wrote = fingerprint(target()) if mine else "0" * 16
    config = options([], tmp_path / "run", data_dir=answered(tmp_path / "answers", wrote))
    console = Console(file=io.StringIO(), width=200)
    data = opened(config)
    data.bind(Needs(last=True))
    data.facts(console)
    assert ("4 of the rows looked at were written by another target" in console.file.getvalue()) is not mine


def test_batches_end_where_their_text_ends(tmp_path):
    config = options([], tmp_path / "run", data_dir=answered(tmp_path / "answers", "0" * 16), batch_size=8)
    data = opened(config)
    data.bind(Needs(last=True))
    batch = data.first()
    assert batch.ids.shape == (2, 60), "three documents of 20 tokens share a row of 64; six rows would be padding"
    assert bool((batch.documents >= 0).any(0).all()) and bool((batch.documents >= 0).any(1).all())


def test_the_thinking_mode_of_the_data_is_that_of_the_prompts(tmp_path, monkeypatch):
    folder = answered(tmp_path / "answers", "0" * 16, thinking="off")
    data = opened(options([], tmp_path / "run", data_dir=folder, eval_data_path=write_rows(tmp_path / "eval.jsonl")))
    assert data.thinking == "off"
    given = []
    monkeypatch.setattr(datasets, "thinking_variables", lambda tokenizer, mode: given.append(mode) or {})
    assert data.prompts() and given == ["off"]
    write_rows(folder / "train-1.jsonl")  # beside ordinary conversations, which are rendered by the default
    assert opened(options([], tmp_path / "run", data_dir=folder)).thinking == "default"
