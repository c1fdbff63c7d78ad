"""What EAGLE-3 drafts, slowly: every path from scratch, through `reference.Model`, in float64.

    drafter = drafts.drafter(draft_vocab_size=5, tree=True)
    sequence = drafts.at(drafter, text)
    drafts.proposed(sequence)                     # what the session drafts
    drafts.Slow(drafter, text).tree(3, 4, 9)      # what it should
    drafts.made("tree")                           # one of `KINDS`

Targets are float64 too: then no two ways to the same draft differ by so much that another token comes out.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import tiny
from eagle3 import reference
from understudy.core.records import Budget, Proposal
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafters.eagle3.config import Eagle3Config
from understudy.drafters.eagle3.drafter import Eagle3Drafter
from understudy.target.params import SamplingParams
from understudy.target.target import Target

V = 11  # so few tokens that a random drafter is right now and then
WIDE = Budget(4, 60)
Path = tuple[int, ...]
KINDS: dict[str, dict[str, Any]] = {
    "chain": {"norm_output": True},
    "reduced": {"draft_vocab_size": 7, "fc_norm": True},
    "tree": {"draft_vocab_size": 8, "tree": True, "norm_before_residual": True},
    "wide tree": {"tree": True, "top_k": 5, "nodes": 20, "norm_before_fc": True},
}


@cache
def target(family: str = "llama", context: int = 512, vocab: int = V) -> Target:
    model = tiny.fresh_model(family, max_position_embeddings=context, vocab_size=vocab)
    return Target(model.double(), name=family)


def text(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"text {seed}").choices(range(V), k=length)


def drafter(on: Target | None = None, seed: int = 0, spread: float = 0.25, lessons: int = 0, steps: int = 4, tree: bool = False,
            top_k: int = 3, nodes: int = 9, **options: Any) -> Eagle3Drafter:  # fmt: skip
    """Random wide weights, and after `lessons` steps of training some that know the target a little.

    `options` are the objective's (draft_vocab_size, flags).
    """
    on = target() if on is None else on
    objective = reference.objective(on, seed, spread, **options)
    if lessons:
        texts = [[*text(5, s), *tiny.continuation(on.model, text(5, s), 20)] for s in (20, 21)]
        rows = [[reference.Document(each, [i >= 4 for i in range(len(each))])] for each in texts]
        reference.taught(objective, rows, lessons)
    model = objective.drafter.model.requires_grad_(False).eval()
    return Eagle3Drafter(on, model, Eagle3Config(steps=steps, tree=tree, top_k=top_k, nodes=nodes))


@cache
def made(kind: str, family: str = "llama", context: int = 512) -> Eagle3Drafter:
    """One of `KINDS` that has learned a little, so that paths of any length are accepted."""
    return drafter(target(family, context), seed=1, lessons=12, spread=0.05, **KINDS[kind])


def opened(
    drafter: Eagle3Drafter, prompt: list[int], sampling: SamplingParams | None = None, **options: Any
) -> DecodeSequence:
    """A prefilled sequence, its first token not chosen yet."""
    params = DecodeParams(**{"max_new_tokens": 24, "prefill_chunk": 7, **options})
    sequence = DecodeSequence(drafter.target, drafter, params, sampling or SamplingParams(), StopRule())
    sequence.prefill(prompt)
    return sequence


def at(drafter: Eagle3Drafter, text: list[int], **options: Any) -> DecodeSequence:
    """A new sequence whose committed text is `text`, all of it run at once."""
    sequence = opened(drafter, text[:-1], **{"prefill_chunk": 512, **options})
    rows, sequence.pending = sequence.pending, None
    assert rows is not None
    with torch.inference_mode():
        sequence.commit(rows, range(rows.width), text[-1:])
    assert sequence.tokens == text
    return sequence


def proposed(sequence: DecodeSequence, budget: Budget = WIDE) -> Proposal:
    with torch.inference_mode():
        return sequence.draft.propose(budget, sequence.recorder.begin())


def paths(proposal: Proposal) -> list[Path]:
    """Each draft with the drafts before it; a chain is a path too."""
    found: list[Path] = []
    parents = range(-1, len(proposal.tokens) - 1) if proposal.parents is None else proposal.parents
    for token, parent in zip(proposal.tokens.tolist(), parents, strict=True):
        assert parent < len(found), "parents come first"
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


class Slow:
    """What a drafter says after a text and a path of drafts."""

    def __init__(self, drafter: Eagle3Drafter, text: list[int]) -> None:
        model, self.text = drafter.model, text
        weights = {name: p.double() for name, p in model.named_parameters()}
        self.plain = reference.Model(weights, model.config, drafter.target.embed_tokens.weight)
        states = tiny.hidden_states(drafter.target.model, text[:-1])
        self.taps = [[states[tap][j].double() for tap in model.taps] for j in range(len(text) - 1)]
        self.ids = list(range(drafter.target.vocab_size)) if model.ids is None else model.ids.tolist()
        self.gap = float("inf")  # the least difference that decided anything

    def logits(self, path: Path) -> Tensor:
        """[V_d] after a path."""
        outs = self.plain.chain([*self.text, *path], self.taps, len(self.text) - 2, len(path) + 1)
        return self.plain.logits(outs[-1])

    def chain(self, steps: int) -> list[int]:
        """The likeliest token, and after it the likeliest, ..."""
        said: list[int] = []
        for _ in range(steps):
            logits = self.logits(tuple(said)).tolist()
            said.append(self.ids[logits.index(max(logits))])
            self._decided(sorted(logits, reverse=True), 1)
        return said

    def tree(self, top_k: int, depth: int, nodes: int) -> dict[Path, float]:
        """The chosen paths in the order they were found, with their scores."""
        candidates: list[tuple[Path, float]] = []
        level: list[tuple[Path, float]] = [((), 0.0)]
        for _ in range(depth):
            found = []
            for path, score in level:
                law = self.logits(path).log_softmax(0).tolist()
                ranked = sorted(range(len(law)), key=lambda v, law=law: -law[v])  # type: ignore[misc]
                self._decided([law[v] for v in ranked], top_k)
                found += [((*path, self.ids[v]), score + law[v]) for v in ranked[:top_k]]
            candidates += found
            level = self._best(found, top_k)
        chosen = dict(self._best(candidates, nodes))
        return {path: score for path, score in candidates if path in chosen}

    def _best(self, of: list[tuple[Path, float]], count: int) -> list[tuple[Path, float]]:
        ranked = sorted(of, key=lambda each: -each[1])
        self._decided([score for _, score in ranked], count)
        return ranked[:count]

    def _decided(self, ranked: Iterable[float], count: int) -> None:
        """The first `count` of these were taken and the others not."""
        ranked = list(ranked)
        if count < len(ranked):
            self.gap = min(self.gap, ranked[count - 1] - ranked[count])
