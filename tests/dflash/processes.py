"""A short training run of a DFlash drafter, alone or as one of several processes.

python -m dflash.processes TASK.json         # torchrun starts several: see `training.test_distributed.launch`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tiny
from dflash import reference
from training import toy
from understudy.features.live import LiveFeatures
from understudy.target.target import Target
from understudy.training.distributed import Ranks
from understudy.training.options import TrainOptions


def run(
    out: Path, ranks: Ranks | None = None, empty: tuple[int, ...] = (), **options: Any
) -> tuple[Any, Any, toy.Lines]:
    """(result, objective, log). Rows in `empty` supervise nothing. All anchors are taken: which ones is chance, per process."""
    target = Target(tiny.fresh_model("llama", vocab_size=toy.V), name="tiny")
    objective = reference.objective(target, spread=0.05, block_size=4, markov_rank=2, confidence_head=True, loss_type="ce+kl",
                                    position_weights="dpace", mask_token_id=3)  # fmt: skip
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    rows = toy.Rows(size=options["batch_size"], rank=rank, world=world, empty=empty)
    source = LiveFeatures(target, objective.needs)
    return toy.run(out, objective=objective, batches=rows, ranks=ranks, source=source, held_out=True, **options)


def main(path: str) -> None:
    """TASK.json: {"out", "log", "empty": rows, "options": {...}}."""
    task = json.loads(Path(path).read_text())
    ranks = Ranks(TrainOptions(**task["options"]), "cpu")
    result, objective, log = run(Path(task["out"]), ranks, tuple(task["empty"]), **task["options"])
    if ranks.main:
        done = {"step": result.step, "values": log.values, "held": toy.held(objective)}
        Path(task["log"]).write_text(json.dumps(done))
    ranks.leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
