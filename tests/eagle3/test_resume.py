"""A run goes on only as what it began as: what no trained weight tells is compared, and what is wrong is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3 import reference
from eagle3.test_train_cli import config, logged, target, train, weights
from training.kangaroo import write_rows
from understudy.telemetry.run import read_events


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def begun(capsys: Any, rows: Path, folder: Path, *args: str) -> Path:
    code, err = train(capsys, rows, "--output-dir", str(folder), *args)
    assert code == 0, err
    return folder


def refused(capsys: Any, rows: Path, folder: Path, *args: str) -> str:
    """The one line of a refused `--resume`, after which the run is as it was."""
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")}
    code, err = train(capsys, rows, "--output-dir", str(folder), "--resume", "--max-steps", "4", *args)
    assert code == 2 and before == {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")}
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "give the data and options that it began with" in line
    return line


def test_another_shape_or_map_is_refused(capsys, rows, tmp_path):
    """Flags without weights would be lost, and a frozen head would meet the map of other data."""
    options = ("--draft-vocab-size", "20", "--norm-output", "--no-train-head")
    folder = begun(capsys, rows, tmp_path / "run", *options)
    for args, name in (
        (options[:2] + options[3:], "its shape.norm_output was True, here it is False"),
        ((*options, "--norm-before-residual"), "its shape.norm_before_residual was False, here it is True"),
        (("--draft-vocab-size", "30", *options[2:]), "its shape.draft_vocab_size was 20, here it is 30"),
        (options[:3], "its frozen_weights.lm_head.weight was "),
    ):
        assert name in refused(capsys, rows, folder, *args)
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("return x", "while import class"))
    assert "its vocabulary_map was " in refused(capsys, other, folder, *options)
    begun(capsys, rows, folder, *options, "--resume", "--max-steps", "4")
    assert len(logged(folder, "train/loss")) == 4


def test_embeddings_and_a_frozen_head_of_a_start_belong_to_the_run(capsys, rows, tmp_path):
    """They are not trained, so they are in no trainer state: without the start, the target's would take their place."""
    start = tmp_path / "start"
    shutil.copytree(begun(capsys, rows, tmp_path / "first", "--max-steps", "1") / "latest", start)
    shutil.rmtree(start / "trainer_state")
    stored = load_file(start / "model.safetensors")
    own = target().embed_tokens.weight.detach() * 2
    save_file({**stored, "embed_tokens.weight": own}, start / "model.safetensors")
    folder, init = tmp_path / "run", ("--init-from", str(start))
    begun(capsys, rows, folder, *init)
    assert "its frozen_weights.embed_tokens.weight was " in refused(capsys, rows, folder)
    begun(capsys, rows, folder, *init, "--resume", "--max-steps", "4")
    assert torch.equal(weights(folder)["embed_tokens.weight"], own) and len(logged(folder, "train/loss")) == 4

    save_file({**stored, "lm_head.weight": stored["lm_head.weight"] * 2}, start / "model.safetensors")
    still = begun(capsys, rows, tmp_path / "still", "--no-train-head", *init)
    assert "its frozen_weights.lm_head.weight was " in refused(capsys, rows, still, "--no-train-head")


def test_the_card_says_what_the_configuration_says(capsys, rows, tmp_path):
    folder = begun(capsys, rows, tmp_path / "run", "--max-steps", "1", "--norm-output")
    card, written = json.loads((folder / "latest" / "understudy.json").read_text()), config(folder)
    assert card["shape"] == {key: written[key] for key in card["shape"]} and card["shape"]["norm_output"] is True
    assert card["frozen_weights"] == {} and card["vocabulary_map"] is None


def test_what_it_can_say_is_the_map_that_it_has():
    objective = reference.objective(reference.small(), draft_vocab_size=2)
    model = objective.drafter.model
    assert model.d2t is not None and objective.says is not None
    model.d2t.copy_(torch.tensor([1, 3]))  # as a checkpoint's is loaded
    assert objective.says.tolist() == [1, 4]


def test_a_step_whose_slots_are_all_left_out_is_named_once(capsys, rows, tmp_path):
    """The target, which has random weights, hardly ever says one of the two tokens that the drafter can say."""
    args = ("--draft-vocab-size", "2", "--max-steps", "3")
    found = {}
    for how in ("drop", "keep"):
        folder = tmp_path / how
        code, err = train(capsys, rows, "--output-dir", str(folder), *args, "--out-of-vocab", how)
        assert code == 0, err
        events = [event for event in read_events(folder / "events.jsonl") if event["event"] == "zero_gradient"]
        found[how] = len(events), err.count("taught nothing: zero because none of"), logged(folder, "train/ploss_0")
    assert found["drop"] == (1, 1, []) and logged(tmp_path / "drop", "train/loss") == [0, 0, 0]
    assert found["keep"][:2] == (0, 0) and len(found["keep"][2]) == 3
