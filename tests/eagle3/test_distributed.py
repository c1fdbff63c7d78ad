"""EAGLE-3 on two processes, over gloo: what one process with twice the batch does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3 import processes
from training.test_distributed import EMPTY, OPTIONS, agree, launch
from understudy.core.checkpoints import find_checkpoint

FIGURES = (
    "train/loss",
    "train/grad_norm",
    "train/acc_0",
    "train/joint_acc_1",
    "train/supervised",
    "eval/loss",
    "eval/tau_sim",
)
NEAR = {**OPTIONS, "learning_rate": 3e-3}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_are_one_with_twice_the_batch(fsdp: bool, tmp_path: Path) -> None:
    """Counts differ between the ranks, and some batches teach one of them nothing."""
    result, objective, log = processes.run(tmp_path / "one", empty=EMPTY, **{**NEAR, "batch_size": 2})
    two = launch(tmp_path / "two", fsdp=fsdp, module="eagle3.processes", options=NEAR)
    assert result.step == two["step"] == 4
    every = processes.toy.held(objective)
    assert two["held"] == every if not fsdp else every / 2 <= two["held"] < 0.6 * every
    agree(log, two, FIGURES)
    one, other = (
        load_file(find_checkpoint(path / "latest") / "model.safetensors")
        for path in (tmp_path / "one", tmp_path / "two/run")
    )
    assert one.keys() == other.keys() and {"d2t", "t2d", "fc_norm.0.weight"} <= one.keys()
    for name in one:
        assert torch.allclose(one[name].double(), other[name].double(), atol=1e-5), name
