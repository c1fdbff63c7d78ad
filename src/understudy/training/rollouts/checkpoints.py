"""What training from rollouts saves: one `.pt` of plain tensors and numbers, whole or not at all, read with `weights_only=True`.

lora       the head's A and B, by their names (`drafting.lora`)
shallow    the LoRA of the shallow layers, by peft's names; absent without one
settings   exit_layer, rank, alpha, and with a shallow LoRA shallow_rank and shallow_alpha: what the tensors were trained as
trainer    optimizer, updates, running mean of rewards: what training needs to go on
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.files import replacing
from understudy.drafters.early_exit.config import DVIConfig
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafting.lora import load_lora_state_dict, lora_of, lora_state_dict, read_checkpoint
from understudy.training.rollouts.trainer import RolloutTrainer

NAMES = ("final.pt", "latest.pt")


def settings_of(drafter: ExitDrafter) -> dict[str, int | float]:
    """What a drafter has to be built with for these tensors to mean the same."""
    config = drafter.config
    assert isinstance(config, DVIConfig)
    names = ["exit_layer", "rank", "alpha", *(["shallow_rank", "shallow_alpha"] if drafter.shallow else [])]
    return {name: getattr(config, name) for name in names}


def save(path: str | Path, trainer: RolloutTrainer) -> None:
    """Write `path` atomically."""
    drafter = trainer.drafter
    content: dict[str, Any] = {"lora": lora_state_dict(drafter), "settings": settings_of(drafter)}
    if drafter.shallow is not None:
        content["shallow"] = {name: p.detach().to("cpu", copy=True) for name, p in drafter.shallow.parts().items()}
    with replacing(path) as temporary:
        torch.save({**content, "trainer": trainer.state_dict()}, temporary)


def find(path: str | Path) -> Path:
    """The checkpoint that a file, a folder of checkpoints or a run folder names: its last state."""
    path = Path(path)
    if not path.is_dir():
        return path
    for folder in (path / "checkpoints", path):
        for name in NAMES:
            if (folder / name).exists():
                return folder / name
    raise UserError(f"{path} holds no checkpoint: neither {' nor '.join(NAMES)}, there or in its checkpoints/")


def read_settings(path: str | Path) -> dict[str, int | float]:
    """The settings of a checkpoint; none of one that the online learner wrote. UserError if it is no checkpoint."""
    settings = read_checkpoint(path).get("settings", {})
    if not isinstance(settings, dict) or not all(isinstance(value, int | float) for value in settings.values()):
        raise UserError(f"{path}: its settings are no numbers by name")
    return settings


@torch.no_grad()
def load_shallow(drafter: ExitDrafter, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write tensors into the shallow LoRA's parts of the same names; all are checked before any is written."""
    own = {} if drafter.shallow is None else drafter.shallow.parts()
    if own.keys() != tensors.keys():
        raise UserError(
            f"{path}: its LoRA of the shallow layers does not fit: use the exit layer and model of its training"
        )
    for name, part in own.items():
        if tensors[name].shape != part.shape or not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} is {list(tensors[name].shape)}, this drafter has {list(part.shape)}")
    for name, part in own.items():
        part.copy_(tensors[name])


def load(path: str | Path, trainer: RolloutTrainer) -> None:
    """Read a checkpoint into drafter and trainer; of one without a trainer's state (the online learner's) the weights alone."""
    content, drafter = read_checkpoint(path), trainer.drafter
    lora = lora_of(content, path)
    shallow = content.get("shallow", {})
    if shallow:  # its checks come before anything is written
        load_shallow(drafter, shallow, path)
    load_lora_state_dict(drafter, lora)
    if "trainer" in content:
        trainer.load_state_dict(content["trainer"])
