"""Two processes are one with twice the batch: DDP and FSDP2, on the CPU over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training import toy
from understudy.core.checkpoints import find_checkpoint
from understudy.training.checkpoints import read_state

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {
    "num_epochs": 2, "max_steps": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1, "eval_interval": 2,
}  # fmt: skip
EMPTY = (0, 3)  # with one row per batch, some ranks have a batch without supervision where the other has one


def launch(
    folder: Path, *, fsdp: bool, processes: int = 2, module: str = "training.toy", **task: Any
) -> dict[str, Any]:
    """A run of `module` on two processes, and what rank 0 logged."""
    folder.mkdir(exist_ok=True)
    options = {**OPTIONS, "batch_size": 1, "fsdp": fsdp, **task.pop("options", {})}
    task = {"out": str(folder / "run"), "log": str(folder / "log.json"), "empty": EMPTY, "options": options, **task}
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", module, str(folder / "task.json")]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("step 1/4") <= 1, "one rank speaks"
    return json.loads((folder / "log.json").read_text())  # type: ignore[no-any-return]


def alone(out: Path, **toy_options: Any) -> toy.Lines:
    objective = toy.Toy(**toy_options)

    def measure() -> dict[str, float]:
        drafter = objective.drafter
        return {"tau": 1 + float(drafter.head(drafter.up(toy.TABLE.to(drafter.up.weight.dtype))).float().abs().mean())}

    rows = toy.Rows(size=2, empty=EMPTY)
    _, _, log = toy.run(
        out, objective=objective, batches=rows, held_out=True, measure=measure, **{**OPTIONS, "batch_size": 2}
    )
    return log


def agree(log: toy.Lines, other: dict[str, Any], names: tuple[str, ...], rel: float = 1e-5) -> None:
    for name in names:
        theirs = {step: values[name] for step, values in other["values"] if name in values}
        assert log.of(name) and theirs == pytest.approx(log.of(name), rel=rel), name


def same_state(a: Path, b: Path, atol: float) -> None:
    one, two = (read_state(find_checkpoint(path, prefer="latest")) for path in (a, b))
    for x, y in ((one.masters, two.masters), (one.optimizer, two.optimizer)):
        assert x.keys() == y.keys()
        for name in x:
            assert torch.allclose(x[name].float(), y[name].float(), atol=atol), name


FIGURES = (
    "train/loss", "train/grad_norm", "train/acc_0", "train/lr", "train/tokens", "train/supervised", "eval/loss", "eval/tau_sim",
    "measured/tau",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp", "by_tokens"), [(False, False), (True, False), (False, True)], ids=["ddp", "fsdp", "ddp-divisor"]
)
def test_two_processes_are_one_with_twice_the_batch(fsdp, by_tokens, tmp_path):
    """Ragged counts, batches without supervision on one rank, and a weight that no batch reaches."""
    log = alone(tmp_path / "one", unused=True, by_tokens=by_tokens)
    two = launch(tmp_path / "two", fsdp=fsdp, toy={"unused": True, "by_tokens": by_tokens})
    assert two["step"] == 4 and two["reason"] == "done"
    every = toy.held(toy.Toy(unused=True))
    assert two["held"] == every if not fsdp else every / 2 <= two["held"] < 0.6 * every
    agree(log, two, FIGURES)
    one, other = (
        load_file(find_checkpoint(p / "latest") / "model.safetensors") for p in (tmp_path / "one", tmp_path / "two/run")
    )
    for name in one:
        assert torch.allclose(one[name], other[name], atol=1e-5), name
    assert not torch.equal(one["head.weight"], toy.Toy().drafter.head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_sigterm_on_one_of_two_stops_both_and_both_go_on(fsdp, tmp_path):
    """bf16 weights with fp32 masters, dropout with a stream per rank: stopped on rank 1 and resumed = uninterrupted."""
    toy_options = {"dropout": 0.2, "dtype": "bfloat16"}
    launch(tmp_path / "whole", fsdp=fsdp, toy=toy_options)
    folder = tmp_path / "cut"
    first = launch(folder, fsdp=fsdp, toy=toy_options, term_at=3, term_rank=1)
    assert (first["step"], first["reason"]) == (2, "SIGTERM")
    second = launch(folder, fsdp=fsdp, toy=toy_options, options={"resume": True})
    assert second["step"] == 4
    same_state(tmp_path / "whole/run", folder / "run", atol=0.0)
    assert load_file(find_checkpoint(folder / "run") / "model.safetensors")["head.weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_sharded_state_is_saved_whole_and_goes_on_in_one_process(tmp_path):
    launch(tmp_path / "two", fsdp=True, term_at=4)
    log = alone(tmp_path / "one")
    result, _, rest = toy.run(
        tmp_path / "two/run",
        batches=toy.Rows(size=2, empty=EMPTY),
        resume=True,
        **{**OPTIONS, "batch_size": 2, "eval_interval": 0},
    )
    assert result.step == 4
    whole = {step: value for step, value in log.of("train/loss").items() if step > 2}
    assert rest.of("train/loss") == pytest.approx(whole, rel=1e-4)
