"""A learner goes on from its checkpoint as if it had not stopped; a killed one leaves whole files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from online.fake import FakeDrafter, World
from understudy.core.errors import UserError
from understudy.drafters.early_exit.saved import find, read_saved
from understudy.drafting.learning import LearnOptions
from understudy.drafting.lora import lora_state_dict
from understudy.training.online import OnlineLearner, OnlineTrainer, PiecewiseSchedule, load_ckpt, save_ckpt


def make(drafter: FakeDrafter, lr: float = 1e-2) -> OnlineTrainer:
    schedule = PiecewiseSchedule(4, 1.0, 0.1, 0.2)
    return OnlineTrainer(drafter, lr, 1.5, schedule, 0, "topk", 20, 50, guard=0)


def numbers(stats: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in stats.items() if name != "ms"}


def test_reloaded_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    world = World()
    drafter = world.drafter()
    batches = [world.batch(32, drafter) for _ in range(12)]
    one = make(drafter)
    for i, batch in enumerate(batches[:6]):
        one.step(batch, i)
    save_ckpt(tmp_path / "x.pt", drafter, one.optimizer, one.schedule, one.baseline)
    expected = [numbers(one.step(batch, i + 6)) for i, batch in enumerate(batches[6:])]

    other_drafter = world.drafter(seed=9)
    other = make(other_drafter)
    other.baseline = load_ckpt(tmp_path / "x.pt", other_drafter, other.optimizer, other.schedule)
    assert other.schedule.step == 5
    assert [numbers(other.step(batch, i + 6)) for i, batch in enumerate(batches[6:])] == expected
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))
    # and each part of the state matters
    for part in ("optimizer", "schedule", "baseline"):
        drafter = world.drafter()
        cut = make(drafter)
        cut.baseline = load_ckpt(tmp_path / "x.pt", drafter, cut.optimizer, cut.schedule)
        if part == "optimizer":
            cut.optimizer.state.clear()
        if part == "schedule":
            cut.schedule.load_state_dict({"step": 0})
        if part == "baseline":
            cut.baseline = 0.0
        steps = [cut.schedule.step + 1 + i for i in range(6)]
        assert [numbers(cut.step(b, s)) for b, s in zip(batches[6:], steps, strict=True)] != expected


def test_the_learning_rate_is_an_option_and_not_state(tmp_path: Path) -> None:
    drafter = World().drafter()
    one = make(drafter)
    one.step(World().batch(8, drafter), 0)
    save_ckpt(tmp_path / "x.pt", drafter, one.optimizer, one.schedule, 0.5)
    other = make(drafter, lr=1e-4)
    assert load_ckpt(tmp_path / "x.pt", drafter, other.optimizer, other.schedule) == 0.5
    assert other.optimizer.param_groups[0]["lr"] == 1e-4 and other.optimizer.state


def test_foreign_and_half_files(tmp_path: Path) -> None:
    drafter = World().drafter()
    one = make(drafter)
    path = tmp_path / "x.pt"
    save_ckpt(path, drafter, one.optimizer, one.schedule, 0.0)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError):
            load_ckpt(path, drafter, one.optimizer, one.schedule)
    torch.save(lora_state_dict(drafter), path)
    with pytest.raises(UserError, match="lora is missing"):
        load_ckpt(path, drafter, one.optimizer, one.schedule)
    short = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
    damaged = [("optimizer", {"state": 3}), ("optimizer", short), ("schedule", {}), ("baseline", "x")]
    for key, value in damaged:
        path.write_bytes(whole)
        torch.save(torch.load(path, weights_only=True) | {key: value}, path)
        with pytest.raises(UserError):
            load_ckpt(path, drafter, one.optimizer, one.schedule)


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = World().drafter()
    one = make(drafter)
    path = tmp_path / "x.pt"
    save_ckpt(path, drafter, one.optimizer, one.schedule, 0.25)

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="gone"):
        save_ckpt(path, drafter, one.optimizer, one.schedule, 0.75)
    assert load_ckpt(path, drafter, one.optimizer, one.schedule) == 0.25
    assert os.listdir(tmp_path) == ["x.pt"]


def options(folder: Path | None, **more: object) -> LearnOptions:
    values = {"dvi_online": True, "dvi_update_every": 2, "dvi_batch_size": 8, "max_online_train_ms": 0, "dvi_lr": 1e-2}
    return LearnOptions.model_validate({**values, "save_lora_path": folder, **more})


def test_a_learner_saves_by_updates_and_at_the_end(tmp_path: Path) -> None:
    world = World()
    drafter = world.drafter()
    learner = OnlineLearner(drafter, options(tmp_path / "out", save_lora_every=3))
    weights: dict[int, dict[str, torch.Tensor]] = {}
    while learner.trainer.ran < 7:
        learner.on_cycle(world.cycle(drafter))
        weights.setdefault(learner.trainer.ran, lora_state_dict(drafter))
    steps = sorted(p.name for p in (tmp_path / "out").glob("step_*.pt"))
    assert len(steps) == 2 and all(len(name) == len("step_00000000.pt") for name in steps)
    latest = read_saved(tmp_path / "out" / "latest.pt").lora
    assert all(torch.equal(latest[k], v) for k, v in weights[6].items())
    assert not (tmp_path / "out" / "final.pt").exists()
    learner.close()
    final = read_saved(tmp_path / "out" / "final.pt").lora
    assert all(torch.equal(final[k], v) for k, v in lora_state_dict(drafter).items())

    again_drafter = world.drafter(seed=5)
    again = OnlineLearner(again_drafter, options(None, load_lora=tmp_path / "out" / "final.pt"))
    assert again.global_step == learner.global_step and again.trainer.baseline == learner.trainer.baseline
    assert all(torch.equal(final[k], v) for k, v in lora_state_dict(again_drafter).items())
    again.trainer.guard.restore()  # what was loaded is the first that is known to be good
    assert all(torch.equal(final[k], v) for k, v in lora_state_dict(again_drafter).items())

    torch.save(final, tmp_path / "bare.pt")
    fresh = OnlineLearner(world.drafter(seed=6), options(None, load_lora=tmp_path / "bare.pt"))
    assert fresh.global_step == 0 and all(torch.equal(final[k], v) for k, v in lora_state_dict(fresh.drafter).items())


def test_what_a_killed_run_saved_comes_before_what_an_earlier_one_left(tmp_path: Path) -> None:
    world = World()

    def run(updates: int, seed: int) -> OnlineLearner:
        learner = OnlineLearner(world.drafter(seed=seed), options(tmp_path, save_lora_every=3))
        while learner.trainer.ran < updates:
            learner.on_cycle(world.cycle(learner.drafter))  # type: ignore[arg-type]
        return learner

    def same(learner: OnlineLearner) -> bool:
        saved = read_saved(find(tmp_path)).lora
        return all(torch.equal(saved[name], value) for name, value in lora_state_dict(learner.drafter).items())

    first = run(4, seed=1)
    first.close()
    assert find(tmp_path).name == "final.pt" and same(first)
    run(2, seed=2)  # killed before it saved anything: the first one's end is the last state there is
    assert find(tmp_path).name == "final.pt" and same(first)
    second = run(3, seed=2)  # killed
    assert find(tmp_path).name == "latest.pt" and same(second)
    second.close()
    assert find(tmp_path).name == "final.pt" and same(second)


def test_mistakes_show_before_anything_is_decoded(tmp_path: Path) -> None:
    drafter = World().drafter()
    with pytest.raises(UserError, match="--save-lora-path"):
        OnlineLearner(drafter, options(None, save_lora_every=3))
    with pytest.raises(UserError, match="no LoRA checkpoint"):
        OnlineLearner(drafter, options(None, load_lora=tmp_path / "none.pt"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        OnlineLearner(drafter, options(tmp_path / "file"))


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".latest.pt.x1y2").write_bytes(b"half")
    (tmp_path / "latest.pt").write_bytes(b"not mine to clear")
    OnlineLearner(World().drafter(), options(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["latest.pt"]


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from online.fake import World
from online.test_checkpoints import options
from understudy.training.online import OnlineLearner
world = World()
drafter = world.drafter()
learner = OnlineLearner(drafter, options(Path(sys.argv[1]), save_lora_every=2), lambda s: print(int(s["global_step"]), flush=True))
while True:
    learner.on_cycle(world.cycle(drafter))
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.013, 0.031, 0.057])
def test_killed_hard_it_loses_at_most_one_interval(tmp_path: Path, delay: float) -> None:
    tests = str(Path(__file__).parents[1])
    run = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), tests], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for _ in range(12):
        run.stdout.readline()
    time.sleep(delay)
    run.send_signal(signal.SIGKILL)
    steps = [int(line) for line in run.stdout.read().split()]
    run.wait()
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) >= 6
    for file in files:
        drafter = World().drafter()
        learner = OnlineLearner(drafter, options(None, load_lora=file))
        if file.name.startswith("step"):
            assert file.name == f"step_{learner.global_step:08d}.pt"
        if file.name == "latest.pt" and steps:
            # the last update that was reported, less one interval of 2 updates, 2 passes each
            assert learner.global_step >= steps[-1] - 4
