"""The session of a drafter that runs a model of its own, one token after the other, with a cache of its own.

Rows of rejected drafts are left in the cache and overwritten; what the model has not seen yet (the token that the target added,
and the last draft after full acceptance) goes in with its next pass.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from understudy.core.records import Budget, Commit, Proposal
from understudy.drafting.learning import Trace
from understudy.drafting.protocols import DraftSampler, View
from understudy.drafting.stateless import nothing
from understudy.target.cache import KVCache

PREFILL_CHUNK = 512


class OwnModel(Protocol):
    """What drafts: layers with a cache, and a head."""

    context: int  # most tokens of a text
    device: torch.device

    def cache(self) -> KVCache: ...

    def states(self, ids: Tensor, start: int, cache: KVCache) -> Tensor:
        """Run [n] tokens at rows [start, start + n) of the cache: what the head reads after the last of them, [1, D]."""

    def logits(self, states: Tensor) -> Tensor:
        """[1, D] -> [1, V]."""


def top_probability(logits: Tensor) -> Tensor:
    """[n] fp32: the probability of the most probable token, of raw logits [n, V]."""
    logits = logits.float()
    return torch.exp(logits.amax(-1) - logits.logsumexp(-1))


def unsure(logits: Tensor, threshold: float) -> bool:
    """Whether the most probable token of a law [1, V] (raw logits) is less probable than `threshold`. 0 = never asks."""
    if threshold <= 0:
        return False
    return bool((top_probability(logits) < threshold).item())


class OwnCacheSession:
    """The model's state on one sequence: its cache and how many committed tokens are in it.

    `threshold`: drafting stops after a draft whose probability is below it. `traced`: proposals carry the states that the head read.
    """

    def __init__(self, view: View, model: OwnModel, threshold: float = 0.0, traced: bool = False) -> None:
        self.view, self.model, self.threshold, self.traced = view, model, threshold, traced
        self.cache = model.cache()
        self.valid = 0  # rows of the cache that belong to committed tokens
        self.drafted: list[int] = []  # tokens of the rows after them

    def observe(self, commit: Commit) -> None:
        """Count the drafted rows that turned out right; run a prompt, all but its last token, so that it counts as prefill."""
        agreed = self.view.tokens[self.valid : self.valid + len(self.drafted)]
        for draft, token in zip(self.drafted, agreed, strict=False):
            if draft != token:
                break
            self.valid += 1
        self.valid = min(self.valid, len(self.view.tokens) - 1)
        self.drafted = []
        end = len(self.view.tokens) - 1
        if end - self.valid > 1:  # a cycle leaves one token at most besides the last
            for start in range(self.valid, end, PREFILL_CHUNK):
                stop = min(start + PREFILL_CHUNK, end)
                self._run(self.view.tokens[start:stop])
                self.valid = stop

    def _run(self, tokens: list[int] | Tensor, offset: int = 0) -> Tensor:
        """What the head reads after the last of `tokens`, which go in at row valid + offset."""
        return self.model.states(torch.as_tensor(tokens, device=self.model.device), self.valid + offset, self.cache)

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        room = self.model.context - len(self.view.tokens)
        depth = min(budget.depth, room)
        if depth < 1:
            return nothing(self.view.device)
        new = self.view.tokens[self.valid :]
        states, drafts = [self._run(new)], list[Tensor]()
        while True:
            logits = self.model.logits(states[-1])
            drafts.append(sampler.draw(logits))
            if len(drafts) == depth or unsure(logits, self.threshold):
                break
            states.append(self._run(drafts[-1], len(new) + len(drafts) - 1))
        tokens = torch.cat(drafts)
        # the rows of `new` and of all drafts but the last are in the cache now; which of them count, `observe` decides
        self.drafted = new + tokens[:-1].tolist()
        return Proposal(tokens.to(self.view.device), trace=Trace(torch.cat(states)) if self.traced else None)

    def fork(self, view: View) -> Self:
        other = type(self)(view, self.model, self.threshold, self.traced)
        other.cache, other.valid = self.cache.fork(self.valid), self.valid
        return other

    def rewind(self, tokens: int) -> None:
        self.valid = min(self.valid, max(tokens - 1, 0))
        self.drafted = []
