"""A mode is one way to answer a prompt: a drafter in our engine here, a way of transformers' `generate` in `huggingface`.

All of them share one model in memory, run in inference mode and are clocked alike: the clock of a turn starts with the token ids
at hand, "prefill" ends when the first new token is known, and decoding ends with the last one. CUDA is waited for at those three
moments only. Garbage collection waits until the turn is over.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from understudy.analysis.clock import now, undisturbed
from understudy.core.records import Cycle
from understudy.decoding.engine import decode
from understudy.decoding.listeners import Listener
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stats import Stats
from understudy.decoding.stops import StopRule
from understudy.drafting.lora import load_lora_state_dict, lora_state_dict
from understudy.drafting.protocols import Drafter
from understudy.target.params import SamplingParams
from understudy.target.target import Target
from understudy.training.online.learner import OnlineLearner, learner_of


@dataclass(frozen=True)
class Draft:
    """What `--verbose` prints of a cycle."""

    drafted: list[int]
    accepted: int
    committed: list[int]


@dataclass
class Turn:
    """One prompt, answered once by one mode."""

    output: list[int]  # new tokens, up to and including the first stop
    prefill_s: float  # until the first new token is known
    decode_s: float  # from there to the end
    stats: Stats  # of the cycles after the first token; its seconds are by section
    widths: Counter[int] = field(default_factory=Counter)  # drafted tokens -> cycles
    log: list[Draft] = field(default_factory=list)

    @property
    def decoded(self) -> int:
        """Tokens that came during `decode_s`."""
        return self.stats.tokens


class Mode(Protocol):
    """A row of the results."""

    name: str  # as given
    ours: bool  # runs in our engine: its drafts and its sections are known

    def begin(self) -> None:
        """A repeat begins: whatever was learned in the one before is forgotten."""

    def turn(self, prompt: list[int], index: int, limit: int) -> Turn:
        """Answer `prompt` with at most `limit` tokens. `index` keeps the random streams of prompts apart."""


class EngineMode:
    """A drafter in our engine. One that learns while it decodes begins every repeat with the weights that it was given."""

    ours = True

    def __init__(
        self,
        name: str,
        target: Target,
        drafter: Drafter,
        params: DecodeParams = DecodeParams(),
        sampling: SamplingParams = SamplingParams(),
        stop: StopRule | None = None,
        verbose: bool = False,
    ) -> None:
        self.name, self.target, self.drafter = name, target, drafter
        self.params, self.sampling, self.verbose = params, sampling, verbose
        self.stop = StopRule(target.eos_ids) if stop is None else stop
        self.listeners: tuple[Listener, ...] = ()  # besides the learner
        self.learner: OnlineLearner | None = None
        options = drafter.learning
        learns = options is not None and (options.dvi_online or options.dvi_debug)
        self._weights = lora_state_dict(drafter) if learns else None
        self._heard: tuple[Listener, ...] = ()  # who hears measured turns: nobody before the first repeat begins

    def begin(self) -> None:
        if self._weights is not None:
            load_lora_state_dict(self.drafter, self._weights)
            self.learner = learner_of(self.drafter, self.sampling.seed)
        self._heard = (*([self.learner] if self.learner else []), *self.listeners)

    def sequence(self, prompt: list[int], index: int, limit: int) -> DecodeSequence:
        """A prefilled sequence that nobody listens to."""
        return self._sequence(prompt, index, limit, ())

    def _sequence(self, prompt: list[int], index: int, limit: int, listeners: tuple[Listener, ...]) -> DecodeSequence:
        params = self.params.model_copy(update={"max_new_tokens": limit})
        sequence = DecodeSequence(self.target, self.drafter, params, self.sampling, self.stop, listeners, index)
        sequence.prefill(prompt)
        return sequence

    def turn(self, prompt: list[int], index: int, limit: int) -> Turn:
        stats, widths, log = Stats(), Counter[int](), list[Draft]()
        with undisturbed():
            began = now(self.target.device)
            sequence = self._sequence(prompt, index, limit, self._heard)
            cycles = decode(sequence)
            stats.add(next(cycles))
            first = now(self.target.device)
            for cycle in cycles:
                stats.add(cycle)
                widths[len(cycle.drafted)] += 1
                if self.verbose:
                    log.append(_noted(cycle))
            done = now(self.target.device)
        return Turn(sequence.output, first - began, done - first, stats, widths, log)


def _noted(cycle: Cycle) -> Draft:
    return Draft(cycle.drafted, cycle.accepted, list(cycle.committed))
