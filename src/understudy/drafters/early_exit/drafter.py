"""The target drafts for itself from its first E layers (Kangaroo, Liu et al., 2024; LayerSkip, Elhoushi et al., 2024).

Each draft is one row through layers [0, E), then a norm and a head. The rows go into the target's own cache and their states are
kept, so verification runs only layers [E, L): no shallow work is done twice. As in Kangaroo, a draft whose probability falls below
the threshold is still kept and verified, and drafting stops after it. The decision looks at the whole law, before any token is
chosen by it, so it is legal for drawn drafts too.

Between exit and head stands the target's final norm, or Kangaroo's adapter; the head is the target's own, or DVI's.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from understudy.core.records import Budget, Commit, Needs, Proposal
from understudy.drafters.early_exit.adapter import Adapter
from understudy.drafters.early_exit.config import DVIConfig, ExitConfig
from understudy.drafters.early_exit.head import DrafterHead
from understudy.drafters.early_exit.shallow import ShallowLoRA
from understudy.drafting.learning import LearnOptions, Trace
from understudy.drafting.own_cache import OwnCacheSession, unsure
from understudy.drafting.protocols import Drafter, DraftSampler, DraftSession, View
from understudy.target.cache import KVCache
from understudy.target.fingerprint import fingerprint
from understudy.target.target import Target


class ExitDrafter(Drafter):
    """An early exit, with what trains on it: an adapter, a head, a LoRA on the shallow layers, or none of them."""

    def __init__(
        self,
        target: Target,
        config: ExitConfig,
        adapter: Adapter | None = None,
        head: DrafterHead | None = None,
        shallow: ShallowLoRA | None = None,
        learning: LearnOptions | None = None,
    ) -> None:
        super().__init__()
        assert adapter is None or shallow is None, (
            "an adapter reads the target's own states, which a shallow LoRA replaces"
        )
        self._target = [target]  # in a list: the target's modules are not ours
        self.config, self.steps, self.learning = config, config.steps, learning
        self.adapter, self.drafter_head, self.shallow = adapter, head, shallow
        # layers that a LoRA changed are not the target's: verification then runs all of them itself
        self.needs = Needs() if shallow is not None else Needs(exit=config.exit_layer)

    @property
    def target(self) -> Target:
        return self._target[0]

    def session(self, view: View) -> DraftSession:
        if self.shallow is not None:
            traced = self.learning is not None
            return OwnCacheSession(view, ShallowModel(self), self.config.threshold, traced)
        return ExitSession(view, self)

    def norm(self, hidden: Tensor) -> Tensor:
        """What the head reads of bare exit states [n, D], without an adapter."""
        return self.target.norm(hidden)

    def head_logits(self, hidden: Tensor) -> Tensor:
        if self.drafter_head is not None:
            logits: Tensor = self.drafter_head(hidden.to(self.target.dtype))
            return logits.to(self.target.device)  # under a device map the head may be elsewhere than the tokens
        return self.frozen_logits(hidden)

    @cached_property
    def _made_for(self) -> str:
        return fingerprint(self.target)

    def lora_extras(self) -> dict[str, Any]:
        """What the head's A and B were trained as, and the LoRA of the shallow layers (`saved`)."""
        if not isinstance(self.config, DVIConfig):
            return {}
        names = ["exit_layer", "rank", "alpha", *(["shallow_rank", "shallow_alpha"] if self.shallow else [])]
        extras: dict[str, Any] = {
            "target": self._made_for,
            "settings": {name: getattr(self.config, name) for name in names},
        }
        if self.shallow is not None:
            extras["shallow"] = {name: p.detach().to("cpu", copy=True) for name, p in self.shallow.parts().items()}
        return extras

    def frozen_logits(self, hidden: Tensor) -> Tensor:
        return self.target.head(hidden.to(self.target.dtype)).to(self.target.device)


class ExitSession:
    """One sequence. The shallow rows are in the target's cache; an adapter has a cache of its own here."""

    def __init__(self, view: View, drafter: ExitDrafter, cache: KVCache | None = None, valid: int = 0) -> None:
        self.view, self.drafter = view, drafter
        self.cache = cache if cache is not None or drafter.adapter is None else drafter.adapter.cache()
        self.valid = valid  # adapter rows of committed tokens
        self.written = valid  # adapter rows after the latest proposal

    def observe(self, commit: Commit) -> None:
        """The adapter sees the committed rows that it has not drafted from: a prompt's, and the last one of a full acceptance."""
        adapter, rows = self.drafter.adapter, commit.rows
        if adapter is None or self.cache is None:
            return
        assert rows.exit is not None
        end = rows.start + len(commit.path)
        seen = max(self.written - rows.start, 0)
        if seen < len(commit.path):
            adapter.write(rows.exit[list(commit.path[seen:])], rows.start + seen, self.cache)
        self.valid = self.written = end

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        view, drafter = self.view, self.drafter
        token = torch.tensor(view.tokens[-1:], device=view.device)
        states, reads, drafts = [view.shallow(token)], list[Tensor](), list[Tensor]()
        self.written = self.valid
        while len(drafts) < budget.depth:
            reads.append(self._read(states[-1]))
            logits = drafter.head_logits(reads[-1])
            token = sampler.draw(logits)
            drafts.append(token)
            states.append(view.shallow(token))
            if len(drafts) < budget.depth and unsure(logits, drafter.config.threshold):
                break
        tokens = torch.cat(drafts) if drafts else token[:0]
        trace = Trace(torch.cat(reads)) if reads and drafter.learning is not None else None
        return Proposal(tokens, resume=(drafter.config.exit_layer, torch.cat(states)), trace=trace)

    def _read(self, state: Tensor) -> Tensor:
        """What the head reads of an exit state [1, D]."""
        adapter = self.drafter.adapter
        if adapter is None or self.cache is None:
            return self.drafter.norm(state)
        read = adapter.read(state, self.written, self.cache)
        self.written += 1
        return read

    def fork(self, view: View) -> Self:
        cache = None if self.cache is None else self.cache.fork(self.valid)
        return type(self)(view, self.drafter, cache, self.valid)

    def rewind(self, tokens: int) -> None:
        self.valid = self.written = min(self.valid, max(tokens - 1, 0))


class ShallowModel:
    """The adapted shallow layers with norm and head, as a model of its own."""

    def __init__(self, drafter: ExitDrafter) -> None:
        self.drafter, self.context, self.device = drafter, drafter.target.context, drafter.target.device

    def cache(self) -> KVCache:
        assert self.drafter.shallow is not None
        return self.drafter.shallow.cache()

    def states(self, ids: Tensor, start: int, cache: KVCache) -> Tensor:
        assert self.drafter.shallow is not None
        return self.drafter.norm(self.drafter.shallow.run(ids, start, cache)[-1:])

    def logits(self, states: Tensor) -> Tensor:
        return self.drafter.head_logits(states)
