"""Processes and devices: one process, several with whole weights (DDP), or several with sharded ones (FSDP2).

accelerate chooses devices, starts process groups, scales fp16 and wraps for DDP. Sharding calls torch's `fully_shard` itself:
accelerate has FSDP for accelerators only (on a CPU its plugin is silently not used), and shards frozen weights too, which the
target shares with the objective and needs whole. All trained weights are one group: drafters are small beside their targets,
what counts is that gradients and optimizer state are not held by everyone.

    torchrun --nproc-per-node 8 -m understudy train ... [--fsdp]
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from understudy.core.errors import UserError
from understudy.drafting.objective import Features, Objective
from understudy.training.optimizer import replaced
from understudy.training.options import TrainOptions

# While rank 0 measures acceptance, the others wait inside a collective
PATIENCE = timedelta(hours=4)


class Step(nn.Module):
    """An objective as data-parallel wrappers want it: the result is a tuple of tensors that hang on every trained parameter.

    A batch that supervises nothing, or does not reach a part of the drafter, would otherwise leave a rank without a gradient
    that the others wait for. The sums over empty slices are 0 and cannot be NaN.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, features: Features) -> tuple[Tensor, Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """(loss sum, number of supervised slots, what the loss sum is divided by, metrics)."""
        out = self.objective(features)
        divisor = out.count if out.divisor is None else out.divisor
        anchor = sum(p.flatten()[:0].sum() for p in self.objective.parameters() if p.requires_grad)
        return out.loss + anchor, out.count, divisor, out.metrics


class Ranks:
    """The processes of this run, and this one's place among them. One process is the special case `world == 1`.

    `device` is where this process computes; the target is to be loaded there. UserError for a precision that the device lacks.
    """

    def __init__(self, options: TrainOptions, device: str | None = None) -> None:
        # Accelerator is a singleton underneath; a second run of one process may want another device or precision
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=options.mixed_precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.world: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.main: bool = self.accelerator.is_main_process
        alone = self.world == 1 and device is not None
        try:
            self.device = torch.device(device) if alone and device else torch.device(self.accelerator.device)
        except RuntimeError:
            raise UserError(f"--device {device}: no such device; cpu, cuda, cuda:1, mps, ...") from None
        self.fsdp = options.fsdp
        if options.mixed_precision == "fp16" and self.device.type in ("cpu", "mps"):
            raise UserError(f"--mixed-precision fp16 does not work on {self.device.type}; take bf16 or no")
        if self.fsdp and self.world == 1:
            raise UserError("--fsdp shards over several processes, and there is one: start it with torchrun")
        if self.fsdp and options.mixed_precision == "fp16":
            raise UserError("--fsdp does not go with --mixed-precision fp16; take bf16")

    def wrap(self, objective: Objective) -> nn.Module:
        """The objective on this rank's device, ready to be called. Every rank starts from the weights of rank 0."""
        objective.to(self.device)
        step = Step(objective)
        if self.world == 1:
            return step
        if not self.fsdp:
            return self.accelerator.prepare_model(step, device_placement=False)
        for tensor in [p.data for p in step.parameters() if p.requires_grad] + list(step.buffers()):
            dist.broadcast(tensor, 0)
        mesh = init_device_mesh(self.device.type, (self.world,))
        frozen = {p for p in step.parameters() if not p.requires_grad}
        fully_shard(step, mesh=mesh, ignored_params=frozen)
        return step

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Forward and backward of one batch; only the `last` one of a step exchanges gradients. Autocast is on."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        waits = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if waits else nullcontext(), self.accelerator.autocast():  # type: ignore[operator]
            yield

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """Inside, the parameters of the objective are plain whole tensors, on every rank. A collective under FSDP.

        They are copies: `unshard` of FSDP would do for a forward pass, but its hooks shard again as soon as somebody asks any
        submodule for its `state_dict`, and that is how a drafter saves itself.
        """
        if not isinstance(model, FSDPModule):
            yield
            return
        model.reshard()  # a forward pass without a backward leaves it gathered
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for p in list(model.parameters()):
            if isinstance(p, DTensor):
                copies[p] = nn.Parameter(p.full_tensor().detach(), requires_grad=True)
        with replaced(model, copies):
            yield

    def close(self) -> None:
        """Leave the process group, after everybody is done. The last call of a run; the wrapped model is out of use by then."""
        if self.world > 1:
            dist.barrier()
            gc.collect()  # a DDP wrapper in a reference cycle would keep the group, and its threads, alive
            dist.destroy_process_group()

    def leave(self, code: int) -> None:
        """End a process of several on the CPU with this exit code; does nothing elsewhere. After `close`, when all is written.

        torch's `fully_shard` keeps its gloo group in a cache (2.13), so that its threads still run when the interpreter
        has gone, and now and then abort the process on its way out: torchrun would report a good run as failed.
        """
        if self.world > 1 and self.device.type == "cpu":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def total(self, values: Tensor) -> list[float]:
        """[n] values summed over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return [float(v) for v in values.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """One picklable value per rank, on every rank."""
        if self.world == 1:
            return [value]
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, value)
        return every

    def of_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]
