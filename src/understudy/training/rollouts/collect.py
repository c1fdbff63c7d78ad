"""Rollouts: prompts decoded speculatively, and what each of them says about drafts, up to and including the first reject of a block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from understudy.core.records import Cycle, Needs
from understudy.decoding.acceptance import evaluating
from understudy.decoding.engine import decode
from understudy.decoding.listeners import Listener
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stats import Stats
from understudy.drafting.learning import Trace
from understudy.drafting.protocols import Drafter
from understudy.target.memory import memory_guard
from understudy.target.params import SamplingParams
from understudy.target.target import Target


@dataclass
class Rollout:
    """The judged positions of one decoded prompt, n of them.

    Position i has a state at row `rows[i]` of `ids` (it has read `ids[: rows[i] + 1]`), from which `tokens[i]` was drafted. The drafts
    before it in its block were all accepted, so `ids` is text throughout.
    """

    ids: list[int]  # [T] the prompt, and what was accepted or added after it
    rows: list[int] = field(default_factory=list)  # [n]
    tokens: list[int] = field(default_factory=list)  # [n] the drafts
    rewards: list[int] = field(default_factory=list)  # [n] 1 = accepted, 0 = the first reject of its block
    hidden: list[Tensor] = field(default_factory=list)  # per block [k, D]: what the head read then, without gradient
    logits: list[Tensor] = field(default_factory=list)  # per block [k, V]: raw verifier logits at the drafts
    stats: Stats = field(default_factory=Stats)

    def __len__(self) -> int:
        return len(self.rows)


class Collector:
    """A listener that fills a `Rollout`. Chains only."""

    needs = Needs()

    def __init__(self, prompt: list[int]) -> None:
        self.rollout = Rollout(list(prompt))

    def on_cycle(self, cycle: Cycle) -> None:
        into = self.rollout
        into.stats.add(cycle)
        if cycle.index == 0:
            return
        assert cycle.parents is None and cycle.rows.logits is not None
        start, count = cycle.rows.start, min(cycle.accepted + 1, len(cycle.drafted))
        # the last committed token and the accepted drafts; past a stop they are not output, but what was judged rests on them
        into.ids[start:] = [*cycle.rows.tokens[:1].tolist(), *cycle.drafted[: cycle.accepted]]
        if not count:
            return
        assert cycle.proposal is not None
        trace = cycle.proposal.trace
        assert isinstance(trace, Trace), "a drafter with a head that learns puts a Trace into every proposal"
        into.rows += range(start, start + count)
        into.tokens += cycle.drafted[:count]
        into.rewards += [int(i < cycle.accepted) for i in range(count)]
        with torch.inference_mode(False):  # copies that gradients may be computed from
            into.hidden.append(trace.hidden[:count].clone())
            into.logits.append(cycle.rows.logits[:count].clone())


def roll_out(
    target: Target,
    drafter: Drafter,
    prompt: list[int],
    max_new_tokens: int,
    greedy: bool,
    seed: int = 0,
    index: int = 0,
    listeners: Iterable[Listener] = (),
) -> Rollout:
    """Decode `prompt` (token ids) with the drafter as it is now.

    greedy: text and drafts are argmax. Else text is drawn from the model's own law, and drafts from the drafter's, both at
    temperature 1 and without filters, verified by rejection: then log q of a drafted token is what REINFORCE asks for.
    """
    collector = Collector(prompt)
    law = SamplingParams(temperature=0.0 if greedy else 1.0, seed=seed)
    params = DecodeParams(max_new_tokens=max_new_tokens, draft_sampling="argmax" if greedy else "sample")
    with evaluating(target.model, drafter), memory_guard(target):
        sequence = DecodeSequence(target, drafter, params, law, None, [collector, *listeners], index)
        sequence.prefill(prompt)
        for _ in decode(sequence):
            pass
    return collector.rollout
