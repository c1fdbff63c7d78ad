"""Resumed = uninterrupted, bit for bit; and how a run is asked to stop."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training import toy
from understudy.core.checkpoints import find_checkpoint
from understudy.core.errors import UserError
from understudy.training.checkpoints import read_state
from understudy.training.rng import preserved_rng, rng_state, set_rng_state
from understudy.training.stops import StopRequest

COMMON: dict[str, Any] = {"num_epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1}


class Drawing(toy.Toy):
    """Its loss depends on the python, numpy and torch streams."""

    def forward(self, features):  # type: ignore[no-untyped-def]
        out = super().forward(features)
        out.loss = out.loss * (1 + random.random() + float(np.random.rand()))
        return out


def stopping(at: int, how: signal.Signals = signal.SIGTERM) -> toy.Rows:
    """Data that asks the run to stop while batch `at` is read."""
    rows = toy.Rows(size=2)
    rows.hooks[at] = lambda: os.kill(os.getpid(), how)
    return rows


@pytest.mark.parametrize("batch", [1, 5, 10, 16, 24], ids=lambda b: f"batch {b}")
def test_k_and_k_steps_are_2k_steps(batch, tmp_path):
    """24 batches in 3 epochs of 8 make 12 steps; the stop falls inside epochs, on their ends, and inside a step."""
    _, whole, one = toy.run(tmp_path / "whole", objective=Drawing(dropout=0.2), **COMMON)
    first, _, _ = toy.run(tmp_path / "cut", objective=Drawing(dropout=0.2), batches=stopping(batch), **COMMON)
    assert first.step == -(-batch // 2) and first.reason == "SIGTERM"
    random.seed(99)  # nothing of this process is left
    torch.manual_seed(99)
    np.random.seed(99)
    last, resumed, two = toy.run(tmp_path / "cut", objective=Drawing(dropout=0.2), resume=True, **COMMON)
    assert (last.step, last.reason) == (12, "done")
    states = [read_state(find_checkpoint(tmp_path / run / "latest")) for run in ("whole", "cut")]
    for name in ("masters", "optimizer"):
        a, b = (getattr(state, name) for state in states)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert "drafter.head.weight:exp_avg_sq" in states[0].optimizer and "seen" in states[0].masters
    assert states[0].loop["counters"] == states[1].loop["counters"] and states[0].loop["data"] == states[1].loop["data"]
    assert torch.equal(states[0].rng[0]["torch"], states[1].rng[0]["torch"])
    assert (
        states[0].rng[0]["numpy"] == states[1].rng[0]["numpy"]
        and states[0].rng[0]["python"] == states[1].rng[0]["python"]
    )
    for name in ("train/loss", "train/lr", "train/grad_norm"):
        after = {step: value for step, value in one.of(name).items() if step > first.step}
        assert two.of(name) == after
    assert torch.equal(whole.drafter.head.weight, resumed.drafter.head.weight)


def test_the_test_above_would_see_a_lost_stream(tmp_path):
    toy.run(tmp_path, objective=Drawing(dropout=0.2), batches=stopping(6), **COMMON)
    place = find_checkpoint(tmp_path / "latest") / "trainer_state" / "rng.pt"
    state = torch.load(place, weights_only=True)
    state[0]["python"] = random.Random(1).getstate()
    torch.save(state, place)
    _, resumed, _ = toy.run(tmp_path, objective=Drawing(dropout=0.2), resume=True, **COMMON)
    _, whole, _ = toy.run(tmp_path / "whole", objective=Drawing(dropout=0.2), **COMMON)
    assert not torch.equal(whole.drafter.head.weight, resumed.drafter.head.weight)


def test_evaluations_best_and_patience_go_on_too(tmp_path):
    """The stop falls on a step with an evaluation, which then comes first when the run goes on."""

    def measure(objective: toy.Toy) -> Any:
        return lambda: {"tau": float(objective.drafter.head.weight.detach().abs().sum()) % 3}

    def run(out: Path, **more: Any):  # type: ignore[no-untyped-def]
        objective = toy.Toy()
        return toy.run(
            out, objective=objective, measure=measure(objective), held_out=True, eval_interval=2, **COMMON, **more
        )

    one, _, whole = run(tmp_path / "whole")
    _, _, first = run(tmp_path / "cut", batches=stopping(12))
    two, _, second = run(tmp_path / "cut", resume=True)
    assert max(first.of("measured/tau")) == 4 and min(second.of("measured/tau")) == 6
    assert first.of("measured/tau") | second.of("measured/tau") == whole.of("measured/tau")
    assert (one.best_tau, one.best_step) == (two.best_tau, two.best_step)
    assert find_checkpoint(tmp_path / "whole" / "best").name == find_checkpoint(tmp_path / "cut" / "best").name


def test_best_is_said_even_if_the_run_died_before_saying_it(tmp_path):
    taus = iter([1.0, 2.0])
    toy.run(tmp_path, batches=toy.Rows(rows=4, size=2), eval_interval=2, measure=lambda: {"tau": next(taus)})
    (tmp_path / "best").unlink()
    toy.run(tmp_path, batches=toy.Rows(rows=4, size=2), eval_interval=2, measure=lambda: {"tau": 1.0}, resume=True)
    assert find_checkpoint(tmp_path / "best").name == "step_000002"


def test_a_run_that_is_over_stays_as_it_is(tmp_path):
    first, _, _ = toy.run(tmp_path)
    before = (first.checkpoint / "model.safetensors").stat().st_mtime_ns
    again, _, log = toy.run(tmp_path, resume=True)
    assert again.step == first.step and not log.of("train/loss")
    assert (first.checkpoint / "model.safetensors").stat().st_mtime_ns == before


def test_more_epochs_on_resume_and_what_changed_is_logged(tmp_path):
    toy.run(tmp_path)
    result, _, log = toy.run(tmp_path, resume=True, num_epochs=2, learning_rate=0.01)
    assert result.step == 16
    changed = log.kinds("continue")[0]["changed"]
    assert changed["learning_rate"] == [0.05, 0.01] and changed["num_epochs"] == [None, 2]


def test_resume_from_another_folder(tmp_path):
    _, whole, _ = toy.run(tmp_path / "whole", **COMMON)
    toy.run(tmp_path / "cut", batches=stopping(10), **COMMON)
    before = sorted((tmp_path / "cut").rglob("*"))
    _, resumed, _ = toy.run(tmp_path / "new", resume_from=tmp_path / "cut" / "checkpoints" / "step_000005", **COMMON)
    assert torch.equal(whole.drafter.head.weight, resumed.drafter.head.weight)
    assert sorted((tmp_path / "cut").rglob("*")) == before
    with pytest.raises(UserError, match="holds a run"):
        toy.run(tmp_path / "cut", resume_from=tmp_path / "cut" / "latest", **COMMON)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        toy.run(tmp_path / "new", resume=True)


# -- being asked to stop


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(how, tmp_path, capsys):
    before = [signal.getsignal(s) for s in StopRequest.SIGNALS]
    result, _, log = toy.run(tmp_path, batches=stopping(3, how))
    assert (result.step, result.reason) == (3, how.name) and result.checkpoint.name == "step_000003"
    assert f"--output-dir {tmp_path} --resume" in capsys.readouterr().err
    assert log.kinds("end")[0]["reason"] == how.name
    assert [signal.getsignal(s) for s in StopRequest.SIGNALS] == before


@pytest.mark.usefixtures("interruptible")
def test_the_second_signal_acts_as_before():
    def twice() -> None:
        with StopRequest() as stops:
            os.kill(os.getpid(), signal.SIGINT)
            assert stops.reason == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        twice()


def test_max_minutes(tmp_path, capsys):
    rows = toy.Rows(size=2)
    rows.hooks = {i: lambda: time.sleep(0.06) for i in range(1, 400)}
    result, *_ = toy.run(tmp_path, batches=rows, num_epochs=40, max_minutes=0.3 / 60)
    assert 1 <= result.step <= 6 and result.reason == "max_minutes" and result.checkpoint.is_dir()
    assert "--max-minutes is over" in capsys.readouterr().err


def test_outside_the_main_thread_only_the_clock_counts(tmp_path):
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(toy.run(tmp_path)[0]))
    thread.start()
    thread.join()
    assert found[0].reason == "done"


@pytest.mark.slow
def test_sigterm_from_outside(tmp_path):
    """A process that trains is told to stop, ends with code 0, and another process goes on."""
    task = {
        "out": str(tmp_path / "run"),
        "log": str(tmp_path / "log.json"),
        "slow": 0.05,
        "options": {"num_epochs": 100, "batch_size": 2},
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "training.toy", tmp_path / "task.json"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "step 3/" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "--resume" in rest
    step = json.loads((tmp_path / "log.json").read_text())["step"]
    assert 3 <= step < 50
    assert read_state(find_checkpoint(tmp_path / "run", prefer="latest")).loop["counters"]["step"] == step
    result, *_ = toy.run(tmp_path / "run", resume=True, num_epochs=100, max_steps=step + 2)
    assert result.step == step + 2


def test_random_state_comes_back():
    state = rng_state()

    def draw() -> tuple[float, ...]:
        return (
            random.random(),
            random.gauss(0, 1),
            float(np.random.rand()),
            float(np.random.normal()),
            torch.rand(()).item(),
        )

    drawn = draw()
    set_rng_state(state)
    with preserved_rng():
        draw()
    assert draw() == drawn
