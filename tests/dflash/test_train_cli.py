"""`understudy train dflash` from options to checkpoints, on a tiny target."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3.test_train_cli import BASE, DATA, columns, config, logged, target, weights
from training.kangaroo import write_rows
from understudy import cli
from understudy.cli import data_capture, offline
from understudy.drafting.spec import build


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def train(capsys: Any, rows: Path, *args: str, seed: int = 0) -> tuple[int, str]:
    data = () if "--features" in args else ("--train-data-path", str(rows), *DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "load", lambda config: target(seed))
        code = cli.main(["train", "dflash", *BASE, "--block-size", "4", *data, *args])
    return code, capsys.readouterr().err


@pytest.fixture
def runs(capsys: Any, rows: Path, tmp_path: Path) -> Any:
    """`runs("--option", "value")` trains and returns the folder."""
    names = iter(f"run{i}" for i in range(20))

    def run(*args: str, **how: Any) -> Path:
        folder = tmp_path / next(names)
        code, err = train(capsys, rows, "--output-dir", str(folder), *args, **how)
        assert code == 0, err
        return folder

    return run


def test_a_run_ends_with_a_drafter_that_decodes(runs, rows):
    folder = runs("--max-steps", "4", "--eval-interval", "4", "--eval-data-path", str(rows), "--eval-num-prompts", "2",
                  "--eval-max-new-tokens", "8", "--draft-steps", "2", "--anchors", "4", "--loss-type", "ce+kl", "--teacher", "target",
                  "--full-vocab", "--position-weights", "dpace", "--dpace-alpha", "0.3", "--loss-chunk", "9")  # fmt: skip
    losses = logged(folder, "train/loss")
    assert len(losses) == 4 and losses[-1] < losses[0]
    taus = logged(folder, "measured/tau")  # of the new drafter, and at the end
    assert len(taus) == 2 and min(taus) >= 1 and taus == pytest.approx(logged(folder, "measured/tau_replayed"))
    names = columns(folder)
    assert {"eval/tau_sim", "eval/overlap_1", "eval/acc_0", "eval/joint_acc_1", "train/acc_2"} <= names
    assert {"train/coverage", "eval/coverage"} <= names and "eval/acc_2" not in names  # --draft-steps
    assert logged(folder, "train/coverage")[0] < 1  # --anchors
    drafter: Any = build(f"dflash:{folder}", target())
    assert drafter.model.taps == (2, 3, 4, 5, 6) and drafter.steps == 3
    card = json.loads((folder / "best" / "understudy.json").read_text())
    assert card["drafter"] == "dflash" and card["taps"] == [2, 3, 4, 5, 6] and card["servable"]["vllm"] == "ok"
    assert config(folder)["target_layer_ids"] == [1, 2, 3, 4, 5] and config(folder)["block_size"] == 4


def test_a_dspark_run(runs):
    folder = runs("--markov-rank", "4", "--confidence-head", "--sliding-window", "16", "--target-layer-ids", "1,6",
                  "--num-draft-layers", "2", "--train-embeddings", "--mask-token-id", "9")  # fmt: skip
    found = weights(folder)
    assert {
        "markov_head.markov_w1.weight",
        "confidence_head.proj.weight",
        "embed_tokens.weight",
        "layers.1.mlp.up_proj.weight",
    } <= set(found)
    assert found["fc.weight"].shape == (32, 64) and "train/confidence_loss_3" in columns(folder)
    written = config(folder)
    assert (
        written["sliding_window"],
        written["markov_rank"],
        written["mask_token_id"],
        written["target_layer_ids"],
    ) == (16, 4, 9, [1, 6])
    assert not torch.equal(found["embed_tokens.weight"], target().embed_tokens.weight)
    drafter: Any = build(f"dflash:{folder},threshold=0.2", target())
    assert drafter.steps == 4


def test_the_default_has_one_layer_and_frozen_embeddings(runs):
    folder = runs()
    assert "embed_tokens.weight" not in weights(folder) and "lm_head.weight" not in weights(folder)
    assert config(folder)["num_hidden_layers"] == 1 and config(folder)["layer_types"] == ["full_attention"]


@pytest.mark.parametrize("options", [("--anchors", "3"), ("--anchors", "3", "--markov-rank", "2", "--confidence-head")])
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(options, runs, rows, capsys):
    """Random anchors too: they come from the state that the run saves."""
    whole, cut = runs("--max-steps", "4", *options), runs("--max-steps", "2", *options)
    code, err = train(capsys, rows, "--output-dir", str(cut), "--resume", "--max-steps", "4", *options)
    assert code == 0, err
    assert logged(cut, "train/loss") == logged(whole, "train/loss")
    a, b = weights(whole), weights(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_another_shape_is_not_resumed(runs, rows, capsys):
    folder = runs()
    for args, name in (
        (("--block-size", "5"), "shape.block_size was 4, here it is 5"),
        (("--taps", "2"), "its taps was [2, 3, 4, 5, 6], here it is [2]"),
        (("--mask-token-id", "9"), "shape.mask_token_id was"),
    ):
        code, err = train(capsys, rows, "--output-dir", str(folder), "--resume", "--max-steps", "4", *args)
        assert code == 2 and name in err, err


def test_a_start_is_taken_over(runs, rows, capsys, tmp_path):
    first = runs("--num-draft-layers", "2", "--markov-rank", "2")
    warm = runs("--init-from", str(first), "--lr", "1e-12")
    before, after = weights(first), weights(warm)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    code, err = train(
        capsys, rows, "--init-from", str(first), "--output-dir", str(tmp_path / "x"), "--num-draft-layers", "1"
    )
    assert code == 2 and "has num_draft_layers 2, and a checkpoint keeps it: leave --num-draft-layers out" in err
    code, err = train(capsys, rows, "--init-from", str(first), "--output-dir", str(tmp_path / "x"), seed=1)
    assert code == 2 and "another target" in err and "--any-target" in err
    runs("--init-from", str(first), "--any-target", seed=1)


def test_captured_features_train_as_live_ones_do(runs, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(data_capture, "load", lambda config: target())
    taps = [word for tap in (2, 5) for word in ("--taps", str(tap))]
    stored = tmp_path / "stored"
    assert cli.main(["data", "capture", "--output", str(stored), *taps, "--train-data-path", str(rows), *DATA]) == 0
    still = ("--lr", "1e-12", "--num-epochs", "1", "--max-steps", "50", *taps)
    live, kept = (sorted(logged(runs(*how, *still), "train/loss")) for how in ((), ("--features", str(stored))))
    assert live == pytest.approx(kept, rel=1e-4) and len(live) > 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--taps", "8"], "tap 8 "),
        (["--taps", "1", "--taps", "1"], "each one once"),
        (["--taps", "1", "--target-layer-ids", "2"], "--taps and --target-layer-ids name the same layers"),
        (["--mask-token-id", "2"], "--mask-token-id 2 is padding or a stop token"),
        (["--mask-token-id", "4096"], "--mask-token-id 4096: the target's embedding has 4096 rows"),
        (["--block-size", "1"], "--block-size must be at least 2"),
        (["--draft-steps", "4"], "4 drafts per cycle: this DFlash drafter was trained for blocks of 3 at most"),
        (["--confidence-head"], "give --markov-rank with it"),
        (["--gamma", "0"], "--gamma must be"),
        (["--full-vocab"], "--full-vocab belongs to --loss-type kl"),
        (["--loss-type", "l1"], "--loss-type must be one of"),
        (["--anchors", "0"], "--anchors must be at least 1"),
        (["--init-from", "missing"], "missing"),
    ],
)
def test_bad_input_is_one_line(args, message, capsys, rows, tmp_path):
    code, err = train(capsys, rows, "--output-dir", str(tmp_path / "run"), *args)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and re.search(message, lines[0]), err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_text_of_the_pocket_model_is_learned_by_heart(capsys, tmp_path):
    """One greedy answer of the target itself: every draft becomes right, and decoding then accepts all that it drafts."""
    args = ("--overfit", "1", "--max-steps", "120", "--lr", "3e-3", "--block-size", "5", "--num-draft-layers", "1",
            "--eval-interval", "120", "--eval-max-new-tokens", "48",
            "--dtype", "float32", "--device", "cpu", "--output-dir", str(tmp_path / "run"))  # fmt: skip
    assert cli.main(["train", "dflash", *args]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["overfit"]
    assert len(found["accuracy"]) == 4 and min(found["accuracy"]) > 0.95
    assert (
        found["tau_at_most"] > 4.5 and found["tau"] > 0.95 * found["tau_at_most"]
    )  # of 4 drafts and the target's own token
