"""Drafters for tests: they know the right continuation, and draft right and wrong tokens in the pattern they are told to.

A pattern is one list of `(pick, kind)` per cycle, used in turn. Each entry adds a draft:
- `pick` chooses its parent among the root and the drafts before it, counted from the last one (0 = the latest: all zeros make
  a chain; large numbers reach the root), so rows of different branches interleave as the pattern wants.
- `kind` is "right" (the token that is true at this depth, also under a wrong parent), "next" (the one that is true one deeper),
  "twin" (the token of the sibling before it) or "wrong".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from understudy.core.records import Budget, Commit, Needs, Proposal
from understudy.drafting.protocols import Drafter, DraftSampler, DraftSession, View
from understudy.drafting.stateless import StatelessSession

Pattern = Sequence[Sequence[tuple[int, str]]]


def chain(right: int, wrong: int = 0) -> list[tuple[int, str]]:
    return [(0, "right")] * right + [(0, "wrong")] * wrong


@dataclass
class Script:
    """Grows the drafts of each cycle. `truth` = prompt and its right continuation."""

    truth: list[int]
    pattern: Pattern
    tree: bool
    vocab: int

    def grow(self, cycle: int, committed: Sequence[int], budget: Budget) -> tuple[list[int], list[int]]:
        """(tokens, parents) within the budget; parents -1 = the last committed token."""
        at = len(committed)
        after = self.truth[at : at + budget.depth]
        tokens: list[int] = []
        parents: list[int] = []
        depth: list[int] = []  # 1 for a child of the root
        true: list[bool] = []
        for pick, kind in self.pattern[cycle % len(self.pattern)][: budget.nodes]:
            open_ = [-1, *(i for i in range(len(tokens)) if depth[i] < len(after))]
            if not after or (not self.tree and len(tokens) == len(after)):
                break
            parent = len(tokens) - 1 if not self.tree else open_[max(len(open_) - 1 - pick, 0)]
            level = 0 if parent < 0 else depth[parent]
            on_path = parent < 0 or true[parent]
            want = after[level]
            siblings = [tokens[i] for i in range(len(tokens)) if parents[i] == parent]
            if kind == "right":
                token = want
            elif kind == "next" and level + 1 < len(after):
                token = after[level + 1]
            elif kind == "twin" and siblings:
                token = siblings[-1]
            else:
                token = (want + 1 + len(tokens) % 3) % self.vocab
            tokens.append(token)
            parents.append(parent)
            depth.append(level + 1)
            true.append(on_path and token == want)
        return tokens, parents


class ScriptedSession(StatelessSession):
    def __init__(self, view: View, script: Script, exit_layer: int | None) -> None:
        super().__init__(view)
        self.script, self.exit_layer, self.cycle = script, exit_layer, 0

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        tokens, parents = self.script.grow(self.cycle, self.view.tokens, budget)
        self.cycle += 1
        drafts = torch.tensor(tokens, dtype=torch.int64)
        if self.exit_layer is None:
            return Proposal(drafts, parents if self.script.tree else None)
        ids = torch.cat([torch.tensor(self.view.tokens[-1:]), drafts])
        # the first two rows in one shallow pass, the others one by one: both ways to run ahead
        parts = [ids[:2], *ids[2:, None]]
        states = torch.cat([self.view.shallow(part) for part in parts])  # type: ignore[attr-defined]
        return Proposal(drafts, resume=(self.exit_layer, states))

    def fork(self, view: View) -> ScriptedSession:
        other = ScriptedSession(view, self.script, self.exit_layer)
        other.cycle = self.cycle
        return other


class Scripted(Drafter):
    """Drafts by a pattern. With `exit_layer` it runs the target's shallow layers itself, as early exit does (chains only)."""

    def __init__(
        self, truth: Sequence[int], pattern: Pattern, *, tree: bool, vocab: int, exit_layer: int | None = None
    ) -> None:
        super().__init__()
        self.script = Script(list(truth), pattern, tree, vocab)
        self.steps = max((len(p) for p in pattern), default=0)
        self.nodes = self.steps if tree else None
        self.exit_layer = exit_layer
        self.needs = Needs(exit=exit_layer)

    def session(self, view: View) -> ScriptedSession:
        return ScriptedSession(view, self.script, self.exit_layer)


class RandomSession(StatelessSession):
    def __init__(self, view: View, owner: RandomDrafter) -> None:
        super().__init__(view)
        self.owner = owner

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        rng = random.Random(f"{self.owner.seed} {self.view.tokens}")
        count = rng.randint(0, budget.nodes)
        if not self.owner.tree:
            return Proposal(
                torch.tensor(rng.choices(range(self.owner.vocab), k=min(count, budget.depth)), dtype=torch.int64)
            )
        parents: list[int] = []
        depth: list[int] = []
        for _ in range(count):
            parent = rng.choice([-1, *(i for i, d in enumerate(depth) if d < budget.depth)])
            parents.append(parent)
            depth.append(1 if parent < 0 else depth[parent] + 1)
        return Proposal(torch.tensor(rng.choices(range(self.owner.vocab), k=count), dtype=torch.int64), parents)

    def fork(self, view: View) -> RandomSession:
        return RandomSession(view, self.owner)


class RandomDrafter(Drafter):
    """Any tokens in any shape, decided by the committed text."""

    def __init__(self, vocab: int, *, tree: bool, steps: int = 4, nodes: int = 9, seed: int = 0) -> None:
        super().__init__()
        self.vocab, self.tree, self.seed = vocab, tree, seed
        self.steps, self.nodes = steps, nodes if tree else None

    def session(self, view: View) -> RandomSession:
        return RandomSession(view, self)


class DrawingSession(StatelessSession):
    def __init__(self, view: View, owner: DrawingDrafter) -> None:
        super().__init__(view)
        self.owner = owner

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        owner = self.owner
        shape = [parent for parent in owner.parents if parent < 0 or budget.depth > 1]
        if owner.nodes is None:  # a chain, each draft drawn after the one before it
            return Proposal(torch.cat([sampler.draw(owner.table[i : i + 1]) for i in range(len(shape))]))
        return Proposal(sampler.draw(owner.table[: len(shape)]), shape)

    def fork(self, view: View) -> Self:
        return type(self)(view, self.owner)


class DrawingDrafter(Drafter):
    """Draws draft i from row i of a table of logits [K, V] with the engine's sampler, at most two deep, in the shape `parents`."""

    def __init__(self, table: Tensor, parents: list[int], session: type[DrawingSession] = DrawingSession) -> None:
        super().__init__()
        self.table, self.parents, self.kind = table, parents, session
        chained = parents == list(range(-1, len(parents) - 1))
        self.steps = 2
        self.nodes, self.static_tree = None if chained else len(parents), not chained

    def session(self, view: View) -> DrawingSession:
        return self.kind(view, self)


# Wrappers around any drafter


class WrappedSession:
    """Passes everything on to the session inside."""

    def __init__(self, inner: DraftSession, owner: Wrapped) -> None:
        self.inner, self.owner = inner, owner

    def observe(self, commit: Commit) -> None:
        self.inner.observe(commit)
        if self.owner.on_observe is not None:
            self.owner.on_observe(commit)

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        proposal = self.inner.propose(budget, sampler)
        assert proposal.tokens.shape[0] <= budget.nodes
        if self.owner.on_propose is not None:
            self.owner.on_propose(proposal)
        return proposal

    def fork(self, view: View) -> WrappedSession:
        return WrappedSession(self.inner.fork(view), self.owner)

    def rewind(self, tokens: int) -> None:
        self.inner.rewind(tokens)


class Wrapped(Drafter):
    """Any drafter, with calls after `observe` and `propose`: to look at what passes by, or to fail there."""

    def __init__(
        self,
        inner: Drafter,
        on_observe: Callable[[Commit], Any] | None = None,
        on_propose: Callable[[Proposal], Any] | None = None,
        needs: Needs = Needs(),
    ) -> None:
        super().__init__()
        self.inner, self.on_observe, self.on_propose = inner, on_observe, on_propose
        self.steps, self.nodes, self.static_tree = inner.steps, inner.nodes, inner.static_tree
        self.needs = inner.needs | needs

    def session(self, view: View) -> WrappedSession:
        return WrappedSession(self.inner.session(view), self)
