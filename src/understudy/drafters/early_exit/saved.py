"""Checkpoints of a learning head, whoever wrote them: the online learner or training from rollouts.

lora       the head's A and B, by their names (`drafting.lora`)
shallow    the LoRA of the shallow layers, by peft's names; absent without one
target     the fingerprint of the target that the head was trained for
settings   exit_layer, rank, alpha, and with a shallow LoRA its rank and alpha: what the tensors were trained as
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.drafters.early_exit.config import DVIConfig
from understudy.drafters.early_exit.shallow import ShallowLoRA
from understudy.drafting.lora import lora_of, read_checkpoint

NAMES = ("final.pt", "latest.pt")


class Saved(NamedTuple):
    lora: dict[str, Tensor]  # A and B of the head
    shallow: dict[str, Tensor]  # the LoRA of the shallow layers; empty = there is none
    settings: dict[str, int | float]  # fields of `DVIConfig` that the tensors were trained with; empty = unknown
    target: str | None  # fingerprint of their target; None = unknown


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


def read_saved(path: str | Path) -> Saved:
    """UserError if the file is no checkpoint."""
    content: dict[str, Any] = read_checkpoint(path)
    shallow, settings = content.get("shallow", {}), content.get("settings", {})
    if not isinstance(settings, dict) or not all(isinstance(value, int | float) for value in settings.values()):
        raise UserError(f"{path}: its settings are no numbers by name")
    if not isinstance(shallow, dict) or not all(isinstance(value, Tensor) for value in shallow.values()):
        raise UserError(f"{path}: its shallow LoRA is no tensors by name")
    made_for = content.get("target")
    return Saved(lora_of(content, path), shallow, settings, None if made_for is None else str(made_for))


def as_trained(config: DVIConfig, settings: Mapping[str, int | float], path: str | Path) -> DVIConfig:
    """The options with what the checkpoint was trained with. UserError where something else was asked for."""
    for name, value in settings.items():
        if name in config.model_fields_set and getattr(config, name) != value:
            raise UserError(f"{path} was trained with {name} {value}, not {getattr(config, name)}")
    return DVIConfig.model_validate({**config.model_dump(exclude_unset=True), **settings})


@torch.no_grad()
def load_shallow(lora: ShallowLoRA | None, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors into the parts of the same names; all are checked before any is written."""
    own = {} if lora is None else lora.parts()
    if own.keys() != tensors.keys():
        raise UserError(
            f"{path}: its LoRA of the shallow layers does not fit: use the exit layer and model of its training"
        )
    for name, part in own.items():
        if tensors[name].shape != part.shape or not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} is {list(tensors[name].shape)}, this drafter has {list(part.shape)}")
    for name, part in own.items():
        part.copy_(tensors[name])
