"""`eagle3`: one layer of its own drafts from a low, a middle and a high hidden state of the target (EAGLE-3, Li et al., 2025)."""

from __future__ import annotations

import torch

from understudy.drafters.eagle3.config import Eagle3Config, Eagle3ObjectiveConfig
from understudy.drafters.eagle3.drafter import Eagle3Drafter
from understudy.drafters.eagle3.files import read_drafter
from understudy.drafters.eagle3.start import train_eagle3
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import Spec
from understudy.drafting.weights import drafter_folder
from understudy.target.target import Target


def build(config: Eagle3Config, target: Target, path: str | None) -> Eagle3Drafter:
    """The drafter in `path`; without one, that of the built-in model, for which it was trained."""
    folder = drafter_folder("eagle3", path, target, config.any_target)
    model = read_drafter(folder, target)
    return Eagle3Drafter(target, model.to(target.dtype).requires_grad_(False).eval(), config)


def _tiny(target: Target) -> list[Drafter]:
    """Drafters with random weights: a chain over all of the vocabulary, a chain over a part, and a tree."""
    from understudy.drafters.eagle3.layout import new_layout
    from understudy.drafters.eagle3.start import new_model

    made: list[Drafter] = []
    taps = sorted({0, 1, target.layers - 1})
    for seed, (size, drafting) in enumerate(
        [
            (target.vocab_size, Eagle3Config(steps=3)),
            (target.vocab_size // 2, Eagle3Config(steps=4)),
            (target.vocab_size // 2, Eagle3Config(steps=3, tree=True, top_k=3, nodes=9)),
        ]
    ):
        options = Eagle3ObjectiveConfig(taps=taps, draft_vocab_size=size, norm_output=seed == 1)
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 9, (target.vocab_size,), generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = new_model(target, options, new_layout(target, options), counts.clone)
        made.append(Eagle3Drafter(target, model.to(target.device, target.dtype).requires_grad_(False).eval(), drafting))
    return made


SPECS = (
    Spec(
        name="eagle3",
        summary="one layer of its own on three hidden states of the target (eagle3, or eagle3:DIR); tree=true for trees",
        config=Eagle3Config,
        build=build,
        tiny=_tiny,
        takes_path=True,
        objective=train_eagle3,
        objective_config=Eagle3ObjectiveConfig,
    ),
)
