"""`null`: drafts what the target finds least likely. Always rejected, so it must make decoding slower.

It keeps benchmarks honest: if an always-wrong drafter "gains", plain decoding was measured unfairly (a kernel that is slow for one
row, say), and every other speed-up of that run is inflated by the same amount.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from understudy.core.records import Budget, Commit, Proposal
from understudy.drafting.protocols import Drafter, DraftSampler, View
from understudy.drafting.spec import DrafterConfig, Spec
from understudy.drafting.stateless import StatelessSession, nothing
from understudy.target.target import Target


class NullSession(StatelessSession):
    """Repeats the token with the lowest logit after the last committed row that had logits."""

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self.worst: Tensor | None = None  # [1]

    def observe(self, commit: Commit) -> None:
        logits = commit.rows.logits
        if logits is not None:
            row = commit.path[-1] if logits.shape[0] == commit.rows.width else -1
            self.worst = logits[row].min(dim=0).indices[None]

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        if self.worst is None:
            return nothing(self.view.device)
        return Proposal(self.worst.repeat(budget.depth))

    def fork(self, view: View) -> Self:
        copy = super().fork(view)
        copy.worst = self.worst
        return copy


class NullDrafter(Drafter):
    runs_model = False

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def session(self, view: View) -> NullSession:
        return NullSession(view)


def build(config: DrafterConfig, target: Target, path: str | None) -> NullDrafter:
    return NullDrafter(config.steps)


SPECS = (
    Spec(
        name="null",
        summary="always wrong: must make decoding slower, or the comparison is unfair",
        config=DrafterConfig,
        build=build,
        tiny=lambda target: [NullDrafter(3)],
    ),
)
