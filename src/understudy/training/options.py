"""The options of the offline training loop. Imports no torch, so that `--help` stays instant."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import pydantic

from understudy.core.config import option
from understudy.telemetry.options import TrackerOptions


class TrainOptions(TrackerOptions):
    """How long, how fast and how carefully to train; where to write; when to look. What a method adds, its own config holds."""

    output_dir: Path | None = option(None, "the run folder; default: a new one under runs/", "outdir")
    resume: bool = option(False, "continue the run in --output-dir where its latest checkpoint left it")
    resume_from: Path | None = option(
        None, "continue from this checkpoint, weights, optimizer, schedule and data position, into --output-dir"
    )

    num_epochs: int | None = option(None, "passes over the data; default: 1, or as many as --max-steps needs", ge=1)
    max_steps: int | None = option(None, "optimizer steps at most; they also set the length of the schedule", ge=1)
    max_minutes: float | None = option(None, "stop cleanly after this many minutes of this process and save", gt=0)
    batch_size: int = option(4, "rows per device and forward pass", ge=1)
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", "accumulation-steps", ge=1)

    learning_rate: float = option(3e-4, "peak learning rate", "lr", gt=0)
    warmup_ratio: float = option(0.04, "share of all steps in which the learning rate climbs to its peak", ge=0, le=1)
    warmup_steps: int | None = option(None, "the same in steps; wins over --warmup-ratio", ge=0)
    min_lr_ratio: float = option(0.1, "where the cosine ends, as a share of the peak", ge=0, le=1)
    weight_decay: float = option(0.0, "AdamW's decay of matrices; vectors (norms, biases) are never decayed", ge=0)
    betas: tuple[float, ...] = option((0.9, 0.95), "AdamW's two betas: --betas 0.9 --betas 0.95")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 = off", "clip", ge=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "dtype of matrix products in forward and backward; trained weights are fp32 in any case"
    )
    max_bad_steps: int = option(10, "steps in a row with a loss or gradient that is not finite before giving up", ge=1)

    log_interval: int = option(10, "steps between log lines", ge=1)
    eval_interval: int = option(
        200, "steps between evaluations: held-out loss and measured accept length; 0 = never", ge=0
    )
    save_interval: int = option(500, "steps between checkpoints; 0 = only the best one and the last one", ge=0)
    keep: int = option(3, "checkpoints kept: the newest, and beside them the best", ge=1)
    early_stop: int = option(0, "stop after so many evaluations without a better measured accept length; 0 = off", ge=0)

    log_samples_interval: int = option(
        200, "steps between detailed logs of what the drafter predicts on a fixed batch; 0 = never", ge=0
    )
    num_samples_to_log: int = option(
        5, "samples of a detailed log: places of the fixed batch where decoding would begin a cycle", ge=1
    )

    seed: int = option(0, "seed of all random streams", ge=0)
    fsdp: bool = option(False, "several processes: shard trained weights and optimizer over them")
    verbose: bool = option(False, "print mask sums, gradient norms, what is trained, and why something is zero")

    @pydantic.field_validator("betas")
    @classmethod
    def _two_below_one(cls, betas: tuple[float, ...]) -> tuple[float, ...]:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"must be two numbers of at least 0 and less than 1 (got {', '.join(map(str, betas))})")
        return betas

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.resume and self.resume_from is not None:
            raise ValueError("--resume continues --output-dir and --resume-from continues another checkpoint; give one")
        if self.early_stop and not self.eval_interval:
            raise ValueError("--early-stop counts evaluations, and --eval-interval 0 makes none")
        return self
