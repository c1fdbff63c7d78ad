"""What training from rollouts saves, and how it goes on from there."""

from __future__ import annotations

import pytest
import torch

from training import words
from training.words import rolled, weights
from understudy.core.errors import UserError
from understudy.drafters.early_exit.saved import find, read_saved
from understudy.drafting.lora import lora_state_dict
from understudy.training.rollouts import checkpoints
from understudy.training.rollouts.options import RolloutOptions
from understudy.training.rollouts.trainer import RolloutTrainer


@pytest.fixture(scope="module")
def target():
    return words.target()


def test_a_run_that_goes_on_equals_one_that_never_stopped(target, tmp_path):
    whole, first, second = (words.drafter(target, 2) for _ in range(3))
    rollouts, options = rolled(target, whole), RolloutOptions(use_policy_grad=True)
    one = RolloutTrainer(whole, options)
    for _ in range(4):
        expected = one.step(rollouts)
    half = RolloutTrainer(first, options)
    for _ in range(2):
        half.step(rollouts)
    checkpoints.save(tmp_path / "checkpoints" / "final.pt", half)
    rest = RolloutTrainer(second, options)
    checkpoints.load(find(tmp_path), rest)
    for _ in range(2):
        found = rest.step(rollouts)
    assert found == expected and rest.updates == 4
    assert all(torch.equal(p, weights(whole)[name]) for name, p in weights(second).items())


def test_a_checkpoint_is_a_head_for_others_and_says_what_it_is(target, tmp_path):
    drafter = words.drafter(target, 2, noise=0.1, rank=3, alpha=5.0)
    checkpoints.save(tmp_path / "final.pt", RolloutTrainer(drafter, RolloutOptions()))
    assert read_saved(tmp_path / "final.pt").lora.keys() == lora_state_dict(drafter).keys()
    found = read_saved(tmp_path / "final.pt").settings
    assert found == {"exit_layer": 3, "rank": 3, "alpha": 5.0, "shallow_rank": 2, "shallow_alpha": 16.0}
    assert find(tmp_path) == tmp_path / "final.pt"


def test_checkpoints_that_do_not_fit_are_refused(target, tmp_path):
    path = tmp_path / "final.pt"
    checkpoints.save(path, RolloutTrainer(words.drafter(target, 2, noise=0.1), RolloutOptions()))
    other = RolloutTrainer(words.drafter(target, 3), RolloutOptions())
    before = weights(other.drafter)
    with pytest.raises(UserError, match=r"lora_.* is \["):
        checkpoints.load(path, other)
    assert all(torch.equal(p, before[name]) for name, p in weights(other.drafter).items())
    with pytest.raises(UserError, match="LoRA of the shallow layers does not fit"):
        checkpoints.load(path, RolloutTrainer(words.drafter(target, 0), RolloutOptions()))
    with pytest.raises(UserError, match="holds no checkpoint"):
        find(tmp_path / "..")
    with pytest.raises(UserError, match="no LoRA checkpoint"):
        read_saved(tmp_path / "missing.pt")
