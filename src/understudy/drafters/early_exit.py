"""`early-exit`: the target drafts for itself from its first E layers (Kangaroo, Liu et al., 2024; LayerSkip, Elhoushi et al., 2024).

Each draft is one row through layers [0, E), then the final norm and head. The rows go into the target's own cache and their states
are kept, so verification runs only layers [E, L): no shallow work is done twice. As in Kangaroo, a draft whose probability falls
below the threshold is still kept and verified, and drafting stops after it. The decision looks at the whole law, before any token
is chosen by it, so it is legal for drawn drafts too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.core.config import option
from understudy.core.errors import UserError
from understudy.core.records import Budget, Needs, Proposal
from understudy.drafting.protocols import Drafter, DraftSampler, View
from understudy.drafting.spec import DrafterConfig, Spec
from understudy.drafting.stateless import StatelessSession
from understudy.target.probe import probe
from understudy.target.target import Target


class EarlyExitConfig(DrafterConfig):
    """Options of `early-exit`. The defaults are Kangaroo's."""

    exit_layer: int = option(2, "layers that draft: the first E", "exitlayer", "early-layer", ge=1)
    threshold: float = option(
        0.6, "drafting stops after a draft whose probability is below this; 0 = never", ge=0, le=1
    )


class EarlyExitSession(StatelessSession):
    """Keeps nothing of its own: the shallow rows are in the target's cache."""

    def __init__(self, view: View, exit_layer: int, threshold: float) -> None:
        super().__init__(view)
        self.exit_layer, self.threshold = exit_layer, threshold

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        view = self.view
        token = torch.tensor(view.tokens[-1:], device=view.device)
        states = [view.shallow(token)]
        drafts: list[Tensor] = []
        while len(drafts) < budget.depth:
            logits = view.exit_logits(states[-1])
            token = sampler.draw(logits)
            drafts.append(token)
            states.append(view.shallow(token))
            if self.threshold > 0 and len(drafts) < budget.depth:
                confidence = torch.exp(logits.float().amax(-1) - logits.float().logsumexp(-1))
                if confidence.item() < self.threshold:
                    break
        tokens = torch.cat(drafts) if drafts else token[:0]
        return Proposal(tokens, resume=(self.exit_layer, torch.cat(states)))

    def fork(self, view: View) -> EarlyExitSession:
        return EarlyExitSession(view, self.exit_layer, self.threshold)


class EarlyExitDrafter(Drafter):
    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        self.config, self.steps = config, config.steps
        self.needs = Needs(exit=config.exit_layer)

    def session(self, view: View) -> EarlyExitSession:
        return EarlyExitSession(view, self.config.exit_layer, self.config.threshold)


def build(config: EarlyExitConfig, target: Target, path: str | None) -> EarlyExitDrafter:
    if config.exit_layer >= target.layers:
        raise UserError(
            f"drafter early-exit: exit_layer {config.exit_layer} leaves nothing to verify with: the target has {target.layers} layers"
        )
    probe(target, "split", config.exit_layer)
    return EarlyExitDrafter(config)


SPECS = (
    Spec(
        name="early-exit",
        summary="the target's own first layers, final norm and head draft",
        config=EarlyExitConfig,
        build=build,
        tiny=lambda target: [
            EarlyExitDrafter(EarlyExitConfig(exit_layer=1, threshold=0.0, steps=3)),
            EarlyExitDrafter(EarlyExitConfig(exit_layer=target.layers - 1, threshold=0.3, steps=4)),
        ],
    ),
)
