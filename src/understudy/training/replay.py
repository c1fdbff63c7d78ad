"""Measured acceptance, and whether decoding saw what training sees: its text is gone through once more by the objective.

Decoding's own texts, walked by `Objective.lengths`, must meet the very cycles that decoding had. Where they do not, the drafter was
trained on other inputs than it decodes from, however good its loss is; where they do, and acceptance is low all the same, drafter or
data are to blame. In fp32 the two accept lengths are equal; in bf16 near ties move a cycle now and then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from understudy.data.encode import Encoded
from understudy.data.packing import collate
from understudy.decoding.acceptance import evaluating, measure_acceptance
from understudy.drafting.objective import Batch, Objective
from understudy.features.live import LiveFeatures
from understudy.target.target import Target
from understudy.training.protocols import FeatureSource


def answered(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Batch:
    """Prompts with their answers, a text per row: [B, longest]. The answers are the mask."""
    rows = [
        [Encoded(prompt + answer, [False] * len(prompt) + [True] * len(answer))]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return Batch(*collate(rows, 0).tensors())


def walk(lengths: Sequence[int], first: int) -> list[int]:
    """Tokens that each cycle commits after the prefill's token, which is `first`, up to the end of the text.

    `lengths` [T]: accepted drafts of a cycle that begins after each token. The last token of a text is the target's own where it ends
    with its budget; where it ends with a stop token, whatever is accepted beyond is cut: no cycle commits more than there is.
    """
    cycles, at = list[int](), first
    while (left := len(lengths) - 1 - at) > 0:
        cycles.append(min(lengths[at], left - 1) + 1)
        at += cycles[-1]
    return cycles


def replayed(
    objective: Objective, features: FeatureSource, prompts: Sequence[list[int]], outputs: Sequence[list[int]]
) -> float:
    """The accept length that `objective` says greedy decoding of `prompts` had where it wrote `outputs`; 0 without a cycle."""
    tokens = cycles = 0
    with evaluating(objective), torch.no_grad():
        for prompt, output in zip(prompts, outputs, strict=True):
            lengths = objective.lengths(features(answered([prompt], [output])))[0].tolist()
            met = walk(lengths, len(prompt))
            tokens, cycles = tokens + sum(met), cycles + len(met)
    return tokens / cycles if cycles else 0.0


class Decoding:
    """A `Measure`: greedy decoding of `prompts` with the drafter as it is now, and the replay of what it wrote."""

    def __init__(self, objective: Objective, target: Target, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
        self.objective, self.target = objective, target
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.features = LiveFeatures(target, objective.needs)  # never stored ones: these texts are new

    def __call__(self) -> dict[str, float]:
        """`Acceptance.figures`, and `tau_replayed`."""
        found = measure_acceptance(self.target, self.objective.drafter, self.prompts, self.max_new_tokens)
        return {
            **found.figures(),
            "tau_replayed": replayed(self.objective, self.features, self.prompts, found.outputs),
        }
