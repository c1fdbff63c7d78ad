"""Measuring a drafter by decoding held-out prompts with it, and what its figures are read against.

    acceptance = measure_acceptance(target, drafter, prompts)
    acceptance.tau                  # what counts: mean tokens committed per cycle
    acceptance.conditional          # position by position: where drafting breaks off

Training accuracy is measured on given texts; what decoding gains is measured here, on the text that the target itself writes.
`perplexity` tells whether a text changed or the drafter did, `plain_ms_per_token` is what a speed-up is measured against.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import nn

from understudy.core.errors import UserError
from understudy.core.records import Cycle, Needs
from understudy.decoding.engine import decode
from understudy.decoding.listeners import Listener
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stats import Stats
from understudy.decoding.stops import StopRule
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import build
from understudy.target.memory import memory_guard
from understudy.target.params import params_from_generation_config
from understudy.target.session import TargetSession
from understudy.target.target import Target
from understudy.telemetry.repeats import repeat_share

CHUNK = 256  # rows of a text that have logits at one time
WARM_TOKENS = 8  # new tokens before the clock runs


@dataclass
class Acceptance:
    """What decoding some prompts gave: sums and counts; the ratios are properties.

    Three accuracies per position k = 1, 2, ... of a chain, not to be mixed:
    - marginal: draft k is the target's choice after the drafts before it, right or wrong, of the cycles with a k-th draft;
    - conditional: the same, of the cycles whose first k - 1 drafts were all accepted;
    - joint: the first k drafts were all accepted, of all cycles. Their sum + 1 is tau where no text is cut at a stop.
    Lists from position 1 on. Trees have the joint one only: several drafts share a depth.
    """

    stats: Stats = field(default_factory=Stats)
    outputs: list[list[int]] = field(default_factory=list)  # new tokens per prompt
    trees: bool = False
    drafted_at: Counter[int] = field(default_factory=Counter)  # k -> cycles with a k-th draft
    matched_at: Counter[int] = field(default_factory=Counter)  # k -> of those, draft k is the target's choice
    tried_at: Counter[int] = field(default_factory=Counter)  # k -> of those, all drafts before k were accepted
    accepted_at: Counter[int] = field(default_factory=Counter)  # k -> of those, draft k was accepted too

    def add(self, cycle: Cycle) -> None:
        self.stats.add(cycle)
        if cycle.index == 0:
            return
        if cycle.parents is not None:
            self.trees = True
            return
        for k, (draft, choice) in enumerate(zip(cycle.drafted, cycle.choices, strict=False), start=1):
            self.drafted_at[k] += 1
            self.matched_at[k] += draft == choice
            self.tried_at[k] += cycle.accepted >= k - 1
            self.accepted_at[k] += cycle.accepted >= k

    @property
    def tau(self) -> float:
        """Mean tokens committed per cycle."""
        return self.stats.tau

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted."""
        return self.stats.acceptance_rate

    @property
    def joint(self) -> list[float]:
        return self.stats.acc_at

    @property
    def marginal(self) -> list[float]:
        return [] if self.trees else [self.matched_at[k] / n for k, n in sorted(self.drafted_at.items())]

    @property
    def conditional(self) -> list[float]:
        """Ends where no cycle came."""
        return [] if self.trees else [self.accepted_at[k] / n for k, n in sorted(self.tried_at.items()) if n]

    @property
    def repeat_share(self) -> float:
        """Mean share of repeated 4-grams of the outputs: text that repeats itself makes every tau look good."""
        return fmean(map(repeat_share, self.outputs)) if self.outputs else 0.0

    @property
    def tokens(self) -> int:
        """New tokens, the first one of every prompt included."""
        return sum(map(len, self.outputs))

    @property
    def seconds(self) -> float:
        """Prefill and decoding of all prompts, drafting and listeners included."""
        return self.stats.prefill_s + self.stats.decode_s

    def figures(self) -> dict[str, float]:
        """The ratios as one flat mapping of names to numbers, for logs: tau, acceptance_rate, joint_1, ..."""
        flat = {
            "tau": self.tau,
            "acceptance_rate": self.acceptance_rate,
            "repeat_share": self.repeat_share,
            "tokens": float(self.tokens),
            "seconds": self.seconds,
        }
        for name in ("marginal", "conditional", "joint"):
            flat |= {f"{name}_{k}": value for k, value in enumerate(getattr(self, name), start=1)}
        return flat


def measure_acceptance(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    listeners: Iterable[Listener] = (),
    seed: int = 0,
) -> Acceptance:
    """Decode `prompts` (token ids) one by one with `drafter`, each up to a stop token or `max_new_tokens`.

    The law is the one that `generate` and `bench` use: the model's own generation config with this temperature (0 = greedy).
    Weights, training modes and global random streams of target and drafter stay as they are. Raises UserError for no prompt, or
    one that is empty or longer than the context.
    """
    _some(prompts)
    listeners = tuple(listeners)
    law = params_from_generation_config(
        getattr(target.model, "generation_config", None), temperature=temperature, seed=seed
    )
    result = Acceptance()
    with evaluating(target.model, drafter), memory_guard(target):
        for index, prompt in enumerate(prompts):
            params = DecodeParams(max_new_tokens=max_new_tokens)
            sequence = DecodeSequence(target, drafter, params, law, listeners=listeners, index=index)
            sequence.prefill(prompt)
            for cycle in decode(sequence):
                result.add(cycle)
            result.outputs.append(sequence.output)
    return result


def plain_ms_per_token(target: Target, prompts: Sequence[list[int]], max_new_tokens: int = 64) -> float:
    """Milliseconds per token of plain decoding (drafter `none`), after the first token: the denominator of a speed-up.

    Greedy, past stop tokens, so that every prompt gives `max_new_tokens` tokens if the context has room. The first prompt runs
    once for a few tokens before the clock does. Raises UserError as `measure_acceptance`, and where no token is left to time.
    """
    _some(prompts)
    drafter, stats = build("none", target), Stats()
    with evaluating(target.model), memory_guard(target):
        for timed, limit, chosen in ((False, WARM_TOKENS, prompts[:1]), (True, max_new_tokens, prompts)):
            for prompt in chosen:
                sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=limit), stop=StopRule())
                sequence.prefill(prompt)
                for cycle in decode(sequence):
                    if timed:
                        stats.add(cycle)
    if not stats.tokens:
        raise UserError("plain decoding gave no token after the first: allow at least 2 new tokens, or shorten prompts")
    return 1000 * stats.decode_s / stats.tokens


def perplexity(target: Target, texts: Iterable[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood per token of `texts` (token ids) under the target, raw logits, fp32.

    A text's first token is given, not predicted; a text of one token says nothing. Logits exist for `CHUNK` rows at a time.
    Raises UserError if no text has two tokens, or one is longer than the context.
    """
    total, count = 0.0, 0
    with evaluating(target.model), memory_guard(target), torch.inference_mode():
        for text in texts:
            if len(text) > target.context:
                raise UserError(f"a text has {len(text)} tokens, the model's context is {target.context}: shorten it")
            total += sum(_losses(target, text))
            count += max(len(text) - 1, 0)
    if not count:
        raise UserError("perplexity needs a text of at least two tokens")
    return math.exp(total / count)


def _losses(target: Target, text: Sequence[int]) -> Iterator[float]:
    """Summed negative log-likelihoods of a text, chunk by chunk."""
    session = TargetSession(target, Needs(logits=True))
    for start in range(0, len(text) - 1, CHUNK):
        part = text[start : min(start + CHUNK, len(text) - 1)]
        rows = session.prefill(part, want_logits=True)
        assert rows.logits is not None
        following = torch.tensor(text[start + 1 : start + len(part) + 1], device=rows.logits.device)
        yield float(nn.functional.cross_entropy(rows.logits.float(), following, reduction="sum").item())
        session.commit(rows, range(len(part)), part)


def _some(prompts: Sequence[list[int]]) -> None:
    if not prompts:
        raise UserError("there is no prompt to decode")


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is in the mode that it was in."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    try:
        for root in modules:
            root.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
