"""`understudy train eagle3` from options to checkpoints, on a tiny target: every option changes something."""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

import tiny
from understudy import cli
from understudy.assets import pocket_path
from understudy.cli import data_capture, offline
from understudy.drafters.eagle3 import model as model_module
from understudy.drafters.eagle3 import objective as objective_module
from understudy.drafting.spec import build
from understudy.target.target import Target
from understudy.telemetry.run import read_table

V = 4096


@functools.cache
def target(seed: int = 0) -> Target:
    model = tiny.build("Qwen3ForCausalLM", "Qwen3Config", seed, vocab_size=V, eos_token_id=2, max_position_embeddings=256,
                       num_hidden_layers=8)  # fmt: skip
    return Target(model, AutoTokenizer.from_pretrained(pocket_path()), f"tiny {seed}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen conversations."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {
            "conversations": [
                {"from": "human", "value": f"Write f{i}."},
                {"from": "gpt", "value": f"def f{i}(x):\n    return x + {i}"},
            ]
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


BASE = ("--max-steps", "2", "--lr", "1e-2", "--warmup-steps", "0", "--min-lr-ratio", "1", "--log-interval", "1", "--device", "cpu",
        "--eval-interval", "0", "--log-samples-interval", "0")  # fmt: skip
DATA = ("--batch-size", "2", "--max-length", "64")


def train(capsys: Any, rows: Path, *args: str, seed: int = 0) -> tuple[int, str]:
    data = () if "--features" in args else ("--train-data-path", str(rows), *DATA)
    steps = () if {"--ttt-length", "--ttt-steps"} & set(args) else ("--ttt-length", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "load", lambda config: target(seed))
        code = cli.main(["train", "eagle3", *BASE, *steps, *data, *args])
    return code, capsys.readouterr().err


def run(capsys: Any, rows: Path, folder: Path, *args: str, seed: int = 0) -> Path:
    code, err = train(capsys, rows, "--output-dir", str(folder), *args, seed=seed)
    assert code == 0, err
    return folder


@pytest.fixture
def runs(capsys: Any, rows: Path, tmp_path: Path) -> Any:
    """`runs("--option", "value")` trains and returns the folder."""
    names = iter(f"run{i}" for i in range(20))
    return lambda *args, **how: run(capsys, rows, tmp_path / next(names), *args, **how)


def logged(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_table(folder / "metrics" / "training.csv") if row.get(key) is not None]


def columns(folder: Path) -> set[str]:
    return set(read_table(folder / "metrics" / "training.csv")[0])


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "latest" / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "latest" / "config.json").read_text())
    return found


def head() -> Tensor:
    return target().model.get_output_embeddings().weight


def test_a_run_ends_with_a_drafter_that_decodes(runs, rows):
    folder = runs("--max-steps", "4", "--eval-interval", "4", "--eval-data-path", str(rows), "--eval-num-prompts", "2",
                  "--eval-max-new-tokens", "8", "--draft-steps", "3")  # fmt: skip
    losses = logged(folder, "train/loss")
    assert len(losses) == 4 and losses[-1] < losses[0]
    taus = logged(folder, "measured/tau")  # of the new drafter, and at the end
    assert len(taus) == 2 and min(taus) >= 1
    assert {"eval/tau_sim", "eval/overlap_1", "eval/acc_0", "eval/cond_acc_1", "eval/joint_acc_1"} <= columns(folder)
    drafter: Any = build(f"eagle3:{folder}", target())
    assert drafter.model.taps == (2, 4, 5)  # 2, L/2, L-3 of 8 layers
    card = json.loads((folder / "best" / "understudy.json").read_text())
    assert card["drafter"] == "eagle3" and card["taps"] == [2, 4, 5] and card["servable"]["vllm"] == "ok"
    assert "measured/marginal_3" in columns(folder) and "measured/marginal_4" not in columns(folder)  # --draft-steps


def test_taps(runs):
    folder = runs("--taps", "6", "--taps", "1")
    assert config(folder)["eagle_aux_hidden_state_layer_ids"] == [1, 6] and weights(folder)["fc.weight"].shape == (
        32,
        64,
    )


def test_the_draft_vocabulary_is_that_of_the_answers(runs, rows):
    folder = runs("--draft-vocab-size", "20", "--train-head", "false")
    tokenizer, counts = target().tokenizer, Counter[int]()
    for line in rows.read_text().splitlines():
        question, answer = (turn["value"] for turn in json.loads(line)["conversations"])
        chat = [{"role": "user", "content": question}]
        before = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
        chat.append({"role": "assistant", "content": answer})
        written = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)[len(before) :]
        counts.update(written[: written.index(tokenizer.eos_token_id) + 1])  # what follows the end is the template's
    d2t = weights(folder)["d2t"]
    ids = (d2t + torch.arange(20)).tolist()
    least = sorted(counts.values())[-20]
    assert {token for token, n in counts.items() if n > least} <= set(ids) and all(
        counts[token] >= least for token in ids
    )
    assert weights(folder)["t2d"].nonzero()[:, 0].tolist() == ids
    assert torch.equal(weights(folder)["lm_head.weight"], head()[ids])


def test_where_the_head_starts_and_whether_it_learns(runs):
    still = ("--lr", "1e-12")
    assert torch.allclose(weights(runs(*still))["lm_head.weight"], head(), atol=1e-6)
    assert float(weights(runs(*still, "--head-init", "random"))["lm_head.weight"].std()) == pytest.approx(
        0.02, rel=0.05
    )
    assert not torch.allclose(weights(runs())["lm_head.weight"], head(), atol=1e-3)
    assert torch.equal(weights(runs("--no-train-head"))["lm_head.weight"], head())


@pytest.mark.parametrize("flag", ["fc_norm", "norm_before_fc", "norm_output", "norm_before_residual"])
def test_flags(flag, runs):
    plain, folder = runs("--max-steps", "1"), runs("--max-steps", "1", f"--{flag.replace('_', '-')}")
    assert config(folder)[flag] is True and config(plain)[flag] is False
    more = {"fc_norm": [f"fc_norm.{i}.weight" for i in range(3)], "norm_before_fc": ["input_norm.weight"]}.get(flag, [])
    assert sorted(weights(folder).keys() - weights(plain).keys()) == more
    same = logged(folder, "train/ploss_0") == logged(plain, "train/ploss_0")
    assert same == (flag == "norm_output")  # which only steps after the first one read
    assert logged(plain, "train/ploss_1") != logged(folder, "train/ploss_1")


def test_how_far_it_unrolls_and_what_later_steps_weigh(runs):
    one = ("--max-steps", "1")
    two, three = runs(*one), runs(*one, "--ttt-steps", "3")
    assert "train/acc_1" in columns(two) and "train/acc_2" not in columns(two) and "train/acc_2" in columns(three)
    flat, half = runs(*one, "--ttt-decay", "1"), runs(*one, "--step-decay", "0.5")
    losses = [logged(folder, "train/loss")[0] for folder in (half, two, flat)]  # of decay 0.5, 0.8 and 1: a + decay * b
    rises = (losses[1] - losses[0]) / 0.3, (losses[2] - losses[1]) / 0.2
    assert 0 < rises[0] == pytest.approx(rises[1], rel=1e-3)


@pytest.mark.parametrize("kind", ["kl", "tv", "lk"])
def test_losses(kind, runs):
    one = ("--max-steps", "1")
    plain, folder = runs(*one), runs(*one, "--loss-type", kind)
    loss, other = (logged(path, "train/ploss_0")[0] for path in (plain, folder))
    assert logged(plain, "train/acc_0") == logged(folder, "train/acc_0") and "train/overlap_0" not in columns(plain)
    if kind == "kl":
        assert 0 < other < loss
        return
    overlap = logged(folder, "train/overlap_0")[0]
    assert other == pytest.approx(1 - overlap, abs=1e-5) if kind == "tv" else other > -math.log(overlap)  # by Jensen
    assert logged(folder, "train/loss") != logged(plain, "train/loss")


def test_what_the_loss_is_divided_by_and_what_is_left_out(runs):
    one = ("--max-steps", "1", "--draft-vocab-size", "20")
    valid, every, keep = runs(*one), runs(*one, "--loss-normalizer", "all"), runs(*one, "--out-of-vocab", "keep")
    slots, tokens = (logged(valid, f"train/{name}")[0] for name in ("supervised", "tokens"))
    assert logged(every, "train/loss")[0] * tokens == pytest.approx(logged(valid, "train/loss")[0] * slots, rel=1e-4)
    assert slots < tokens and logged(keep, "train/loss")[0] > logged(valid, "train/loss")[0]
    assert logged(keep, "train/acc_0") == logged(valid, "train/acc_0")


def test_memory_options_change_no_loss(runs, monkeypatch):
    chunks, steps = set[int](), list[int]()
    sums, checkpoint = objective_module.chunked_sums, model_module.checkpoint
    monkeypatch.setattr(objective_module, "chunked_sums", lambda f, rows, *x: (chunks.add(rows), sums(f, rows, *x))[1])
    monkeypatch.setattr(model_module, "checkpoint", lambda *x, **how: (steps.append(1), checkpoint(*x, **how))[1])
    plain = runs()
    assert chunks == {1024 // 2} and not steps
    chunked, again = runs("--loss-chunk", "6"), runs("--checkpoint-steps")
    assert chunks == {1024 // 2, 3} and steps
    assert logged(chunked, "train/loss") == pytest.approx(logged(plain, "train/loss"), rel=1e-4)
    assert logged(again, "train/loss") == logged(plain, "train/loss")


def test_a_start_is_taken_over_with_its_map(runs, rows, capsys, tmp_path):
    first = runs("--draft-vocab-size", "20", "--norm-output")
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("return x", "while import class"))
    warm = runs("--init-from", str(first), "--lr", "1e-12", "--train-data-path", str(other))
    before, after = weights(first), weights(warm)
    assert torch.equal(before["d2t"], after["d2t"]) and config(warm)["norm_output"]
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    for args, message in (
        (
            ("--draft-vocab-size", "30"),
            "has draft_vocab_size 20, and a checkpoint keeps it: leave --draft-vocab-size out",
        ),
        (("--taps", "1"), r"has taps \[2, 4, 5\]"),
        (("--norm-output", "false"), "has norm_output True"),
        (("--head-init", "random"), "leave --head-init out"),
    ):
        code, err = train(capsys, rows, "--init-from", str(first), "--output-dir", str(tmp_path / "x"), *args)
        assert code == 2 and re.search(message, err), err
    code, err = train(capsys, rows, "--init-from", str(first), "--output-dir", str(tmp_path / "x"), seed=1)
    assert code == 2 and "another target" in err and "or give --any-target to start from it all the same" in err
    runs("--init-from", str(first), "--any-target", seed=1)
    code, err = train(capsys, rows, "--any-target", "--output-dir", str(tmp_path / "x"))
    assert code == 2 and "--any-target is about the weights that --init-from names" in err


def test_captured_features_train_as_live_ones_do(runs, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(data_capture, "load", lambda config: target())
    taps = [word for tap in (2, 4, 5) for word in ("--taps", str(tap))]
    stored, args = tmp_path / "stored", ("--train-data-path", str(rows), *DATA)
    assert cli.main(["data", "capture", "--output", str(stored), *taps, *args]) == 0
    live, kept = (
        runs(*how, "--max-steps", "6", "--draft-vocab-size", "30") for how in ((), ("--features", str(stored)))
    )
    assert torch.equal(weights(live)["d2t"], weights(kept)["d2t"])
    # an epoch of the same batches in another order: with a rate of nearly 0 the same losses
    still = ("--lr", "1e-12", "--num-epochs", "1", "--max-steps", "50")
    live, kept = (sorted(logged(runs(*how, *still), "train/loss")) for how in ((), ("--features", str(stored))))
    assert live == pytest.approx(kept, rel=1e-4) and len(live) > 1


@pytest.mark.parametrize(
    "options",
    [(), ("--draft-vocab-size", "20", "--norm-output", "--no-train-head", "--betas", "0.5", "--betas", "0.9")],
)
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(options, runs, rows, capsys):
    whole, cut = runs("--max-steps", "4", *options), runs("--max-steps", "2", *options)
    code, err = train(capsys, rows, "--output-dir", str(cut), "--resume", "--max-steps", "4", *options)
    assert code == 0, err
    assert logged(cut, "train/loss") == logged(whole, "train/loss")
    a, b = weights(whole), weights(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--taps", "8"], "--taps 8: taps are 0"),
        (["--taps", "1", "--taps", "1"], "each tap once"),
        (["--draft-vocab-size", "5000"], "--draft-vocab-size 5000: the target's vocabulary has 4096 tokens"),
        (["--draft-vocab-size", "0"], "--draft-vocab-size must be at least 1"),
        (["--fc-norm", "--norm-before-fc"], "--fc-norm and --norm-before-fc are two ways of the same thing"),
        (["--ttt-length", "0"], "--ttt-length must be at least 1"),
        (["--ttt-decay", "0"], "--ttt-decay must be"),
        (["--loss-type", "l1"], "--loss-type must be one of"),
        (["--loss-chunk", "0"], "--loss-chunk must be at least 1"),
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
    """One greedy answer of the target itself: every draft position becomes right, and decoding then accepts all that it drafts."""
    args = ("--overfit", "1", "--max-steps", "60", "--lr", "2e-3", "--ttt-length", "5", "--draft-steps", "4", "--eval-interval", "60",
            "--eval-max-new-tokens", "48", "--dtype", "float32", "--device", "cpu", "--output-dir", str(tmp_path / "run"))  # fmt: skip
    assert cli.main(["train", "eagle3", *args]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["overfit"]
    assert len(found["accuracy"]) == 5 and min(found["accuracy"]) > 0.95
    assert (
        found["tau_at_most"] > 4.5 and found["tau"] > 0.95 * found["tau_at_most"]
    )  # of 4 drafts and the target's own token
