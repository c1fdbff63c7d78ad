"""What is trained, in which dtype, by how much: fp32 masters, AdamW, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from understudy.core.errors import UserError
from understudy.training.options import TrainOptions


def trained(objective: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name. UserError when there is none."""
    found = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    if not found:
        raise UserError("nothing to train: every parameter of this drafter is frozen; unfreeze a part of it")
    return found


class Masters:
    """Trained parameters are fp32 in memory, whatever dtype they came in and will be served in.

    An update of bf16 weights below 1 / 256 of a weight is rounded away; that is most of them at the end of a schedule.
    """

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective
        self.served = {name: p.dtype for name, p in trained(objective).items()}
        for p in trained(objective).values():
            p.data = p.data.float()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, the objective is as it will be served: evaluation mode, weights rounded to their own dtype, no gradient.

        What is measured is then what is saved. Under FSDP, weights must be whole.
        """
        was = self.objective.training
        rounded = {
            p: nn.Parameter(p.detach().to(self.served[name]), requires_grad=True)
            for name, p in self.objective.named_parameters()
            if name in self.served and self.served[name] != p.dtype
        }
        self.objective.eval()
        try:
            with replaced(self.objective, rounded), torch.no_grad():
                yield
        finally:
            self.objective.train(was)


@contextmanager
def replaced(module: nn.Module, others: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Inside, other parameters stand in the places of some of the module's.

    Places are changed and not `.data`: a parameter that changes its dtype loses its gradient accumulator, and with it the
    hook by which data-parallel wrappers wait for its gradient.
    """
    places = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner.named_parameters(recurse=False, remove_duplicate=False)
        if p in others
    ]
    try:
        for owner, name, p in places:
            owner._parameters[name] = others[p]
        yield
    finally:
        for owner, name, p in places:
            owner._parameters[name] = p


def adamw(params: Iterable[nn.Parameter], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019). Weight decay is for matrices; a decayed norm weight only shrinks its layer."""
    every = list(params)
    matrices = [p for p in every if p.ndim >= 2]
    vectors = [p for p in every if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    first, second = options.betas
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate, betas=(first, second))


def state_of(optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as `NAME:KEY` -> whole tensor on the CPU. A collective under FSDP: every rank calls it."""
    found = {}
    for name, p in params.items():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{name}:{key}"] = whole(torch.as_tensor(value))
    return found


def whole(x: Tensor) -> Tensor:
    """A copy on the CPU, of all shards. A collective under FSDP."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().to("cpu", copy=True).contiguous()


def load_state(
    optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """What `state_of` returned, back into the optimizer, sharded as its parameters are."""
    for key, value in state.items():
        name, _, field = key.rpartition(":")
        if name not in params:
            raise UserError(f"the checkpoint's optimizer knows a parameter {name!r} that this drafter does not train")
        p = params[name]
        if value.ndim == 0:  # the step counter lives on the CPU, where AdamW wants it
            optimizer.state[p][field] = value.clone()
        elif isinstance(p, DTensor):
            optimizer.state[p][field] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
        else:
            optimizer.state[p][field] = value.to(p.device, copy=True)


def total_steps(options: TrainOptions, batches_per_epoch: int | None) -> int:
    """Optimizer steps of the whole run. UserError when neither data nor options say it: the cosine needs an end."""
    epochs = options.num_epochs if options.num_epochs is not None else (None if options.max_steps else 1)
    by_data = None
    if epochs is not None and batches_per_epoch is not None:
        by_data = math.ceil(batches_per_epoch * epochs / options.gradient_accumulation_steps)
    limits = [n for n in (by_data, options.max_steps) if n is not None]
    if not limits:
        raise UserError("how many batches the data has is not known before it was read: give --max-steps")
    return min(limits)


def learning_rate(step: int, total: int, options: TrainOptions) -> float:
    """The learning rate of step 0, 1, ..., total - 1: linear warm-up, then a cosine down to `min_lr_ratio` of the peak.

    Step w - 1 of a warm-up of w steps has the peak, and no step has 0: the first one is 1 / w of the peak, and the cosine
    reaches its floor only after the last one. A function of the step alone, so that nothing of it has to be saved.
    """
    warmup = options.warmup_steps if options.warmup_steps is not None else round(options.warmup_ratio * total)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup + 1) / (max(total - warmup, 0) + 1))
    floor = options.min_lr_ratio
    return options.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
