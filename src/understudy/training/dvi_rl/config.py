"""Options of DVI-RL. Imports no torch, so that `--help` stays instant."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from understudy.core.config import Config, option

# What may differ between a run and its continuation: how far it goes, where it runs and what is looked at.
FREE = frozenset({
    "num_prompts", "max_steps", "save_every", "keep", "output_dir", "resume", "eval_data_path",
    "eval_num_prompts", "device", "device_map", "threads", "trust_remote_code",
})  # fmt: skip


class DviRlConfig(Config):
    """Options of `understudy train dvi-rl`. Which model, and how it is loaded, the command line adds."""

    exit_layer: int = option(
        2, "E: lora_S is on the first E layers, which draft, lora_D on the rest", "exitlayer", "early-layer", ge=1
    )
    fast_batch: int = option(64, "accepted drafts after which lora_S makes a step", ge=1)
    buffer_size: int = option(
        256, "judged drafts after which it makes one too, however few were accepted: the replay buffer is full", ge=1
    )
    slow_every: int = option(
        0, "steps of lora_S between steps of lora_D, which changes the model; 0 = the model stays as it is", ge=0
    )
    beta_kl: float = option(0.1, "weight of KL(verifier || frozen verifier) in the steps of lora_D", ge=0)
    baseline_momentum: float = option(0.9, "share of the old value in the running mean of rewards", ge=0, lt=1)
    baseline_init: float = option(
        0.5, "what that mean begins with; at 0, a drafter that is always rejected would have no gradient", ge=0, le=1
    )
    lr_s: float = option(2e-4, "learning rate of lora_S (AdamW)", gt=0)
    lr_d: float = option(5e-6, "learning rate of lora_D (AdamW)", gt=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 = off", "clip", ge=0)
    rank: int = option(8, "rank r of both LoRAs", "lora-rank", ge=1)
    alpha: float = option(16.0, "alpha of both LoRAs: their products are scaled by alpha / r", "lora-alpha", gt=0)
    steps: int = option(6, "most tokens drafted in a row per cycle", "num-speculative-tokens", ge=1)
    threshold: float = option(
        0.6, "drafting stops after a draft whose probability is below this; 0 = never", ge=0, le=1
    )
    max_new_tokens: int = option(64, "most new tokens of a rollout", "max-tokens", ge=2)
    observed: Literal["auto", "committed"] = option(
        "auto",
        "tokens that lora_D learns: auto = the answer in the data, or the rollout where there is none; committed = the rollout,"
        " which is the model's own text and only sharpens its law",
    )
    train_data_path: Path | None = option(
        None, "JSON Lines file of conversations or prompts; default: the built-in corpus", "data-path", "train-data", "data"
    )  # fmt: skip
    max_prompt_tokens: int = option(1024, "longer prompts are left out", ge=1)
    num_prompts: int | None = option(None, "stop after so many prompts; default: at the end of the file", ge=1)
    max_steps: int | None = option(None, "stop after so many steps of lora_S", ge=1)
    output_dir: Path | None = option(None, "the run folder; default: a new one under runs/", "outdir")
    resume: bool = option(False, "continue the run in --output-dir where its latest checkpoint left it")
    save_every: int = option(10, "steps of lora_S between checkpoints; there is one at the end in any case", ge=1)
    keep: int = option(3, "checkpoints kept", ge=1)
    seed: int = option(0, "seed of the random beginning of both LoRAs", ge=0)


class DviRlExperimentConfig(DviRlConfig):
    """Options of `understudy experiment dvi-rl`."""

    eval_data_path: Path | None = option(
        None, "JSON Lines file to evaluate on; default: the built-in corpus's, when that is trained on", "eval-data"
    )
    eval_num_prompts: int = option(16, "prompts of that file to evaluate on, from the first on", ge=1)
