"""Drafting with a DFlash model: the sequence's state, and one block per cycle.

The draft layers' cache has a row per committed token but the last, made of the target's states there. Keys and values of a row need
nothing of the rows before it. Rows of a block come after them and are overwritten by the true ones, so nothing is rolled back.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from understudy.core.errors import UserError
from understudy.core.records import Budget, Commit, Needs, Proposal
from understudy.drafters.dflash.config import DFlashConfig
from understudy.drafters.dflash.model import DFlashModel
from understudy.drafting.protocols import Drafter, DraftSampler, DraftSession, View
from understudy.drafting.stateless import nothing
from understudy.target.cache import KVCache
from understudy.target.target import Target


class DFlashDrafter(Drafter):
    """A DFlash model that drafts blocks of at most `config.steps` tokens; UserError for more than it was trained for."""

    def __init__(self, target: Target, model: DFlashModel, config: DFlashConfig) -> None:
        super().__init__()
        if config.steps is not None and config.steps > model.drafts:
            raise UserError(
                f"{config.steps} drafts per cycle: this DFlash drafter was trained for blocks of {model.drafts} at most"
            )
        if config.threshold and model.confidence_head is None:
            raise UserError("a threshold needs a confidence head, and this DFlash drafter has none: leave it out")
        self._target = [target]  # in a list: the target's modules are not ours
        self.model, self.config = model, config
        self.steps = model.drafts if config.steps is None else config.steps
        self.needs = Needs(taps=frozenset(model.taps))

    @property
    def target(self) -> Target:
        return self._target[0]

    def session(self, view: View) -> DraftSession:
        return DFlashSession(view, self)

    def assistant(self) -> nn.Module:
        from understudy.drafters.dflash.assistant import DFlashAssistant

        return DFlashAssistant(self)


class DFlashSession:
    """`valid` context rows are in the cache; `waiting` holds the taps [n, n D] of those after them."""

    def __init__(self, view: View, drafter: DFlashDrafter) -> None:
        self.view, self.drafter, self.model = view, drafter, drafter.model
        self.cache = KVCache(len(drafter.model.layers))
        self.valid = 0
        self.waiting: list[Tensor] = []

    def observe(self, commit: Commit) -> None:
        """Keep the taps of the committed path; a prompt's rows go into the cache here, so that they count as prefill."""
        rows, path = commit.rows, commit.path
        taps = torch.cat([rows.taps[tap] for tap in self.model.taps], dim=-1)
        if rows.parents is not None:
            taps = taps[list(path)]
        self.waiting.append(taps[: len(path)])
        if sum(map(len, self.waiting)) > self.drafter.steps + 1:
            self._settle()

    def _settle(self) -> None:
        """Put all rows that wait into the cache."""
        if self.waiting:
            taps = torch.cat(self.waiting)
            self.model.write(taps, self.valid, self.cache)
            self.valid += len(taps)
            self.waiting.clear()

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        """One block, always of the same width; as many of its drafts as the budget allows."""
        model, width = self.model, self.drafter.steps + self.model.first
        start = len(self.view.tokens) - 1
        depth = min(budget.depth, self.drafter.target.context - start - 1)
        if depth < 1:
            return nothing(self.view.device)
        self._settle()
        assert self.valid == start, "a context row per committed token but the last"
        token = torch.tensor(self.view.tokens[-1:], device=self.view.device)
        out = model.block(token, width, start, self.cache)[model.first :][:depth]
        logits = model.logits(out)
        if model.markov_head is None:
            return Proposal(sampler.draw(logits))
        return Proposal(self._corrected(token, out, logits, sampler))

    def _corrected(self, token: Tensor, out: Tensor, logits: Tensor, sampler: DraftSampler) -> Tensor:
        """Drafts one after the other, each with the Markov head's correction by the one before; fewer where confidence is low."""
        model, drafts, sure = self.model, list[Tensor](), 1.0
        assert model.markov_head is not None
        for k in range(len(out)):
            before = model.markov_head.embed(token)
            if self.drafter.config.threshold and model.confidence_head is not None:
                sure *= float(model.confidence_head(out[k : k + 1], before).sigmoid())
                if drafts and sure < self.drafter.config.threshold:
                    break
            token = sampler.draw(logits[k : k + 1] + model.markov_head.correction(before))
            drafts.append(token)
        return torch.cat(drafts)

    def fork(self, view: View) -> Self:
        other = type(self)(view, self.drafter)
        other.cache, other.valid, other.waiting = self.cache.fork(self.valid), self.valid, list(self.waiting)
        return other

    def rewind(self, tokens: int) -> None:
        rows = max(tokens - 1, 0)
        kept = torch.cat(self.waiting)[: max(rows - self.valid, 0)] if self.waiting else None
        self.waiting = [kept] if kept is not None and len(kept) else []
        self.valid = min(self.valid, rows)
