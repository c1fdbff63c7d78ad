"""Whole runs: what every option changes, going on after a kill, the commands, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import tiny
from training import rl
from understudy.cli.experiment import command as experiment_group
from understudy.cli.train_dvi_rl import TrainDviRlConfig
from understudy.cli.train_dvi_rl import command as train_command
from understudy.core.errors import UserError
from understudy.telemetry.run import read_events
from understudy.training.dvi_rl import main
from understudy.training.dvi_rl import train as training
from understudy.training.dvi_rl.config import DviRlConfig, DviRlExperimentConfig
from understudy.training.dvi_rl.experiment import experiment
from understudy.training.dvi_rl.train import train

LAYERS = 3
TIMES = ("tokens_per_s", "update_s")
SMALL = {
    "fast_batch": 3, "buffer_size": 12, "steps": 3, "threshold": 0.0, "max_new_tokens": 8, "lr_s": 1e-2, "lr_d": 1e-3,
    "rank": 2, "max_steps": 2, "slow_every": 1, "exit_layer": 1, "baseline_init": 0.4,
}  # fmt: skip


def small():
    return rl.target(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return rl.data(tmp_path_factory.mktemp("data") / "rows.jsonl", 24)


def config(folder, rows, **settings):
    return DviRlConfig(**{**SMALL, "train_data_path": rows, "output_dir": folder, **settings})


def lines(folder):
    """The log without times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_events(folder / "steps.jsonl")]


def tensors(folder):
    found = {}
    for name in ("lora_S", "lora_D"):
        if (folder / "latest" / name).exists():
            found |= load_file(folder / "latest" / name / "adapter_model.safetensors")
    return found


def outcome(folder):
    """All that a run left, times apart."""
    steps = sorted(p.name for p in (folder / "checkpoints").iterdir())
    return lines(folder), {k: v.tolist() for k, v in tensors(folder).items()}, steps


def same(a, b):
    assert lines(a) == lines(b)
    assert tensors(a).keys() == tensors(b).keys()
    assert all(torch.equal(x, tensors(b)[key]) for key, x in tensors(a).items())
    states = [json.loads((f / "latest/trainer_state/loop.json").read_text()) for f in (a, b)]
    assert states[0] == states[1]


# Options


@pytest.fixture(scope="module")
def plain_outcome(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(config(folder, rows), small())
    return outcome(folder)


CHANGES = {
    "exit_layer": 2, "fast_batch": 1, "buffer_size": 3, "slow_every": 2, "beta_kl": 5.0, "baseline_momentum": 0.1,
    "baseline_init": 0.1, "lr_s": 1e-3, "lr_d": 1e-4, "max_grad_norm": 0.01, "rank": 3, "alpha": 4.0, "steps": 2,
    "threshold": 0.9, "max_new_tokens": 6, "observed": "committed", "max_prompt_tokens": 9, "num_prompts": 1,
    "max_steps": 1, "save_every": 1, "seed": 1,
}  # fmt: skip
ELSEWHERE = {"train_data_path", "output_dir", "resume", "keep"}


def test_every_option_is_tested():
    assert CHANGES.keys() | ELSEWHERE == DviRlConfig.model_fields.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_run(name, rows, tmp_path, plain_outcome):
    train(config(tmp_path / "run", rows, **{name: CHANGES[name]}), small())
    assert outcome(tmp_path / "run") != plain_outcome


def test_the_same_options_give_the_same_run(rows, tmp_path, plain_outcome):
    train(config(tmp_path / "run", rows), small())
    assert outcome(tmp_path / "run") == plain_outcome


def test_keep_and_save_every(rows, tmp_path):
    train(config(tmp_path / "run", rows, max_steps=5, save_every=1, keep=2), small())
    assert outcome(tmp_path / "run")[2] == ["step_000004", "step_000005"]
    assert (tmp_path / "run/latest").resolve().name == "step_000005"


def test_the_data_is_what_was_named(tmp_path, plain_outcome):
    other = rl.data(tmp_path / "other.jsonl", 24, answered=False)
    train(config(tmp_path / "run", other), small())
    assert outcome(tmp_path / "run") != plain_outcome, "other answers: lora_D learns something else"


# What a run is


def test_a_run_folder(rows, tmp_path):
    said = []
    trained, learner = train(config(tmp_path / "run", rows, max_steps=3, slow_every=2), small(), said.append)
    log = lines(tmp_path / "run")
    assert [list(line)[:5] for line in log] == [["step", "loss_rl", "loss_slow", "accept_rate", "ppl_sample"]] * 3
    assert [line["loss_slow"] is None for line in log] == [True, False, True]
    assert [line["step"] for line in log] == [1, 2, 3]
    assert all(math.isfinite(line["loss_rl"]) and line["ppl_sample"] >= 1 for line in log)
    assert all(line["accepted"] >= 3 if line["cause"] == "accepted" else line["judged"] >= 12 for line in log)
    assert "changes the model" in said[0] and trained.changes_the_model
    assert (trained.reason, trained.progress.step, trained.progress.slow_steps) == ("max_steps", 3, 1)
    assert learner.progress.judged == sum(line["judged"] for line in log)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "run.yaml", "env.json", "events.jsonl", "steps.jsonl", "checkpoints", "latest"
    }  # fmt: skip
    assert [e["event"] for e in read_events(tmp_path / "run/events.jsonl")] == ["begin", "checkpoint", "end"]


def test_without_slow_updates_there_is_no_lora_d(rows, tmp_path):
    target, said = small(), []
    trained, _ = train(config(tmp_path / "run", rows, slow_every=0), target, said.append)
    assert not trained.changes_the_model and not any("changes the model" in text for text in said)
    assert {p.name for p in (tmp_path / "run/latest").resolve().iterdir()} == {"lora_S", "config.json", "trainer_state"}
    prompt = tiny.prompt()
    assert torch.equal(
        tiny.logits(target.model, prompt), tiny.logits(tiny.fresh_model("llama", num_hidden_layers=LAYERS), prompt)
    )
    assert not any("lora" in name for name, _ in target.model.named_modules())


def test_with_no_acceptance_the_full_buffer_makes_a_step(rows, tmp_path):
    train(config(tmp_path / "run", rows, fast_batch=10**6, max_steps=3), small())
    assert [line["cause"] for line in lines(tmp_path / "run")] == ["full"] * 3


def test_too_little_data_for_a_step_is_said(rows, tmp_path):
    trained, _ = train(config(tmp_path / "run", rows, num_prompts=1, fast_batch=500, buffer_size=500), small())
    assert (trained.reason, trained.progress.step) == ("num_prompts", 0)
    assert trained.left > 0
    assert trained.checkpoint.name == "step_000000"


def test_the_end_of_the_data_ends_the_run(rows, tmp_path):
    trained, _ = train(config(tmp_path / "run", rows, max_steps=None, fast_batch=200, buffer_size=60), small())
    assert (trained.reason, trained.progress.step) == ("end of data", 2)


# Going on


@pytest.mark.parametrize("slow_every", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(slow_every, rows, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config(whole, rows, max_steps=4, slow_every=slow_every), small())
    train(config(parts, rows, max_steps=2, slow_every=slow_every), small())
    said = []
    train(config(parts, rows, max_steps=4, slow_every=slow_every, resume=True), small(), said.append)
    same(whole, parts)
    assert any("continuing after step 2" in text for text in said)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("rollouts", [0, 2, 4])
def test_a_run_that_dies_anywhere_goes_on_as_if_it_had_not(rollouts, rows, tmp_path, monkeypatch):
    whole, parts, left = tmp_path / "whole", tmp_path / "parts", [rollouts]
    train(config(whole, rows, max_steps=4, save_every=2), small())
    real = training.collect

    def collect(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*args)

    monkeypatch.setattr(training, "collect", collect)
    with pytest.raises(Killed):
        train(config(parts, rows, max_steps=4, save_every=2), small())
    monkeypatch.undo()
    with (parts / "steps.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')  # a torn line
    train(config(parts, rows, max_steps=4, save_every=2, resume=True), small())
    same(whole, parts)


def test_a_checkpoint_that_nothing_points_to_yet_is_made_again(rows, tmp_path):
    folder = tmp_path / "run"
    train(config(folder, rows, max_steps=2, save_every=1), small())
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("checkpoints/step_000001", target_is_directory=True)
    train(config(folder, rows, max_steps=2, save_every=1, resume=True), small())
    whole = tmp_path / "whole"
    train(config(whole, rows, max_steps=2, save_every=1), small())
    same(whole, folder)


def test_resume_where_nothing_is_yet_begins(rows, tmp_path):
    trained, _ = train(config(tmp_path / "new", rows, resume=True), small())
    assert trained.progress.step == 2


def test_a_run_that_ended_before_its_first_step_goes_on(rows, tmp_path):
    long = {"fast_batch": 500, "buffer_size": 500}
    for prompts in (1, 2):
        trained, _ = train(config(tmp_path / "run", rows, num_prompts=prompts, resume=prompts > 1, **long), small())
        assert (trained.reason, trained.progress.step) == ("num_prompts", 0)
        assert trained.checkpoint.name == "step_000000"
    saved = [e for e in read_events(tmp_path / "run/events.jsonl") if e["event"] == "checkpoint"]
    assert len(saved) == 1, "nothing was learned that is not saved"


@pytest.mark.parametrize("change", [{"exit_layer": 2}, {"rank": 3}, {"lr_s": 1.0}, {"seed": 4}])
def test_another_run_is_not_continued(change, rows, tmp_path):
    train(config(tmp_path / "run", rows), small())
    (name,) = change
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        train(config(tmp_path / "run", rows, resume=True, **change), small())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("trainer_state/optimizers.pt", "cannot continue from"),
        ("trainer_state/loop.json", "is not JSON"),
        ("lora_S/adapter_model.safetensors", "cannot read"),
        ("lora_D/adapter_config.json", "is not JSON"),
    ],
)
def test_a_damaged_checkpoint_is_refused(file, message, rows, tmp_path):
    train(config(tmp_path / "run", rows), small())
    path = tmp_path / "run/latest" / file
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(UserError, match=message):
        train(config(tmp_path / "run", rows, resume=True), small())


def test_what_is_refused_before_anything_is_written(rows, tmp_path):
    for settings, message in (
        ({"train_data_path": Path("none.jsonl")}, "cannot read none.jsonl"),
        ({"exit_layer": LAYERS}, "leaves nothing to verify with"),
    ):
        with pytest.raises(UserError, match=message):
            train(config(tmp_path / "run", rows, **settings), small())
        assert not list((tmp_path / "run").glob("*"))
    train(config(tmp_path / "run", rows), small())
    with pytest.raises(UserError, match="holds a run"):
        train(config(tmp_path / "run", rows), small())


def test_a_refused_resume_leaves_the_folder_as_it_was(rows, tmp_path):
    train(config(tmp_path / "run", rows), small())
    before = (tmp_path / "run/run.yaml").read_text()
    with pytest.raises(UserError, match="--rank"):
        train(config(tmp_path / "run", rows, resume=True, rank=3), small())
    assert (tmp_path / "run/run.yaml").read_text() == before


def test_without_a_folder_a_new_one_is_made(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, learner = train(config(None, rows), small())
    experiment(settings(None, rows), small(), lambda text: None)
    names = sorted(place.name for place in (tmp_path / "runs").iterdir())
    assert [re.sub(r"\d{8}-\d{6}$", "TIME", name) for name in names] == ["experiment-dvi-rl-TIME", "train-dvi-rl-TIME"]
    assert learner.config.output_dir == Path("runs") / names[1]
    for name in names:
        assert f"output_dir: runs/{name}" in (tmp_path / "runs" / name / "run.yaml").read_text()
    with pytest.raises(UserError, match="--resume needs --output-dir"):
        train(config(None, rows, resume=True), small())


# Experiment


def settings(folder, rows, **more):
    return DviRlExperimentConfig(
        **{
            **SMALL,
            "train_data_path": rows,
            "eval_data_path": rows,
            "eval_num_prompts": 4,
            "output_dir": folder,
            **more,
        }
    )


def test_an_experiment(rows, tmp_path):
    target, said = small(), []
    summary = experiment(settings(tmp_path / "run", rows, slow_every=0, max_steps=3, lr_s=0.05), target, said.append)
    before, after = (json.loads((tmp_path / f"run/results/{n}.json").read_text()) for n in ("before", "after"))
    assert json.loads((tmp_path / "run/results/experiment.json").read_text()) == json.loads(json.dumps(summary))
    assert (before["step"], after["step"], before["prompts"]) == (0, 3, 4)
    texts = [tiny.prompt(8 + i % 4, seed=i) + (tiny.prompt(6, seed=100 + i) if i % 2 == 0 else []) for i in range(4)]
    total = sum(
        float(
            torch.nn.functional.cross_entropy(
                tiny.logits(tiny.fresh_model("llama", num_hidden_layers=LAYERS), t)[:-1],
                torch.tensor(t[1:]),
                reduction="sum",
            )
        )
        for t in texts
    )
    assert before["perplexity"] == pytest.approx(math.exp(total / sum(len(t) - 1 for t in texts)), rel=1e-3)
    assert after["perplexity"] == before["perplexity"] and summary["plain_outputs_changed"] == 0
    assert before["plain_outputs"] == after["plain_outputs"]
    assert list(after["drafters"]) == ["none", "early-exit", "dvi-rl"]
    assert all(row["identical"] == 1 for row in after["drafters"].values())
    untrained, bare = before["drafters"]["dvi-rl"], before["drafters"]["early-exit"]
    assert untrained["accept_rate"] == bare["accept_rate"], "B = 0 drafts what the bare exit drafts"
    assert after["drafters"]["early-exit"]["accept_rate"] == bare["accept_rate"]
    assert after["drafters"]["dvi-rl"]["tau"] != untrained["tau"]


def test_an_experiment_in_which_the_model_moves(rows, tmp_path):
    summary = experiment(settings(tmp_path / "run", rows, lr_d=0.05, max_steps=3), small(), lambda text: None)
    assert summary["training"]["changes_the_model"]
    assert summary["after"]["perplexity"] != summary["before"]["perplexity"]
    assert summary["plain_outputs_changed"] > 0
    assert all(row["identical"] == 1 for row in summary["after"]["drafters"].values())


def test_a_resumed_experiment_keeps_its_beginning(rows, tmp_path):
    experiment(settings(tmp_path / "run", rows), small(), lambda text: None)
    said = []
    summary = experiment(settings(tmp_path / "run", rows, max_steps=3, resume=True), small(), said.append)
    assert not any("before training" in text for text in said)
    assert (summary["before"]["step"], summary["after"]["step"]) == (0, 3)


def test_an_experiment_takes_as_many_prompts_as_asked_and_needs_some(rows, tmp_path):
    summary = experiment(settings(tmp_path / "run", rows, eval_num_prompts=2), small(), lambda text: None)
    assert summary["after"]["prompts"] == 2
    (tmp_path / "bad.jsonl").write_text("broken\n")
    for more, message in (
        ({"eval_data_path": None}, "give --eval-data-path too"),
        ({"eval_data_path": tmp_path / "none.jsonl"}, "cannot read .*none.jsonl"),
        ({"eval_data_path": tmp_path / "bad.jsonl"}, "has no prompt to evaluate on: 1 lines"),
    ):
        with pytest.raises(UserError, match=message):
            experiment(settings(tmp_path / "other", rows, **more), small(), lambda text: None)


# Commands


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.fresh_model("llama", num_hidden_layers=LAYERS).save_pretrained(folder)
    rl.tokenizer().save_pretrained(folder)
    return folder


FLAGS = [
    part for name, value in SMALL.items() for part in (f"--{name}", str(value))
]  # with underscores, as the source has them


def invoke(command, *args):
    return CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False, standalone_mode=False)


def test_the_train_command(saved_model, rows, tmp_path):
    result = invoke(
        train_command, "--model_name", saved_model, "--data", rows, "--output-dir", tmp_path / "run", *FLAGS
    )
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["steps"], summary["changes_the_model"]) == (2, True)
    assert summary["run"] == str(tmp_path / "run")
    assert "lora_D is on" in result.output and "step 2  loss_rl" in result.output
    assert {t.dtype for t in tensors(tmp_path / "run").values()} == {torch.float32}
    assert TrainDviRlConfig().dtype == "bfloat16"
    assert "dtype: bfloat16" in (tmp_path / "run/run.yaml").read_text()


def test_the_experiment_command(saved_model, rows, tmp_path):
    result = invoke(
        experiment_group, "dvi-rl", "--model", saved_model, "--data", rows, "--eval-data", rows, "--eval-num-prompts", 2,
        "--output-dir", tmp_path / "run", "--dtype", "float32", *FLAGS, "--slow-every", 0,
    )  # fmt: skip
    summary = json.loads(result.stdout.splitlines()[-1])
    assert result.return_value == 0
    assert summary["after"]["drafters"]["dvi-rl"]["identical"] == 1
    assert summary["run"] == str(tmp_path / "run")
    assert "early-exit" in result.stdout and "The model is what it was" in result.stdout
    assert {p.name for p in (tmp_path / "run/results").iterdir()} == {"before.json", "after.json", "experiment.json"}


def test_main_takes_a_namespace(saved_model, rows, tmp_path, capsys):
    args = Namespace(
        model_name=str(saved_model), dtype="float32", train_data_path=str(rows), output_dir=str(tmp_path / "a"), **SMALL
    )
    assert main(args).progress.step == 2
    train(config(tmp_path / "b", rows), small())
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    for wrong, message in (
        ({"fastbatch": 3}, "no option fastbatch"),
        ({"fast_batch": 0}, "fast_batch must be at least 1"),
        ({"model": "x", "model_name": "y"}, "have different values"),
    ):
        with pytest.raises(UserError, match=message):
            main(Namespace(**wrong))


@pytest.mark.slow
def test_kill_9(saved_model, rows, tmp_path):
    """A process that is really killed, as soon as it has logged its third step."""
    options = {
        "model": saved_model,
        "dtype": "float32",
        "train_data_path": rows,
        **SMALL,
        "max_steps": 6,
        "save_every": 2,
    }
    text = ", ".join(f"{k}={str(v)!r}" if isinstance(v, Path) else f"{k}={v!r}" for k, v in options.items())
    call = f"main(Namespace({text}, output_dir={str(tmp_path / 'a')!r}))"
    code = f"from argparse import Namespace; from understudy.training.dvi_rl import main; {call}"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    whole = tmp_path / "b"
    for folder, resume in ((tmp_path / "a", True), (whole, False)):
        main(Namespace(**{**options, "output_dir": folder, "resume": resume}))
    same(tmp_path / "a", whole)


@pytest.mark.parametrize(("dtype", "code"), [("float32", 1), ("bfloat16", 0)])
def test_an_output_that_differs_is_an_error_in_float32(dtype, code, monkeypatch, capsys):
    from understudy.cli import experiment_dvi_rl
    from understudy.training.dvi_rl import experiment as module

    row = {"accept_rate": 0.5, "tau": 1.5, "tokens_per_s": 9.0, "speedup_vs_none": None, "identical": 0.5}
    result = {"prompts": 2, "dtype": dtype, "perplexity": 3.0, "drafters": {"dvi-rl": row}}
    summary = {
        "before": result, "after": result, "training": {"changes_the_model": False}, "plain_outputs_changed": 0.0,
        "config": {"output_dir": "run"}, "env": {},
    }  # fmt: skip
    monkeypatch.setattr(module, "experiment", lambda *_: summary)
    monkeypatch.setattr(experiment_dvi_rl, "load", lambda _: None)
    assert experiment_dvi_rl.command.main([], standalone_mode=False) == code
    assert ("must not happen" in capsys.readouterr().out) == (code == 1)
