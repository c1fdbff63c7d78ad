"""What an online head needs to go on: its A and B, optimizer, schedule and baseline, in one `.pt` of plain tensors and numbers.

Files appear whole or not at all. They are read with `weights_only=True`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from understudy.core.errors import UserError
from understudy.core.files import check_writable, replacing
from understudy.drafting.lora import load_lora_state_dict, lora_of, lora_state_dict, read_checkpoint
from understudy.drafting.protocols import Drafter
from understudy.training.online.schedule import PiecewiseSchedule

State = tuple[nn.Module, Optimizer, PiecewiseSchedule, float]  # model, optimizer, schedule, baseline

_TYPES: dict[str, type] = {"lora": dict, "optimizer": dict, "schedule": dict, "baseline": float}


def save_ckpt(path: str | Path, model: nn.Module, opt: Optimizer, sched: PiecewiseSchedule, ema_b: float) -> None:
    """Write `path` atomically: `lora` (A and B by name), `optimizer`, `schedule`, `baseline`, and a drafter's extras."""
    _write(path, _encoded((model, opt, sched, ema_b)))


def load_ckpt(path: str | Path, model: nn.Module, opt: Optimizer, sched: PiecewiseSchedule) -> float:
    """Read what `save_ckpt` wrote into model, optimizer and schedule; returns the baseline. UserError if it does not fit.

    Learning rate and weight decay stay those of `opt`: they are options, not state.
    """
    return _restore(read_checkpoint(path), path, model, opt, sched)


def restore_head(path: str | Path, model: nn.Module, opt: Optimizer, sched: PiecewiseSchedule) -> float:
    """Start from a checkpoint: from all of its state, or, where it holds only A and B, from these. Returns the baseline."""
    content = read_checkpoint(path)
    if "optimizer" in content:
        return _restore(content, path, model, opt, sched)
    load_lora_state_dict(model, lora_of(content, path))
    return 0.0


def _restore(
    content: dict[str, Any], path: str | Path, model: nn.Module, opt: Optimizer, sched: PiecewiseSchedule
) -> float:
    for key, kind in _TYPES.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path} is no checkpoint of an online head: {key} is missing or no {kind.__name__}")
    load_lora_state_dict(model, lora_of(content, path))
    try:
        opt.load_state_dict({**content["optimizer"], "param_groups": opt.state_dict()["param_groups"]})
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit: {str(error).splitlines()[0]}") from None
    for parameter, state in opt.state.items():
        if any(isinstance(v, Tensor) and v.ndim and v.shape != parameter.shape for v in state.values()):
            raise UserError(f"{path}: its optimizer state does not fit: it is of other shapes")
    sched.load_state_dict(content["schedule"])
    baseline: float = content["baseline"]
    return baseline


def _encoded(state: State) -> bytes:
    model, opt, sched, baseline = state
    content = {
        **(model.lora_extras() if isinstance(model, Drafter) else {}),
        "lora": lora_state_dict(model),
        "optimizer": opt.state_dict(),
        "schedule": sched.state_dict(),
        "baseline": float(baseline),
    }
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _write(path: str | Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


class CheckpointFolder:
    """`step_########.pt` (verify passes) and `latest.pt` every so many updates, `final.pt` at the end. The folder is one learner's.

    Learners may use it one after the other: `final.pt` is there only while nothing newer is.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        check_writable(folder / "final.pt")
        for left in folder.glob(".*.pt.*"):  # what a killed run was about to write
            left.unlink(missing_ok=True)

    def updated(self, updates: int, state: State) -> None:
        """The `updates`-th update was made."""
        if self.every and updates % self.every == 0:
            content = _encoded(state)
            _write(self.folder / f"step_{state[2].step:08d}.pt", content)
            _write(self.folder / "latest.pt", content)
            # Whoever reads the folder takes final.pt first: one of a run that ended before this one must not hide what is newer.
            (self.folder / "final.pt").unlink(missing_ok=True)

    def close(self, state: State) -> None:
        save_ckpt(self.folder / "final.pt", *state)
