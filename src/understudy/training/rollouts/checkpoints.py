"""What training from rollouts saves: one `.pt` of plain tensors and numbers, whole or not at all, read with `weights_only=True`.

lora       the head's A and B, by their names (`drafting.lora`)
shallow    the LoRA of the shallow layers, by peft's names; absent without one
target     the fingerprint of the target that they were trained for
settings   exit_layer, rank, alpha, and with a shallow LoRA shallow_rank and shallow_alpha: what the tensors were trained as
trainer    optimizer, updates, running mean of rewards, where the prompts stand: what training needs to go on
"""

from __future__ import annotations

from pathlib import Path

import torch

from understudy.core.files import replacing
from understudy.drafters.early_exit.saved import load_shallow
from understudy.drafting.lora import load_lora_state_dict, lora_of, lora_state_dict, read_checkpoint
from understudy.training.rollouts.trainer import RolloutTrainer


def save(path: str | Path, trainer: RolloutTrainer) -> None:
    """Write `path` atomically."""
    content = {
        **trainer.drafter.lora_extras(),
        "lora": lora_state_dict(trainer.drafter),
        "trainer": trainer.state_dict(),
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load(path: str | Path, trainer: RolloutTrainer) -> None:
    """Read a checkpoint into drafter and trainer; of one without a trainer's state (the online learner's) the weights alone."""
    content, drafter = read_checkpoint(path), trainer.drafter
    lora = lora_of(content, path)
    shallow = content.get("shallow", {})
    if shallow:  # its checks come before anything is written
        load_shallow(drafter.shallow, shallow, path)
    load_lora_state_dict(drafter, lora)
    if "trainer" in content:
        trainer.load_state_dict(content["trainer"])
