"""A drafter, data and a log small enough that a whole run takes milliseconds.

The target is a table of random states; the drafter predicts the next token from the state of the present one. Rows are ragged,
so that a mean of means is not the mean.

    python -m training.toy OPTIONS.json         # a run in a process of its own; torchrun may start several
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from understudy.core.records import Needs
from understudy.drafting.objective import Batch, Features, Objective, StepOutput
from understudy.drafting.protocols import Drafter
from understudy.training.distributed import Ranks
from understudy.training.loop import Result, train
from understudy.training.options import TrainOptions

V, D, T = 11, 6, 9


class ToyDrafter(Drafter):
    steps = 2

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, 8)
        self.head = nn.Linear(8, V)
        self.to(dtype)


class Toy(Objective):
    """Cross-entropy of the next token at masked positions. `unused` is a weight that no batch reaches; `by_tokens`: the loss is
    divided by all tokens, supervised or not."""

    needs = Needs(last=True)

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32, unused: bool = False,
                 by_tokens: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.by_tokens = by_tokens
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.drafter = ToyDrafter(dtype)
        self.dropout = nn.Dropout(dropout)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))  # a trained state that is no parameter
        self.unused = nn.Parameter(torch.ones(3)) if unused else None

    def forward(self, features: Features) -> StepOutput:
        d, batch = self.drafter, features.batch
        assert features.last is not None
        hidden = features.last.to(d.up.weight.dtype)
        logits = d.head(F.silu(self.dropout(d.up(d.norm(hidden)))))[:, :-1].float()
        wanted, mask = batch.ids[:, 1:], batch.mask[:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        count = mask.sum()
        if self.training:
            self.seen += count
        right = ((logits.argmax(-1) == wanted) & mask).sum()
        metrics = {"acc_0": (right, count), "tau_sim": (right + count, count)}
        divisor = (batch.documents >= 0).sum() if self.by_tokens else None
        return StepOutput((each * mask).sum(), count, metrics, divisor)

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "toy"}')
        save_file({k: v.contiguous() for k, v in self.drafter.state_dict().items()}, folder / "model.safetensors")


TABLE = torch.randn(V, D, generator=torch.Generator().manual_seed(3))


def features(batch: Batch) -> Features:
    assert not torch.is_grad_enabled()
    return Features(batch, {}, TABLE.to(batch.ids.device)[batch.ids])


class Rows:
    """`rows` ragged rows; `share` of them per batch and rank; `at` = {epoch, batch: callable} called before a batch is given."""

    def __init__(
        self,
        rows: int = 16,
        size: int = 2,
        rank: int = 0,
        world: int = 1,
        empty: tuple[int, ...] = (),
        known: bool = True,
    ) -> None:
        self.rows, self.size, self.rank, self.world, self.empty = rows, size, rank, world, empty
        self.epoch = self.position = 0
        self.known = known
        self.hooks: dict[int, Any] = {}
        self.given = 0

    @property
    def steps_per_epoch(self) -> int | None:
        return self.rows // (self.size * self.world) if self.known else None

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        step = self.size * self.world
        while self.position + step <= self.rows:
            mine = order[self.position : self.position + step][self.rank :: self.world]
            self.position += step
            self.given += 1
            self.hooks.get(self.given, lambda: None)()
            yield self.batch(mine)
        self.epoch, self.position = self.epoch + 1, 0

    def batch(self, rows: list[int]) -> Batch:
        ids, mask, documents = (
            torch.zeros(len(rows), T).long(),
            torch.zeros(len(rows), T).bool(),
            torch.full((len(rows), T), -1),
        )
        for b, row in enumerate(rows):
            length = 2 + row % (T - 2)
            ids[b, 0] = row % V
            for t in range(1, length):
                ids[b, t] = (3 * ids[b, t - 1] + 1) % V
            mask[b, 1:length] = row not in self.empty
            documents[b, :length] = 0
        return Batch(ids, mask, documents, torch.arange(T).expand(len(rows), T))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class HeldOutRows:
    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __iter__(self) -> Iterator[Batch]:
        return iter(Rows(8, 2, self.ranks.rank, self.ranks.world))


class Lines:
    """A log in memory."""

    def __init__(self) -> None:
        self.values: list[tuple[int, dict[str, float]]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.values.append((step, values))

    def event(self, kind: str, /, **fields: Any) -> None:
        self.events.append((kind, fields))

    def of(self, name: str) -> dict[int, float]:
        return {step: values[name] for step, values in self.values if name in values}

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == kind]


def run(out: Path, *, objective: Any = None, batches: Rows | None = None, log: Lines | None = None,
        measure: Any = None, held_out: bool = False, watchers: Any = (), console: Any = None, device: str | None = "cpu",
        ranks: Ranks | None = None, source: Any = None,
        **options: Any) -> tuple[Result, Any, Lines]:  # fmt: skip
    """A run with options that suit a toy: no warm-up unless asked, no evaluation, no checkpoints but the last one.

    `objective` is a `Toy` unless given, `source` what gives it features.
    """
    given = {
        "eval_interval": 0,
        "save_interval": 0,
        "log_interval": 1,
        "batch_size": 2,
        "learning_rate": 0.05,
        "warmup_steps": 0,
    }
    settings = TrainOptions(output_dir=out, **(given | options))
    ranks = ranks or Ranks(settings, device)
    objective = objective if objective is not None else Toy()
    log = log if log is not None else Lines()
    batches = batches or Rows(size=settings.batch_size, rank=ranks.rank, world=ranks.world)
    result = train(
        objective, batches, source or features, settings, ranks=ranks, log=log, measure=measure,
        held_out=HeldOutRows(ranks) if held_out else None, watchers=watchers, console=console,
    )  # fmt: skip
    ranks.close()
    return result, objective, log


def weights(objective: Toy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in objective.named_parameters() if p.requires_grad}


def held(objective: Toy) -> int:
    """Trained weights that this process itself holds: with sharding, its share of them."""
    every = [p for p in objective.parameters() if p.requires_grad]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in every)


def main(path: str) -> None:
    """OPTIONS.json: {"out", "log", "slow": seconds per batch, "term_at": batch, "toy": {...}, "options": {...}}."""
    task = json.loads(Path(path).read_text())
    size, rank, world = (
        task["options"]["batch_size"],
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
    )
    toy = dict(task.get("toy", {}))
    objective = Toy(**(toy | {"dtype": getattr(torch, toy.get("dtype", "float32"))}))
    batches = Rows(size=size, rank=rank, world=world, empty=tuple(task.get("empty", ())))
    for i in range(1, 1000):
        batches.hooks[i] = lambda: time.sleep(task.get("slow", 0.0))
    if "term_at" in task and rank == task.get("term_rank", 0):
        batches.hooks[task["term_at"]] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    calls: list[float] = []

    def measure() -> dict[str, float]:
        assert rank == 0
        with torch.no_grad():
            drafter = objective.drafter
            out = drafter.head(drafter.up(TABLE.to(drafter.up.weight.dtype)))  # whole weights, or this fails
        calls.append(float(out.float().abs().mean()))
        return {"tau": 1 + calls[-1]}

    log = Lines()
    evaluates = task["options"].get("eval_interval", 0)
    ranks = Ranks(TrainOptions(**task["options"]), "cpu")
    result, *_ = run(
        Path(task["out"]),
        ranks=ranks, objective=objective, batches=batches, log=log, measure=measure if evaluates else None,
        held_out=bool(evaluates), **task["options"],
    )  # fmt: skip
    if rank:
        assert not log.values and not log.events, "only rank 0 logs"
        return ranks.leave(0)
    done = {"step": result.step, "reason": result.reason, "values": log.values, "held": held(objective)}
    Path(task["log"]).write_text(json.dumps(done))
    ranks.leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
