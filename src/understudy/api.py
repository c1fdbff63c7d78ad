"""The library's front door: load a model with a drafter, generate, stream cycles, plug into transformers' `generate`.

import understudy

engine = understudy.load(drafter="prompt-lookup")          # the built-in model; or a name, a path, a loaded model
print(understudy.generate(engine, "Write `def add(a, b)`.").text)
for cycle in understudy.stream(engine, "Write `def add(a, b)`."):
    print(cycle.committed)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from torch import nn

from understudy.assets import pocket_path
from understudy.core.errors import UserError
from understudy.core.explain import Given, explain
from understudy.core.records import Cycle
from understudy.data.conversations import Message
from understudy.data.prompts import render, thinking_variables
from understudy.decoding.engine import decode
from understudy.decoding.listeners import Listener
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stats import Stats
from understudy.decoding.stops import StopRule
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import build
from understudy.target.loading import load_target
from understudy.target.memory import memory_guard
from understudy.target.params import SamplingParams, params_from_generation_config
from understudy.target.target import Target
from understudy.training.online.learner import OnlineLearner, learner_of

POCKET = "pocket"
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Engine:
    """A target with a drafter, ready to decode any number of texts. `listeners` see the cycles of all of them.

    A drafter that learns while it decodes brings its learner along as a listener; `close()` saves what it learned.
    """

    target: Target
    drafter: Drafter
    listeners: tuple[Listener, ...] = ()

    @property
    def learner(self) -> OnlineLearner | None:
        """The online learner among the listeners."""
        return next((listener for listener in self.listeners if isinstance(listener, OnlineLearner)), None)

    def close(self) -> None:
        """Save what was learned, where the drafter's options name a folder for it."""
        if self.learner is not None:
            self.learner.close()

    def ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text becomes a user turn, messages go through the chat template, ids stay as they are."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise UserError("the prompt is empty: give some text to answer")
            prompt = [{"role": "user", "content": prompt}]
        if not prompt:
            raise UserError("the prompt is empty: give some text to answer")
        if isinstance(prompt[0], int):
            ids: list[int] = list(prompt)  # type: ignore[arg-type]
            if wrong := [i for i in ids if not 0 <= i < self.target.vocab_size]:
                raise UserError(f"token id {wrong[0]} is not in the vocabulary of {self.target.vocab_size}")
            return ids
        if not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in prompt):
            raise UserError("a prompt is text, a list of token ids, or messages with role and content")
        messages = [Message(m["role"], m["content"]) for m in prompt]  # type: ignore[index]
        variables = thinking_variables(self._tokenizer(), self.target.thinking or "default")
        return render(self._tokenizer(), messages, **variables)

    def text(self, ids: Sequence[int], stop: StopRule | None = None) -> str:
        """Text of new tokens, cut before a stop string, without special tokens."""
        text: str = self._tokenizer().decode(list(ids), skip_special_tokens=True)
        return stop.trim(text) if stop else text

    def stop_rule(self, strings: str | Sequence[str] = (), ignore_eos: bool = False) -> StopRule:
        """Stop tokens and stop strings: those given, and those of the model's generation config."""
        given = [strings] if isinstance(strings, str) else list(strings)
        if not all(given):
            raise UserError("a stop string must not be empty")
        own = getattr(self._generation_config, "stop_strings", None) or ()
        every = [*given, *([own] if isinstance(own, str) else own)]
        ids = () if ignore_eos else self.target.eos_ids
        return StopRule(ids, every, self._tokenizer().decode if every else None)

    @property
    def _generation_config(self) -> Any:
        return getattr(self.target.model, "generation_config", None)

    def sequence(
        self,
        *,
        stop: StopRule | None = None,
        listeners: Iterable[Listener] = (),
        index: int = 0,
        **options: Any,
    ) -> DecodeSequence:
        """A sequence to prefill and decode. `options` are the fields of `DecodeParams` and `SamplingParams`.

        Sampling options that are not given come from the model's own generation config.
        """
        unknown = sorted(set(options) - set(DecodeParams.model_fields) - set(SamplingParams.model_fields))
        if unknown:
            raise UserError(f"unknown option {unknown[0]!r} of generate")
        decoding = {k: v for k, v in options.items() if k in DecodeParams.model_fields}
        sampling = {k: v for k, v in options.items() if k in SamplingParams.model_fields}
        law = params_from_generation_config(self._generation_config, **sampling)
        own = getattr(self._generation_config, "max_new_tokens", None)
        try:
            params = DecodeParams(**({"max_new_tokens": own} if own else {}) | decoding)
        except pydantic.ValidationError as error:
            raise UserError(explain(error, {k: Given(k, v) for k, v in decoding.items()})) from None
        if params.draft_sampling == "sample" and law.temperature == 0:
            raise UserError("draft_sampling=sample draws drafts, which needs a temperature above 0")
        watching = (*self.listeners, *listeners)
        return DecodeSequence(self.target, self.drafter, params, law, stop, watching, index)

    def _tokenizer(self) -> Any:
        if self.target.tokenizer is None:
            raise UserError("this model was given without a tokenizer: pass token ids, or load(..., tokenizer=...)")
        return self.target.tokenizer


@dataclass(frozen=True)
class Generation:
    """A finished text: new tokens, their text, why it ended ("stop" or "length") and what decoding did."""

    tokens: list[int]
    text: str | None
    finished: str
    stats: Stats


def load(
    model: str | Path | nn.Module | Target | None = None,
    drafter: str | Drafter = "prompt-lookup",
    *,
    thinking: str | None = None,
    **options: Any,
) -> Engine:
    """An Engine. `model`: a Hugging Face name, a folder, a loaded model, or nothing for the built-in one.

    `drafter`: `NAME[:PATH][,key=value...]` or a Drafter. `thinking`: whether the target thinks before it answers, on, off, or as its
    chat template has it (default); kept in `Target.thinking`. `options` go to `load_target`: tokenizer, dtype, device, device_map, ...
    """
    given = options if thinking is None else {**options, "thinking": thinking}
    if isinstance(model, Target) and given:
        raise UserError(f"a loaded target stays as it is: {next(iter(given))} goes with a name or a folder")
    if not isinstance(model, Target):
        model = load_target(pocket_path() if model is None or model == POCKET else model, **options)
        thinking_variables(model.tokenizer, thinking or "default")  # refuses what the template cannot do
    model.thinking = thinking or model.thinking or "default"
    built = build(drafter, model) if isinstance(drafter, str) else drafter
    learner = learner_of(built)
    return Engine(model, built, () if learner is None else (learner,))


def stream(
    engine: Engine, prompt: Prompt, *, stop: str | Sequence[str] = (), ignore_eos: bool = False, **options: Any
) -> Iterator[Cycle]:
    """Decode `prompt` and yield every cycle as it is committed; `cycle.committed` holds the new tokens."""
    sequence = engine.sequence(stop=engine.stop_rule(stop, ignore_eos), **options)
    with memory_guard(engine.target):
        sequence.prefill(engine.ids(prompt))
        yield from decode(sequence)


def generate(
    engine: Engine,
    prompt: Prompt,
    *,
    n: int = 1,
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
    listeners: Iterable[Listener] = (),
    **options: Any,
) -> Any:
    """The answer to `prompt` as a Generation; with n > 1 a list of n of them, sampled from one prefill.

    `options` are the fields of `DecodeParams` (max_new_tokens, steps, adaptive, draft_sampling, ...) and of `SamplingParams`
    (temperature, top_p, seed, ...).
    """
    if n < 1:
        raise UserError(f"n must be at least 1 (got {n})")
    rule = engine.stop_rule(stop, ignore_eos)
    first = engine.sequence(stop=rule, listeners=listeners, **options)
    if n > 1 and first.sampling.temperature == 0:
        raise UserError("greedy answers are all the same: n > 1 needs a temperature")
    with memory_guard(engine.target):
        first.prefill(engine.ids(prompt))
        sequences = [first, *(first.fork(index) for index in range(1, n))]
        done = [_finish(engine, sequence, rule) for sequence in sequences]
    return done[0] if n == 1 else done


def _finish(engine: Engine, sequence: DecodeSequence, rule: StopRule) -> Generation:
    stats = Stats()
    for cycle in decode(sequence):
        stats.add(cycle)
    text = engine.text(sequence.output, rule) if engine.target.tokenizer is not None else None
    assert sequence.finished is not None
    return Generation(sequence.output, text, sequence.finished, stats)
