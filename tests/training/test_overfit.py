"""`--overfit N`: the target's own answers to a few prompts, learned by heart and then decoded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest
import torch

import tiny
from training.kangaroo import logged, target, train, write_rows
from understudy import cli
from understudy.assets import prompts_path
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.data.prompts import load_prompts, render
from understudy.telemetry.run import read_events
from understudy.training.datasets import OfflineOptions
from understudy.training.overfit import STEPS, UNREAD, OverfitData, Repeated, told, with_steps

DRAFTS = ("--threshold", "0", "--draft-steps", "3", "--exit-layer", "3")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def data(rank: int = 0, world: int = 1, **options: Any) -> OverfitData:
    ranks: Any = SimpleNamespace(rank=rank, world=world, main=True, of_main=lambda value: value)
    return OverfitData(OfflineOptions(**{"eval_max_new_tokens": 12, **options}), target(), ranks)


def rendered(path: Path, count: int) -> list[list[int]]:
    return [render(target().tokenizer, prompt.messages) for prompt in load_prompts(path, count)]


def test_a_drafter_that_learns_by_heart_is_accepted_more_and_more(capsys, monkeypatch, tmp_path, rows):
    folder = tmp_path / "run"
    code, out, err = train(
        capsys, monkeypatch, rows, "--overfit", "2", *DRAFTS, "--max-steps", "120", "--eval-interval", "60",
        "--eval-max-new-tokens", "30", "--log-interval", "40", "--output-dir", str(folder),
    )  # fmt: skip
    assert code == 0, err
    losses, taus = logged(folder, "eval/loss"), logged(folder, "measured/tau")
    assert losses == sorted(losses, reverse=True) and len(losses) == 3
    assert taus == sorted(taus) and taus[-1] > taus[0] + 0.4
    assert logged(folder, "measured/tau_replayed") == taus
    outcome = json.loads(out.splitlines()[-1])["overfit"]
    assert outcome["tau"] == pytest.approx(taus[-1])
    assert outcome["accuracy"] == pytest.approx(logged(folder, "measured/accuracy_1")[-1:])
    # 29 tokens after the first, twice, in cycles of four: eight cycles each
    assert outcome["tau_at_most"] == 58 / 16 and outcome["tau"] <= outcome["tau_at_most"]
    assert err.splitlines()[-1] == told(outcome)
    assert told(outcome).startswith(f"overfit: accuracy {outcome['accuracy'][0]:.3f} per position, measured accept")
    assert told(outcome).endswith(f"{taus[-1]:.2f} of at most 3.62")
    event = next(event for event in read_events(folder / "events.jsonl") if event["event"] == "data")
    assert event["report"]["overfit"] == 2 and event["report"]["supervised"] == 60


def test_it_is_resumed_like_any_run(capsys, monkeypatch, tmp_path, rows):
    taus = {}
    for name, parts in (("whole", (("4",),)), ("cut", (("2",), ("4", "--resume")))):
        for steps, *more in parts:
            args = ("--overfit", "3", "--max-steps", steps, "--warmup-steps", "0", "--min-lr-ratio", "1", *more)
            code, _, err = train(capsys, monkeypatch, rows, *args, "--output-dir", str(tmp_path / name))
            assert code == 0, err
        taus[name] = logged(tmp_path / name, "train/loss")
    assert taus["cut"] == taus["whole"] and len(taus["cut"]) == 4
    code, _, err = train(capsys, monkeypatch, rows, "--overfit", "2", "--resume", "--output-dir", str(tmp_path / "cut"))
    assert code == 2 and "did not learn these texts by heart" in err


def test_texts_are_what_the_target_writes(rows):
    found = data(overfit=3, eval_data_path=rows)
    assert found.prompts() == rendered(rows, 3)
    assert found.answers == [tiny.continuation(target().model, p, 12, eos=target().eos_ids) for p in found.prompts()]
    counts = torch.zeros(target().vocab_size, dtype=torch.int64)
    for answer in found.answers:
        for token in answer:
            counts[token] += 1
    assert torch.equal(found.token_counts(), counts)
    found.bind(Needs(last=True))
    (batch,) = found.batches
    assert batch.ids.shape[0] == 3 and found.held_out is not None and len(list(found.held_out)) == 1
    for row, (prompt, answer) in enumerate(zip(found.prompts(), found.answers, strict=True)):
        size = len(prompt) + len(answer)
        assert batch.ids[row, :size].tolist() == prompt + answer
        assert batch.mask[row].nonzero()[:, 0].tolist() == list(range(len(prompt), size))
        assert (batch.documents[row] >= 0).sum() == size


def test_where_the_prompts_come_from(rows, tmp_path):
    others = tmp_path / "others.jsonl"
    others.write_text('{"prompt": "Write g."}\n')
    assert data(overfit=1, eval_prompts=others, eval_data_path=rows).prompts() == rendered(others, 1)
    assert data(overfit=1, train_data_path=others, eval_data_path=rows).prompts() == rendered(rows, 1)
    assert data(overfit=1, train_data_path=others).prompts() == rendered(others, 1)
    builtin = next(ids for ids in rendered(prompts_path(), 8) if len(ids) < 256 - 12)  # room for an answer
    assert data(overfit=1).prompts() == [builtin]
    with pytest.raises(UserError, match=r"--overfit 2: only 1 prompts of .*others\.jsonl can be taken"):
        data(overfit=2, eval_prompts=others)


def test_ranks_share_the_texts_and_take_equally_many_steps(rows):
    seen = []
    for rank in (0, 1):
        found = data(rank, 2, overfit=3, eval_data_path=rows, batch_size=1)
        found.bind(Needs(last=True))
        batches = list(found.batches)
        assert len(batches) == found.batches.steps_per_epoch == 2
        seen += [b.ids[0].tolist()[: len(found.prompts()[0])] for b in batches]
    assert {tuple(ids) for ids in seen} == {tuple(ids) for ids in rendered(rows, 3)}


def test_batches_repeat_and_go_on_where_they_stopped(rows):
    found = data(overfit=3, eval_data_path=rows, batch_size=2)
    found.bind(Needs(last=True))
    batches = found.batches
    first, *_ = batches
    assert batches.state_dict()["epoch"] == 1 and torch.equal(next(iter(batches)).ids, first.ids)
    state = json.loads(json.dumps(batches.state_dict()))
    again = Repeated(batches.batches, batches.identity)  # type: ignore[attr-defined]
    again.load_state_dict(state)
    (left,) = again
    assert torch.equal(left.ids, batches.batches[1].ids) and again.state_dict()["epoch"] == 2  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="did not learn these texts"):
        Repeated(batches.batches, "others").load_state_dict(state)  # type: ignore[attr-defined]


def test_how_long_it_takes():
    assert with_steps(OfflineOptions(overfit=1)).max_steps == STEPS
    assert with_steps(OfflineOptions(overfit=1, max_steps=7)).max_steps == 7
    assert with_steps(OfflineOptions(overfit=1, num_epochs=7)).max_steps is None
    assert with_steps(OfflineOptions()).max_steps is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"overfit": 1, "features": "x"}, "give one"),
        ({"overfit": 1, "eval_interval": 0}, "--eval-interval 0 measures nothing"),
        ({"overfit": -1}, "greater than or equal to 0"),
    ],
)
def test_options_that_do_not_go_together(options, says):
    with pytest.raises(pydantic.ValidationError, match=says):
        OfflineOptions(**options)


@pytest.mark.parametrize("option", sorted(UNREAD))
def test_options_that_it_would_not_read(option, capsys, monkeypatch, tmp_path, rows):
    name = f"--{option.replace('_', '-')}"
    value = () if OfflineOptions.model_fields[option].annotation is bool else ("3",)
    args = ("--overfit", "1", name, *value, "--output-dir", str(tmp_path / "run"))
    code, _, err = train(capsys, monkeypatch, rows, *args)
    assert code == 2 and f"error: {name} has no meaning beside --overfit" in err
    assert not (tmp_path / "run").exists()


def test_no_file_is_needed(capsys, monkeypatch, tmp_path):
    from understudy.cli import offline

    monkeypatch.setattr(offline, "load", lambda config: target())
    args = ("--overfit", "1", "--max-steps", "1", "--eval-max-new-tokens", "4", "--device", "cpu")
    assert cli.main(["train", "kangaroo", *args, "--output-dir", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["overfit"]["tau"] >= 1
    assert not (tmp_path / "run" / ".data").exists()
