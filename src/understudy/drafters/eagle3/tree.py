"""Draft trees (placeholder while it is being written)."""

from __future__ import annotations

from understudy.core.records import Budget, Proposal
from understudy.drafters.eagle3.drafter import Eagle3Session
from understudy.drafting.protocols import DraftSampler


class TreeSession(Eagle3Session):
    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        raise NotImplementedError
