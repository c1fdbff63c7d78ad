"""Options of training from rollouts. Imports no torch, so that `--help` stays instant."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pydantic

from understudy.core.config import Config, option
from understudy.telemetry.options import AlignTelemetryParams, TrackerOptions


class RunOptions(AlignTelemetryParams, TrackerOptions):
    """What both ways of `train dvi` have: where the run is, how long texts are, what plain decoding is timed with."""

    output_dir: Path | None = option(None, "the run folder; default: a new one under runs/", "outdir")
    max_new_tokens: int = option(
        64, "most new tokens of a text that is decoded to train or to evaluate", "max-tokens", ge=2
    )
    time_prompts: int = option(
        8, "prompts that are timed against plain decoding: after training, or before a stream begins; 0 = none", ge=0
    )
    time_max_new_tokens: int = option(64, "new tokens of a timed text", ge=2)
    seed: int = option(0, "seed of all random streams", ge=0)


class RolloutOptions(Config):
    """How `train dvi` trains from rollouts, how it looks at what came of it, and how it is timed."""

    steps: int = option(60, "updates", "max-steps", ge=1)
    rollout: int = option(8, "prompts decoded for each update, with the weights as they are then", ge=1)
    batch_size: int = option(
        64, "judged positions of an update, drawn without replacement from those of its rollouts", ge=1
    )
    rollout_data_path: Path | None = option(
        None, "JSON Lines file of prompts to roll out; default: the built-in corpus", "prompts"
    )
    lr_exit: float = option(5e-4, "learning rate of the draft head's LoRA", gt=0)
    lr_lora: float = option(5e-5, "learning rate of the shallow layers' LoRA", gt=0)
    shallow_rank: int | None = option(
        None, "rank of the LoRA on the shallow layers; 0 = none; default: 8, or the checkpoint's", ge=0
    )
    shallow_alpha: float | None = option(None, "alpha of that LoRA; default: the drafter's own", gt=0)
    spec_train_greedy: bool = option(
        False,
        "rollouts are greedy, drafts argmax; else text and drafts are drawn at temperature 1, drafts from the drafter's law",
    )
    kl_beta0: float = option(1.0, "weight of KL(verifier || drafter) at the first update", ge=0)
    kl_beta_min: float = option(
        0.05, "its weight after --kl-anneal-steps updates, to which it falls in a straight line", ge=0
    )
    kl_anneal_steps: int = option(80, "updates in which that weight falls; 0 = it begins at --kl-beta-min", ge=0)
    ce_weight: float = option(0.1, "weight of cross-entropy on accepted drafts", ge=0)
    use_policy_grad: bool = option(False, "add REINFORCE on accepts and first rejects")
    rl_weight: float = option(1.0, "with --use-policy-grad: weight of that term", ge=0)
    pg_baseline_ema: float = option(
        0.9, "with --use-policy-grad: share of the old value in the running mean of rewards", ge=0, lt=1
    )
    eval_every: int = option(
        30, "updates between evaluations on held-out prompts; 0 = only before the first and after the last", ge=0
    )
    eval_data_path: Path | None = option(
        None, "JSON Lines file of held-out prompts; default: the built-in prompt set", "eval-data"
    )
    eval_num_prompts: int = option(8, "held-out prompts of an evaluation", ge=1)
    spec_k_max: int = option(4, "largest draft length of an evaluation, which measures every length up to it", ge=1)
    quiet_eval: bool = option(False, "an evaluation prints one line instead of a table")
    time_repeats: int = option(1, "timings of every prompt, plain and speculative in turn; medians count", ge=1)
    timing_greedy: bool = option(False, "time greedy decoding; else decoding at temperature 1")

    @pydantic.model_validator(mode="after")
    def _falls(self) -> Self:
        if self.kl_beta_min > self.kl_beta0:
            raise ValueError(
                f"--kl-beta-min {self.kl_beta_min:g} is above --kl-beta0 {self.kl_beta0:g}: the weight falls, it does not rise"
            )
        return self


class RolloutConfig(RolloutOptions, RunOptions):
    """All that a run of training from rollouts is told, but for target and drafter."""
