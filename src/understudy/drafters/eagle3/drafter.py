"""Drafting with an EAGLE-3 model: the sequence's state, and a chain of drafts.

The draft layer's cache has a row per committed token but the last: row t holds (embedding of x_{t+1}, fused taps of t). With one layer,
keys and values of a row need nothing of the rows before it; only the row that is drafted from goes through the whole layer. Rows of drafts
come after them and are overwritten by the true ones.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from understudy.core.records import Budget, Commit, Needs, Proposal
from understudy.drafters.eagle3.config import Eagle3Config
from understudy.drafters.eagle3.model import Eagle3Model
from understudy.drafting.own_cache import unsure
from understudy.drafting.protocols import Drafter, DraftSampler, DraftSession, View
from understudy.drafting.stateless import nothing
from understudy.target.cache import KVCache
from understudy.target.target import Target


class Eagle3Drafter(Drafter):
    """An EAGLE-3 model that drafts chains, or trees of at most `config.nodes`."""

    def __init__(self, target: Target, model: Eagle3Model, config: Eagle3Config) -> None:
        super().__init__()
        self._target = [target]  # in a list: the target's modules are not ours
        self.model, self.config, self.steps = model, config, config.steps
        self.nodes = config.nodes if config.tree else None
        self.needs = Needs(taps=frozenset(model.taps))

    @property
    def target(self) -> Target:
        return self._target[0]

    def session(self, view: View) -> DraftSession:
        from understudy.drafters.eagle3.tree import TreeSession

        return (TreeSession if self.config.tree else ChainSession)(view, self)


class Eagle3Session:
    """What chains and trees share: which rows of the text the cache holds, and which wait to be run.

    `valid` rows are in the cache; `waiting` holds the taps [n, n D] of those after them. The last of these is drafted from.
    """

    def __init__(self, view: View, drafter: Eagle3Drafter) -> None:
        self.view, self.drafter, self.model = view, drafter, drafter.model
        self.ids = drafter.model.ids
        self.cache = KVCache(1)
        self.valid = 0
        self.waiting: list[Tensor] = []
        self.ran = 0  # rows of `waiting` that the latest proposal put into the cache

    @property
    def rows(self) -> int:
        """Rows known of: one per committed token but the last."""
        return self.valid + sum(map(len, self.waiting))

    def observe(self, commit: Commit) -> None:
        """Keep the taps of the committed path; a prompt's rows go into the cache here, so that they count as prefill."""
        rows, path = commit.rows, commit.path
        taps = torch.cat([rows.taps[tap] for tap in self.model.taps], dim=-1)
        if rows.parents is not None:
            taps = taps[list(path)]
        if self.ran:
            self.valid, self.ran = self.valid + self.ran, 0
            self.waiting.clear()
        self.waiting.append(taps[: len(path)])
        if sum(map(len, self.waiting)) > self.drafter.steps + 1:
            self._settle()

    def _settle(self) -> None:
        """Put all waiting rows but the last into the cache."""
        taps = torch.cat(self.waiting)
        done = len(taps) - 1
        self.model.write(self._tokens(self.valid, done), self.model.fuse(taps[:-1]), self.valid, self.cache)
        self.valid, self.waiting = self.valid + done, [taps[-1:].clone()]

    def _tokens(self, start: int, count: int) -> Tensor:
        """The tokens beside rows start .. start + count - 1: those that follow them in the text."""
        return torch.tensor(self.view.tokens[start + 1 : start + 1 + count], device=self.view.device)

    def _begin(self) -> Tensor:
        """Run the rows that wait: the layer's output at the last one, [1, H]."""
        taps = torch.cat(self.waiting)
        self.ran = len(taps)
        return self.model.last(self._tokens(self.valid, self.ran), self.model.fuse(taps), self.valid, self.cache)

    def _depth(self, budget: Budget) -> int:
        """Drafts in a row that may be made now. After a rewind the row to draft from is gone: a plain cycle brings it back."""
        if not self.waiting:
            return 0
        return min(budget.depth, self.drafter.target.context - len(self.view.tokens))

    def fork(self, view: View) -> Self:
        other = type(self)(view, self.drafter)
        other.cache, other.valid, other.waiting = self.cache.fork(self.valid), self.valid, list(self.waiting)
        return other

    def rewind(self, tokens: int) -> None:
        rows = max(tokens - 1, 0)
        self.ran = 0
        if rows == self.rows:
            return
        kept = torch.cat(self.waiting)[: max(rows - self.valid, 0)] if self.waiting else None
        self.waiting = [kept] if kept is not None and len(kept) else []
        self.valid = min(self.valid, rows)


class ChainSession(Eagle3Session):
    """Drafts one token after the other, until one is less probable than the threshold: that one is still verified."""

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        depth = self._depth(budget)
        if depth < 1:
            return nothing(self.view.device)
        model, ids, drafts = self.model, self.ids, list[Tensor]()
        out, end = self._begin(), len(self.view.tokens) - 1
        while True:
            logits = model.logits(out)
            drafts.append(sampler.draw(logits, ids))
            if len(drafts) == depth or unsure(logits, self.drafter.config.threshold):
                return Proposal(torch.cat(drafts))
            out = model.last(drafts[-1], model.feedback(out), end + len(drafts) - 1, self.cache)
