"""What DFlash drafts, slowly: every block from scratch, through `reference.Model`, in float64.

    drafter = drafts.drafter(block_size=6, steps=3)
    sequence = at(drafter, text)
    proposed(sequence)                        # what the session drafts
    drafts.Slow(drafter, text).chain(3)       # what it should
    drafts.made("plain")                      # one of `KINDS`

Targets are float64 too: then no two ways to the same draft differ by so much that another token comes out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import tiny
from dflash import reference
from eagle3 import drafts as chains
from eagle3.drafts import at, opened
from understudy.core.records import Budget
from understudy.decoding.sequence import DecodeSequence
from understudy.drafters.dflash.config import DFlashConfig
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.target.target import Target

__all__ = ["KINDS", "Slow", "at", "drafter", "made", "opened", "proposed", "target", "text"]
LEARNED = 40  # tokens of a text that `made` drafters half know
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"block_size": 5},
    "narrow": {"block_size": 8, "steps": 3},
    "window": {"block_size": 4, "sliding_window": 5, "lessons": 8},
    "mixed": {"block_size": 5, "sliding_window": 4, "layer_types": ("full_attention", "sliding_attention")},
    "Markov": {"block_size": 4, "markov_rank": 3},
    "confidence": {"block_size": 5, "markov_rank": 3, "confidence_head": True, "threshold": 0.03},
}


def target(family: str = "llama", context: int = 512) -> Target:
    return chains.target(family, context, tiny.V)


def text(length: int, seed: int = 0) -> list[int]:
    return tiny.prompt(length, seed)


def proposed(sequence: DecodeSequence, depth: int = 60) -> list[int]:
    with torch.inference_mode():
        return sequence.draft.propose(Budget(depth, 60), sequence.recorder.begin()).tokens.tolist()


def drafter(on: Target | None = None, seed: int = 0, spread: float = 0.25, lessons: int = 0, steps: int | None = None,
            threshold: float = 0.0, **options: Any) -> DFlashDrafter:  # fmt: skip
    """Random wide weights, and after `lessons` steps of training some that know the target a little.

    `options` are the objective's (block_size, sliding_window, heads).
    """
    on = target() if on is None else on
    objective = reference.objective(on, seed, spread, **options)
    if lessons:
        known = [*text(7), *tiny.continuation(on.model, text(7), min(LEARNED, on.context - 7))]
        rows = [[reference.Document(known, [i >= 7 for i in range(len(known))])]]
        reference.taught(objective, rows, lessons, lr=1e-2)
    model = objective.drafter.model.requires_grad_(False).eval()
    return DFlashDrafter(on, model, DFlashConfig(steps=steps, threshold=threshold))


@cache
def made(kind: str, family: str = "llama", context: int = 512) -> DFlashDrafter:
    """One of `KINDS` that has learned a little, so that any number of drafts is accepted."""
    return drafter(target(family, context), **{"seed": 1, "lessons": 16, "spread": 0.05, **KINDS[kind]})


class Slow:
    """What a drafter says after a text."""

    def __init__(self, drafter: DFlashDrafter, text: list[int]) -> None:
        self.plain, self.text, self.drafter = reference.plain(drafter), text, drafter
        states = tiny.hidden_states(drafter.target.model, text[:-1]) if len(text) > 1 else []
        taps = [[states[tap][j].double() for tap in drafter.model.taps] for j in range(len(text) - 1)]
        self.context = self.plain.context(taps)
        self.gap = float("inf")  # the least difference that decided anything

    def outs(self) -> list[Tensor]:
        """States of the rows that draft."""
        first = self.plain.first
        return self.plain.block(self.text[-1], self.context, len(self.text) - 1, self.drafter.steps + first)[first:]

    def chain(self, depth: int) -> list[int]:
        said, sure, threshold = list[int](), 1.0, self.drafter.config.threshold
        for out in self.outs()[:depth]:
            before = [self.text[-1], *said][-1]
            if threshold:
                sure *= float(self.plain.confidence(out, before).sigmoid())
                if said:
                    self.gap = min(self.gap, abs(sure - threshold))
                    if sure < threshold:
                        break
            logits = self.plain.logits(out, before)
            self.gap = min(self.gap, float(logits.topk(2).values.diff().abs()))
            said.append(int(logits.argmax()))
        return said
