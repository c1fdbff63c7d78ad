"""`prompt-lookup`: drafts what followed the same n-gram earlier in the text (Saxena, 2023, "Prompt Lookup Decoding").

The longest n-gram that occurs earlier wins, and of its occurrences the latest one that has something after it. An index from n-gram
to the position after it grows with the text, so a look-up costs the same at any length.
"""

from __future__ import annotations

import copy
from typing import Self

import torch

from understudy.core.config import option
from understudy.core.errors import UserError
from understudy.core.records import Budget, Commit, Proposal
from understudy.drafting.protocols import Drafter, DraftSampler, View
from understudy.drafting.spec import DrafterConfig, Spec
from understudy.drafting.stateless import StatelessSession, nothing
from understudy.target.target import Target


class PromptLookupConfig(DrafterConfig):
    """Options of `prompt-lookup`."""

    steps: int = option(10, "most tokens drafted in a row per cycle", "num-speculative-tokens", ge=0)
    max_ngram: int = option(3, "longest n-gram looked up, in tokens", "max-matching-ngram-size", ge=1)
    min_ngram: int = option(1, "shortest n-gram looked up, in tokens", ge=1)


class PromptLookupSession(StatelessSession):
    """Holds the index: n-gram -> the position right after its latest occurrence."""

    def __init__(self, view: View, max_ngram: int, min_ngram: int) -> None:
        super().__init__(view)
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        self.after: dict[tuple[int, ...], int] = {}
        self.indexed = 0  # n-grams that end before this position are in the index

    def observe(self, commit: Commit) -> None:
        self._index()

    def _index(self) -> None:
        """Index all n-grams but those that end the text: an n-gram must not find itself."""
        tokens, after = self.view.tokens, self.after
        for end in range(max(self.indexed, 1), len(tokens)):
            for n in range(self.min_ngram, min(self.max_ngram, end) + 1):
                after[tuple(tokens[end - n : end])] = end
        self.indexed = len(tokens)

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        tokens = self.view.tokens
        for n in range(min(self.max_ngram, len(tokens) - 1), self.min_ngram - 1, -1):
            start = self.after.get(tuple(tokens[-n:]))
            if start is not None:
                return Proposal(torch.tensor(tokens[start : start + budget.depth], device=self.view.device))
        return nothing(self.view.device)

    def fork(self, view: View) -> Self:
        other = type(self)(view, self.max_ngram, self.min_ngram)
        other.after, other.indexed = copy.copy(self.after), self.indexed
        return other

    def rewind(self, tokens: int) -> None:
        self.after.clear()
        self.indexed = 0
        self._index()


class PromptLookupDrafter(Drafter):
    runs_model = False

    def __init__(self, config: PromptLookupConfig) -> None:
        super().__init__()
        self.config, self.steps = config, config.steps

    def session(self, view: View) -> PromptLookupSession:
        return PromptLookupSession(view, self.config.max_ngram, self.config.min_ngram)


def build(config: PromptLookupConfig, target: Target, path: str | None) -> PromptLookupDrafter:
    if config.min_ngram > config.max_ngram:
        raise UserError(
            f"drafter prompt-lookup: min_ngram ({config.min_ngram}) is above max_ngram ({config.max_ngram})"
        )
    return PromptLookupDrafter(config)


SPECS = (
    Spec(
        name="prompt-lookup",
        summary="drafts what followed the same n-gram earlier in the text",
        config=PromptLookupConfig,
        build=build,
        tiny=lambda target: [PromptLookupDrafter(PromptLookupConfig(steps=4))],
    ),
)
