"""A DFlash drafter that knows a text half, what is read back of its checkpoint, and the checks of training against decoding."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tiny
from dflash import reference
from eagle3.serving import NEW, PROMPT, agree, change, met, planted, text_of
from understudy.drafters.dflash.config import DFlashConfig
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.drafters.dflash.files import read_drafter
from understudy.drafters.dflash.objective import DFlashObjective

__all__ = ["NEW", "PROMPT", "agree", "change", "learned", "met", "planted", "served", "text_of"]


@functools.cache
def learned(lessons: int = 22, **options: Any) -> DFlashObjective:
    """Blocks of five rows unless `options` say otherwise."""
    objective = reference.objective(tiny.target("llama"), **{"block_size": 5, "spread": 0.05, **options})
    return reference.taught(objective, text_of("llama", PROMPT), lessons, lr=1e-2)


def served(objective: DFlashObjective, folder: Path) -> DFlashDrafter:
    """What is read back of a checkpoint."""
    model = read_drafter(folder, objective.drafter.target)
    return DFlashDrafter(
        objective.drafter.target, model, DFlashConfig(steps=min(objective.drafter.steps, model.drafts))
    )
