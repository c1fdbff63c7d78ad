"""Session parts for drafters that keep little or no state."""

from __future__ import annotations

from typing import Self

import torch

from understudy.core.records import Budget, Commit, Proposal
from understudy.drafting.protocols import DraftSampler, View


class StatelessSession:
    """A session whose only state is its view of the sequence. Subclasses implement `propose`."""

    def __init__(self, view: View) -> None:
        self.view = view

    def observe(self, commit: Commit) -> None:
        """Nothing to learn: the text is in `view.tokens`."""

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        raise NotImplementedError

    def fork(self, view: View) -> Self:
        return type(self)(view)

    def rewind(self, tokens: int) -> None:
        """Nothing to undo."""


def nothing(device: torch.device | str = "cpu") -> Proposal:
    """The empty proposal: the cycle is then a plain decoding step."""
    return Proposal(torch.empty(0, dtype=torch.int64, device=device))
