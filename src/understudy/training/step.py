"""One optimizer step: forward and backward over its batches, normalise by the global count, clip, update.

Gradients are accumulated as sums and divided once, over all batches on all ranks:

    g = sum over ranks and batches of grad(StepOutput.loss) / sum over ranks and batches of StepOutput.divisor

where the divisor is the number of supervised slots unless an objective says otherwise. So 8 batches of 1 are 1 batch of 8, and 2
processes are 1 with twice the batch, however unequally the slots are spread. A mean of means, as most trainers take it, weighs a slot
by how few its batch has. A step without a supervised slot teaches nothing and is skipped, whatever its divisor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from understudy.drafting.objective import Batch
from understudy.training.distributed import Ranks
from understudy.training.evaluate import Sums
from understudy.training.protocols import FeatureSource


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did; the same on every rank."""

    loss: float  # divided as `StepOutput` says: per supervised slot, as a rule; nan when there is none
    count: int  # supervised slots of all ranks
    masked: int  # tokens of the loss mask, of all ranks
    tokens: int  # tokens that are no padding, of all ranks
    empty: int  # batches that supervised nothing
    grad_norm: float  # before clipping
    skipped: Literal["empty", "not finite", "fp16 scale"] | None  # why weights were left as they are
    stop: bool  # a rank wants to stop


def take_step(
    group: Sequence[Batch],
    model: nn.Module,
    features: FeatureSource,
    params: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    max_norm: float,
    sums: Sums,
    stop: Callable[[], bool],
) -> StepReport:
    """Train on a group of batches of this rank and update once. `sums` gets the metrics; `stop()` = this rank wants to stop.

    `max_norm` 0 = no clipping. A collective: every rank brings equally many batches.
    """
    local = torch.zeros(7, dtype=torch.float32 if ranks.device.type == "mps" else torch.float64, device=ranks.device)
    mine = Sums()
    for i, batch in enumerate(group):
        batch = batch.to(ranks.device)
        with torch.no_grad():
            given = features(batch)
        with ranks.accumulating(model, last=i == len(group) - 1):
            loss, count, divisor, metrics = model(given)
            ranks.accelerator.backward(loss)
        count, divisor = (torch.as_tensor(x, device=loss.device) for x in (count, divisor))
        mine.add({**metrics, "loss": (loss, divisor)})
        facts = (loss.detach(), divisor, count, batch.mask.sum(), (batch.documents >= 0).sum(), count == 0)
        local[:6] += torch.stack([fact.to(local.dtype) for fact in facts])
    local[6] = float(stop())
    loss_sum, parts, slots, masked, tokens, empty, stops = ranks.total(local)

    norm, skipped = 0.0, None
    if not math.isfinite(loss_sum):
        skipped = "not finite"
    elif not slots:
        skipped = "empty"
    else:
        # data-parallel wrappers average gradients over ranks; the sum is wanted
        norm, skipped = _update(params, optimizer, ranks, ranks.world / parts, max_norm)
    if skipped != "not finite":  # one such step would make the figures of all others of its log line nan
        sums.add(mine.pairs())
    optimizer.zero_grad(set_to_none=True)
    mean = loss_sum / parts if slots else math.nan
    return StepReport(mean, int(slots), int(masked), int(tokens), int(empty), norm, skipped, stops > 0)  # type: ignore[arg-type]


def _update(
    params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ranks: Ranks, factor: float, max_norm: float
) -> tuple[float, str | None]:
    """Scale gradients by `factor`, clip, step. Returns the norm before clipping, and why there was no step."""
    scaler = ranks.accelerator.scaler  # fp16 only
    if scaler is not None:
        scaler.unscale_(optimizer)
    reached = [p for p in params.values() if p.grad is not None]
    for p in reached:
        assert p.grad is not None
        p.grad.mul_(factor)
    norm_tensor = nn.utils.clip_grad_norm_(reached, max_norm or math.inf)
    norm = float(_plain(norm_tensor))
    if scaler is not None:  # halves its scale and skips when a gradient overflowed, which is no fault of the run
        scaler.step(optimizer)
        scaler.update()
        return norm, None if math.isfinite(norm) else "fp16 scale"
    if not math.isfinite(norm):
        return norm, "not finite"
    optimizer.step()
    return norm, None


def _plain(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
