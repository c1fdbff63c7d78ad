"""`dflash`: a few layers of its own fill in a whole block of drafts in one pass, from hidden states of the target (DFlash, z-lab)."""

from __future__ import annotations

import torch

from understudy.drafters.dflash.config import DFlashConfig, DFlashObjectiveConfig
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.drafters.dflash.files import read_drafter
from understudy.drafters.dflash.start import train_dflash
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import Spec
from understudy.drafting.weights import drafter_folder
from understudy.target.target import Target


def build(config: DFlashConfig, target: Target, path: str | None) -> DFlashDrafter:
    """The drafter in `path`; without one, that of the built-in model, for which it was trained."""
    folder = drafter_folder("dflash", path, target, config.any_target)
    model = read_drafter(folder, target)
    return DFlashDrafter(target, model.to(target.dtype).requires_grad_(False).eval(), config)


def _tiny(target: Target) -> list[Drafter]:
    """Drafters with random weights: full layers, sliding layers, and a Markov head that cuts blocks by confidence."""
    from understudy.drafters.dflash.layout import new_layout
    from understudy.drafters.dflash.start import new_model

    made: list[Drafter] = []
    taps = sorted({1, target.layers - 1})
    for seed, (options, drafting) in enumerate(
        [
            (DFlashObjectiveConfig(taps=taps, num_draft_layers=2, block_size=4), DFlashConfig()),
            (DFlashObjectiveConfig(taps=taps, block_size=6, sliding_window=5), DFlashConfig(steps=3)),
            (
                DFlashObjectiveConfig(taps=taps, block_size=4, markov_rank=4, confidence_head=True),
                DFlashConfig(threshold=0.4),
            ),
        ]
    ):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = new_model(target, new_layout(target, options))
            if model.markov_head is not None:
                torch.nn.init.normal_(model.markov_head.markov_w2.weight)
        made.append(DFlashDrafter(target, model.to(target.device, target.dtype).requires_grad_(False).eval(), drafting))
    return made


SPECS = (
    Spec(
        name="dflash",
        summary="a block of drafts in one pass, by layers of its own on hidden states of the target (dflash, or dflash:DIR)",
        config=DFlashConfig,
        build=build,
        tiny=_tiny,
        takes_path=True,
        objective=train_dflash,
        objective_config=DFlashObjectiveConfig,
    ),
)
