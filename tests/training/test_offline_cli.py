"""`understudy train kangaroo` from options to checkpoints, on a tiny target with the built-in model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from training.kangaroo import logged, run, target, train, write_rows
from understudy import cli
from understudy.core.records import Needs
from understudy.drafters.early_exit.files import read_adapter
from understudy.drafters.early_exit.objective import ExitObjectiveConfig, train_kangaroo
from understudy.drafting.spec import build
from understudy.features.live import LiveFeatures
from understudy.features.store import StoredFeatures
from understudy.telemetry.run import read_events, read_table


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def test_a_run_ends_with_a_drafter_that_decodes(capsys, monkeypatch, tmp_path, rows):
    folder = run(capsys, monkeypatch, rows, tmp_path / "run")
    losses = logged(folder, "train/loss")
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert logged(folder, "measured/tau")[-1] >= 1 and logged(folder, "eval/acc_1")
    drafter = build(f"kangaroo:{folder}", target())
    assert drafter.adapter is not None and drafter.config.exit_layer == 2
    card = json.loads((folder / "best" / "understudy.json").read_text())
    assert card["drafter"] == "kangaroo" and card["taps"] == [2] and card["servable"]["vllm"] != "ok"
    data = next(event for event in read_events(folder / "events.jsonl") if event["event"] == "data")
    assert data["report"]["documents"] == 12 and data["trained_weights"] > 0
    assert not (folder / "best" / "pytorch_model.bin").exists()


def test_options_of_the_objective(capsys, monkeypatch, tmp_path, rows):
    folder = run(
        capsys, monkeypatch, rows, tmp_path / "run", "--exit-layer", "3", "--adapter-bin", "--loss-chunk", "7",
        "--threshold", "0", "--draft-steps", "2",
    )  # fmt: skip
    assert torch.load(folder / "latest" / "pytorch_model.bin", weights_only=True).keys()
    assert build(f"kangaroo:{folder}", target()).config.exit_layer == 3
    other = run(
        capsys, monkeypatch, rows, tmp_path / "other", "--exit-layer", "3", "--threshold", "1", "--draft-steps", "6"
    )
    # chunks do not change the loss; drafting options change what is measured
    assert logged(folder, "train/loss") == pytest.approx(logged(other, "train/loss"), rel=1e-4)
    columns = [read_table(run_ / "metrics" / "training.csv")[0].keys() for run_ in (folder, other)]
    assert "measured/joint_2" in columns[0] and "measured/joint_3" not in columns[0]  # two drafts at most
    assert "measured/joint_2" not in columns[1]  # never sure enough for a second one


def test_a_seed_gives_the_same_run_and_a_start_is_taken_over(capsys, monkeypatch, tmp_path, rows):
    first, second, third = (
        run(capsys, monkeypatch, rows, tmp_path / name, "--seed", seed)
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    )
    assert logged(first, "train/loss") == logged(second, "train/loss") != logged(third, "train/loss")
    for start, meant in ((first / "latest", "latest"), (first, "best")):
        warm = run(capsys, monkeypatch, rows, tmp_path / f"warm-{meant}", "--init-from", str(start), "--lr", "1e-12")
        found = read_adapter(warm / "latest", target()).state_dict()
        for name, tensor in read_adapter(first / meant, target()).state_dict().items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)


def test_captured_features_train_as_live_ones_do(capsys, monkeypatch, tmp_path, rows):
    from understudy.cli import data_capture

    monkeypatch.setattr(data_capture, "load", lambda config: target())
    stored = tmp_path / "stored"
    args = (
        "--output",
        str(stored),
        "--taps",
        "2",
        "--train-data-path",
        str(rows),
        "--batch-size",
        "2",
        "--max-length",
        "64",
        "--eval-data-path",
        str(rows),
    )
    assert cli.main(["data", "capture", *args]) == 0
    folder = run(capsys, monkeypatch, rows, tmp_path / "run", "--features", str(stored))
    live, kept = LiveFeatures(target(), Needs(taps=frozenset({2}), last=True)), StoredFeatures(stored)
    objective = train_kangaroo(ExitObjectiveConfig(), target(), None, lambda: torch.ones(4096, dtype=torch.int64))
    losses = []
    for index in range(len(kept)):
        batch = kept.batch(index)
        found, want = objective(kept(batch)), objective(live(batch))
        torch.testing.assert_close(found.loss, want.loss, rtol=1e-5, atol=1e-4)
        losses.append(float(found.loss.detach() / found.count))
    # the first step of the run saw one of these batches, with the same new weights
    assert any(logged(folder, "train/loss")[0] == pytest.approx(loss, rel=1e-4) for loss in losses)
    assert logged(folder, "eval/loss")  # the held-out part was captured too
    for args, message in (
        (("--exit-layer", "3"), "lacks tap 3"),
        (("--batch-size", "4"), "--batch-size is decided where features are captured"),
    ):
        code, _, err = train(
            capsys, monkeypatch, rows, "--features", str(stored), "--output-dir", str(tmp_path / "x"), *args
        )
        assert code == 2 and message in err


def test_what_is_evaluated(capsys, monkeypatch, tmp_path, rows):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Write g."}\n')
    one = run(capsys, monkeypatch, rows, tmp_path / "one", "--eval-prompts", str(prompts), "--eval-batches", "1")
    two = run(capsys, monkeypatch, rows, tmp_path / "two", "--eval-max-new-tokens", "12")
    assert logged(one, "measured/tokens")[-1] <= 6 < logged(two, "measured/tokens")[-1]
    assert logged(one, "eval/loss") != logged(two, "eval/loss")
    none = run(capsys, monkeypatch, rows, tmp_path / "none", eval_data=False)
    assert "measured/tau" not in read_table(none / "metrics" / "training.csv")[0]


def test_trackers_and_verbose(capsys, monkeypatch, tmp_path, rows):
    code, _, err = train(
        capsys, monkeypatch, rows, "--output-dir", str(tmp_path / "run"), "--report-to", "tensorboard", "--verbose"
    )
    assert code == 0 and "gradient norm" in err and "trainable weights" in err
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--exit-layer", "4"], "--exit-layer 4: the target has 4 layers"),
        (["--max-length", "300"], "--max-length 300 is beyond the target's context of 256"),
        (["--train-data-path", "missing.jsonl"], "cannot read missing.jsonl"),
        (["--eval-prompts", "missing.jsonl"], "cannot read missing.jsonl"),
        (["--init-from", "missing"], "missing"),
        (["--features", "missing"], "missing holds no captured features"),
        (["--eval-max-new-tokens", "250"], "no prompt of .* leaves room for 250 new tokens"),
        (["--num-epochs", "0"], "--num-epochs must be at least 1"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, rows, args, message):
    import re

    code, _, err = train(capsys, monkeypatch, rows, "--output-dir", str(tmp_path / "run"), *args)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and re.search(message, lines[0]), err
    assert "Traceback" not in err


def test_a_folder_with_a_run_is_not_mixed(capsys, monkeypatch, tmp_path, rows):
    folder = run(capsys, monkeypatch, rows, tmp_path / "run")
    code, _, err = train(capsys, monkeypatch, rows, "--output-dir", str(folder))
    assert code == 2 and "holds a run" in err
    code, _, err = train(capsys, monkeypatch, rows, "--output-dir", str(folder), "--resume", "--max-steps", "5")
    assert code == 0, err
    steps = [
        row["step"] for row in read_table(folder / "metrics" / "training.csv") if row.get("train/loss") is not None
    ]
    assert steps == [1, 2, 3, 4, 5]
    shutil.rmtree(folder / "checkpoints" / "step_000005")  # as if it had died before: two steps are made again
    code, _, err = train(capsys, monkeypatch, rows, "--output-dir", str(folder), "--resume", "--max-steps", "5")
    rows_ = [
        row["step"] for row in read_table(folder / "metrics" / "training.csv") if row.get("train/loss") is not None
    ]
    assert code == 0 and rows_ == [1, 2, 3, 4, 5]
    code, _, err = train(capsys, monkeypatch, rows, "--output-dir", str(folder), "--resume", "--exit-layer", "3")
    assert code == 2 and "its taps was [2], here it is [3]" in err
    code, _, err = train(capsys, monkeypatch, rows, "--output-dir", str(tmp_path / "new"), "--resume")
    assert code == 2 and "holds no run" in err


def test_a_corrected_command_may_use_the_folder_again(capsys, monkeypatch, tmp_path, rows):
    folder = tmp_path / "run"
    assert train(capsys, monkeypatch, rows, "--output-dir", str(folder), "--exit-layer", "9")[0] == 2
    assert train(capsys, monkeypatch, rows, "--output-dir", str(folder), "--eval-prompts", "missing.jsonl")[0] == 2
    run(capsys, monkeypatch, rows, folder)


def test_epochs_end_a_run_with_its_schedule_and_its_last_figures(capsys, monkeypatch, tmp_path, rows):
    folder = run(
        capsys, monkeypatch, rows, tmp_path / "run", "--num-epochs", "1", "--max-steps", "50", "--log-interval", "40"
    )
    table = read_table(folder / "metrics" / "training.csv")
    assert [row["train/loss"] for row in table if row.get("train/loss") is not None]
    assert min(row["train/lr"] for row in table if row.get("train/lr") is not None) < 1e-2


def test_rows_that_supervise_nothing_stop_the_run_before_it_starts(capsys, monkeypatch, tmp_path, rows):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": "a question without an answer"}\n' * 3)
    code, _, err = train(capsys, monkeypatch, empty, "--output-dir", str(tmp_path / "run"), eval_data=False)
    assert code == 2 and "error: " in err and "answer" in err


def test_weights_of_another_target_start_nothing_unless_asked_for(tmp_path, capsys, monkeypatch):
    rows, first = write_rows(tmp_path / "rows.jsonl"), tmp_path / "first"
    run(capsys, monkeypatch, rows, first)
    card = first / "best" / "understudy.json"
    own = json.loads(card.read_text())
    card.write_text(json.dumps(own | {"target": own["target"] | {"fingerprint": "0" * 16}}))
    warm = ("--init-from", str(first), "--output-dir", str(tmp_path / "warm"))
    code, _, err = train(capsys, monkeypatch, rows, *warm)
    assert code == 2 and "another target" in err and "or give --any-target to start from it all the same" in err
    code, _, err = train(capsys, monkeypatch, rows, *warm, "--any-target")
    assert code == 0, err
    code, _, err = train(capsys, monkeypatch, rows, "--any-target", "--output-dir", str(tmp_path / "x"))
    assert code == 2 and "--any-target is about the weights that --init-from names" in err
    card.write_text(json.dumps(own))
    code, _, err = train(capsys, monkeypatch, rows, "--init-from", str(first), "--output-dir", str(tmp_path / "own"))
    assert code == 0, err
