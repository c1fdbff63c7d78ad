"""DFlash on two processes, over gloo: what one process with twice the batch does."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from dflash import processes
from training.test_distributed import EMPTY, OPTIONS, agree, launch
from understudy.core.checkpoints import find_checkpoint

FIGURES = ("train/loss", "train/grad_norm", "train/acc_0", "train/joint_acc_1", "train/coverage", "train/supervised",
           "train/confidence_loss_1", "eval/loss", "eval/tau_sim")  # fmt: skip
NEAR = {**OPTIONS, "learning_rate": 3e-3}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_are_one_with_twice_the_batch(fsdp: bool, tmp_path: Path) -> None:
    """Sums of weights differ between the ranks, and some batches teach one of them nothing."""
    result, objective, log = processes.run(tmp_path / "one", empty=EMPTY, **{**NEAR, "batch_size": 2})
    two = launch(tmp_path / "two", fsdp=fsdp, module="dflash.processes", options=NEAR)
    assert result.step == two["step"] == 4
    every = processes.toy.held(objective)
    assert two["held"] == every if not fsdp else every / 2 <= two["held"] < 0.6 * every
    agree(log, two, FIGURES)
    one, other = (
        load_file(find_checkpoint(path / "latest") / "model.safetensors")
        for path in (tmp_path / "one", tmp_path / "two/run")
    )
    assert one.keys() == other.keys() and {"markov_head.markov_w1.weight", "confidence_head.proj.weight"} <= one.keys()
    for name in one:
        gap = (one[name].double() - other[name].double()).abs()
        # Adam's first steps are as long for a gradient that is nothing but rounding: one such weight may be off
        assert gap.max() < 1e-4 and (gap > 1e-5).sum() <= 1, name
