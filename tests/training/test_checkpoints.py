"""Checkpoints: whole or not there, found under every name of a run, and refused in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import toy
from understudy.core.checkpoints import find_checkpoint, steps_of
from understudy.core.errors import UserError
from understudy.training.checkpoints import Checkpoints, load_masters, read_state


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 8 steps with checkpoints at 2, 4, 6, 8; the best one is that of step 4."""
    taus = iter([1.0, 1.1, 1.9, 1.2, 1.3])
    out = tmp_path_factory.mktemp("run")
    toy.run(out, eval_interval=2, save_interval=2, keep=9, measure=lambda: {"tau": next(taus)})
    return out


def test_what_a_checkpoint_holds(finished):
    place = find_checkpoint(finished / "best")
    assert sorted(p.name for p in place.iterdir()) == [
        "config.json",
        "model.safetensors",
        "trainer_state",
        "understudy.json",
    ]
    card = json.loads((place / "understudy.json").read_text())
    assert card["training"]["step"] == card["training"]["figures_step"] == 4
    assert card["training"]["figures"]["measured/tau"] == card["training"]["best_tau"] == 1.9
    assert card["env"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["", "best", "checkpoints", "checkpoints/step_000004"])
def test_every_name_of_the_best_checkpoint(name, finished):
    assert find_checkpoint(finished / name).resolve() == finished / "checkpoints" / "step_000004"


@pytest.mark.parametrize("name", ["latest", "checkpoints/step_000008"])
def test_every_name_of_the_latest_checkpoint(name, finished):
    assert find_checkpoint(finished / name).resolve() == finished / "checkpoints" / "step_000008"
    assert find_checkpoint(finished, prefer="latest").name == "step_000008"


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither config\.json nor best"):
        find_checkpoint(tmp_path)


def test_names_without_symbolic_links(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    taus = iter([1.0, 1.9, 1.2])
    toy.run(tmp_path, max_steps=4, eval_interval=2, save_interval=1, keep=1, measure=lambda: {"tau": next(taus)})
    assert (tmp_path / "best").read_text() == "checkpoints/step_000002\n"
    assert find_checkpoint(tmp_path / "best") == find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_000002"
    assert find_checkpoint(tmp_path / "latest").name == "step_000004"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


@pytest.mark.parametrize(("keep", "left"), [(1, [2, 8]), (2, [2, 7, 8]), (9, [0, 1, 2, 3, 4, 5, 6, 7, 8])])
def test_the_newest_are_kept_and_the_best(keep, left, tmp_path):
    taus = iter([1.0, 1.9, 1.2, 1.3, 1.4])
    toy.run(tmp_path, eval_interval=2, save_interval=1, keep=keep, measure=lambda: {"tau": next(taus)})
    assert [int(p.name[5:]) for p in sorted((tmp_path / "checkpoints").iterdir())] == left


def test_a_folder_that_holds_a_run_is_refused(finished):
    before = sorted(finished.rglob("*"))
    with pytest.raises(UserError, match="give --resume to continue it, or another --output-dir"):
        toy.run(finished)
    assert sorted(finished.rglob("*")) == before


class Killed(BaseException):
    """Nobody catches it: the disk is left as a kill leaves it."""


class Dying(toy.Toy):
    """Dies at the save number `at`, in the middle of its weights; by SIGKILL, or with `soft` by an exception."""

    def __init__(self, at: int, soft: bool) -> None:
        super().__init__()
        self.at, self.soft, self.saves = at, soft, 0

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.saves += 1
        if self.saves == self.at:
            whole = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
            if self.soft:
                raise Killed
            os.kill(os.getpid(), signal.SIGKILL)


def goes_on_as_if_nothing_happened(out: Path, whole: Path) -> None:
    """What a killed run left in `out` is its checkpoint of step 4; resumed, it ends as the run in `whole`."""
    place = find_checkpoint(out, prefer="latest")
    assert place.name == "step_000004" and find_checkpoint(out / "latest").name == "step_000004"
    assert load_file(place / "model.safetensors") and read_state(place).loop["counters"]["step"] == 4
    assert list((out / "checkpoints").glob(".step_*")), "the half of a save is there, or nothing was tested"
    result, resumed, _ = toy.run(out, save_interval=2, resume=True)
    assert result.step == 8 and not list((out / "checkpoints").glob(".step_*"))
    _, uninterrupted, _ = toy.run(whole, save_interval=2)
    for a, b in zip(toy.weights(resumed).values(), toy.weights(uninterrupted).values(), strict=True):
        assert torch.equal(a, b)


def test_death_while_saving_leaves_the_checkpoint_before(tmp_path):
    with pytest.raises(Killed):
        toy.run(tmp_path / "a", objective=Dying(3, soft=True), save_interval=2)
    goes_on_as_if_nothing_happened(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_kill_while_saving_leaves_the_checkpoint_before(tmp_path):
    code = (
        "import sys; from pathlib import Path; from training import toy, test_checkpoints as t;"
        "toy.run(Path(sys.argv[1]), objective=t.Dying(3, soft=False), save_interval=2)"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a"], env=env, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    goes_on_as_if_nothing_happened(tmp_path / "a", tmp_path / "b")


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(toy.Toy, "save", full)
    with pytest.raises(UserError, match="No space left on device; free space and --resume"):
        toy.run(tmp_path)


def test_links_are_relative_so_that_runs_can_be_moved(finished, tmp_path):
    assert os.readlink(finished / "best") == "checkpoints/step_000004"


def test_a_checkpoint_of_other_weights_is_refused(finished):
    masters = read_state(finished / "best").masters
    with pytest.raises(UserError, match="trains other weights than this run: unused is in only one of them"):
        load_masters(toy.Toy(unused=True), masters, finished)
    odd = toy.Toy()
    odd.drafter.head = torch.nn.Linear(8, toy.V + 1)
    with pytest.raises(UserError, match=r"head.weight is \[11, 8\] there and \[12, 8\] in this run"):
        load_masters(odd, masters, finished)


def test_a_checkpoint_without_trainer_state(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="training can start from its weights, but not continue"):
        read_state(find_checkpoint(tmp_path))


@pytest.mark.parametrize("name", ["master.safetensors", "optimizer.safetensors", "rng.pt", "loop.json"])
def test_a_damaged_file_is_named(name, tmp_path):
    toy.run(tmp_path, max_steps=1)
    place = find_checkpoint(tmp_path / "latest") / "trainer_state" / name
    place.write_bytes(place.read_bytes()[:20])
    with pytest.raises(UserError, match="continue from another checkpoint"):
        toy.run(tmp_path, max_steps=1, resume=True)


def test_an_unfinished_folder_is_no_checkpoint(tmp_path):
    store = Checkpoints(tmp_path, keep=3)
    store.save(1, lambda folder: (folder / "config.json").write_text("{}") and None)
    (tmp_path / "checkpoints" / "step_000002").mkdir()  # no config.json: somebody else's
    (tmp_path / "checkpoints" / ".step_000003.new").mkdir()
    assert find_checkpoint(tmp_path, prefer="latest").name == "step_000001"
    assert list(steps_of(tmp_path / "checkpoints")) == [1]


def test_a_state_that_would_run_code_is_not_read(tmp_path):
    toy.run(tmp_path, max_steps=1)
    place = find_checkpoint(tmp_path / "latest") / "trainer_state"
    torch.save([{"torch": Path("x")}], place / "rng.pt")
    with pytest.raises(UserError, match="cannot read"):
        read_state(place.parent)
    save_file({}, place / "master.safetensors")
