"""`none`: proposes nothing. Plain decoding in the same engine, the denominator of every speed-up."""

from __future__ import annotations

from understudy.core.records import Budget, Proposal
from understudy.drafting.protocols import Drafter, DraftSampler, View
from understudy.drafting.spec import DrafterConfig, Spec
from understudy.drafting.stateless import StatelessSession, nothing
from understudy.target.target import Target


class NoneSession(StatelessSession):
    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        return nothing(self.view.device)


class NoneDrafter(Drafter):
    steps = 0
    runs_model = False

    def session(self, view: View) -> NoneSession:
        return NoneSession(view)


def build(config: DrafterConfig, target: Target, path: str | None) -> NoneDrafter:
    return NoneDrafter()


SPECS = (
    Spec(
        name="none",
        summary="plain decoding in this engine, the denominator of every speed-up",
        config=DrafterConfig,
        build=build,
        tiny=lambda target: [NoneDrafter()],
    ),
)
