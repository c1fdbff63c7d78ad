"""A stream of prompts through the engine, while a learner listens: one text after the other, memory flat.

    skipped = Skipped()
    prompts = read_prompts("chats.jsonl", target, skipped)
    learner = OnlineLearner(drafter)                       # the very one that `generate` and `bench` use
    result = stream(target, drafter, prompts, learner, max_new_tokens=64)
    result.total.tau, result.share_learning
    learner.close()

Nothing of the file's answers is used: what is learned is how the target goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from understudy.core.errors import UserError
from understudy.core.records import Cycle, Needs
from understudy.data.conversations import Conversation, Message, Skipped, read
from understudy.data.prompts import render
from understudy.decoding.acceptance import evaluating
from understudy.decoding.engine import decode
from understudy.decoding.listeners import Listener
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stats import Stats
from understudy.decoding.stops import StopRule
from understudy.drafting.protocols import Drafter
from understudy.target.memory import memory_guard
from understudy.target.params import params_from_generation_config
from understudy.target.target import Target


def question(conversation: Conversation) -> tuple[Message, ...]:
    """What is asked of a conversation: its first user turn, with what stands before it (a system message)."""
    first = next(i for i, message in enumerate(conversation.messages) if message.role == "user")
    return conversation.messages[: first + 1]


def prompt_ids(target: Target, conversation: Conversation) -> list[int]:
    """Token ids of `question`. UserError where the chat template refuses it, or the context has no room for an answer."""
    if target.tokenizer is None:
        raise UserError(f"{target.name or 'this model'} has no tokenizer: text cannot be turned into tokens")
    ids = render(target.tokenizer, question(conversation))
    if len(ids) >= target.context:
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {target.context}")
    return ids


def read_prompts(path: str | Path, target: Target, skipped: Skipped) -> Iterator[list[int]]:
    """Token ids of the prompts of a JSON Lines file (ShareGPT, OpenAI, `turns`, `prompt`), one line at a time.

    Lines that hold no conversation, and prompts that the model cannot take, are counted in `skipped` with number (or id) and reason,
    and left out. A file that cannot be opened raises UserError at the first prompt.
    """
    if target.tokenizer is None:
        raise UserError(f"{target.name or 'this model'} has no tokenizer: text cannot be turned into tokens")
    for conversation in read(path, skipped):
        try:
            ids = prompt_ids(target, conversation)
        except UserError as error:
            skipped.add(f"{path} ({conversation.id})", str(error))
            continue
        yield ids


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """What decoding one prompt took. Cycles, tokens and drafts are those after the first token, which is the prefill's."""

    index: int  # of the prompt in the stream, from 0 on
    prompt_tokens: int
    tokens: int  # committed after the first one
    cycles: int  # verify passes
    drafted: int
    accepted: int
    opened: int  # cycles that drafted something: the denominator of position 1
    accepted_1: int  # of those, the first draft was accepted
    decode_s: float  # drafting, verifying, choosing, committing; no listener's time, no prefill
    learning_s: float  # the learner's time, capture and updates

    @property
    def tau(self) -> float:
        """Mean tokens committed per cycle; 0 without one."""
        return self.tokens / self.cycles if self.cycles else 0.0

    @property
    def acc_1(self) -> float:
        """Acceptance at position 1: share of first drafts that were accepted; 0 without one."""
        return self.accepted_1 / self.opened if self.opened else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second *including* learning."""
        seconds = self.decode_s + self.learning_s
        return self.tokens / seconds if seconds else 0.0


SUMS = ("prompt_tokens", "tokens", "cycles", "drafted", "accepted", "opened", "accepted_1", "decode_s", "learning_s")


def summed(records: Iterable[PromptRecord]) -> PromptRecord:
    """The records as one, its `index` the number of prompts; its ratios are ratios of sums."""
    sums, count = dict.fromkeys(SUMS, 0), 0
    for record in records:
        count += 1
        for name in SUMS:
            sums[name] += getattr(record, name)
    return PromptRecord(index=count, **sums)


@dataclass
class StreamResult:
    """Sums over all prompts, and a small record of each unless `keep` was off."""

    total: PromptRecord = field(default_factory=lambda: summed(()))  # `total.index` = prompts
    records: list[PromptRecord] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    def add(self, record: PromptRecord, stats: Stats, keep: bool) -> None:
        prompts = self.total.index + 1
        both = summed((self.total, record))
        self.total = PromptRecord(prompts, *(getattr(both, name) for name in SUMS))
        self.stats.merge(stats)
        if keep:
            self.records.append(record)

    @property
    def share_learning(self) -> float:
        """Learning's share of decoding and learning together."""
        seconds = self.total.decode_s + self.total.learning_s
        return self.total.learning_s / seconds if seconds else 0.0


class _Timed:
    """A listener whose time is counted: the engine knows only what all listeners took together."""

    def __init__(self, inner: Listener) -> None:
        self.inner, self.seconds, self.needs = inner, 0.0, inner.needs

    def on_cycle(self, cycle: Cycle) -> None:
        began = time.perf_counter()
        self.inner.on_cycle(cycle)
        self.seconds += time.perf_counter() - began


class _Nobody:
    needs = Needs()

    def on_cycle(self, cycle: Cycle) -> None:
        """Without a learner nothing is learned."""


OnPrompt = Callable[[PromptRecord, list[int]], None]


def stream(
    target: Target,
    drafter: Drafter,
    prompts: Iterable[list[int]],
    learner: Listener | None = None,
    listeners: Iterable[Listener] = (),
    max_new_tokens: int = 64,
    on_prompt: OnPrompt | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop: StopRule | None = None,
    keep: bool = True,
) -> StreamResult:
    """Decode `prompts` (token ids) one after the other, each to a stop token or `max_new_tokens`; `learner` and `listeners` watch.

    The learner comes first, so that other listeners see a cycle as it left it. It is not closed here: a stream may go on. `on_prompt`
    gets every prompt's record and new tokens. `keep=False` keeps no records: memory then does not depend on the stream's length.
    Prompt i draws from random streams (seed, i), so drafters can be compared. The law is that of `generate`: the model's own
    generation config with this temperature. Raises UserError for a stream without prompts.
    """
    timed = _Timed(learner or _Nobody())
    watchers = ([timed] if learner is not None else []) + list(listeners)
    law = params_from_generation_config(
        getattr(target.model, "generation_config", None), temperature=temperature, seed=seed
    )
    params, result = DecodeParams(max_new_tokens=max_new_tokens), StreamResult()
    with evaluating(target.model, drafter), memory_guard(target):
        for index, prompt in enumerate(prompts):
            sequence = DecodeSequence(target, drafter, params, law, stop, watchers, index)
            sequence.prefill(prompt)
            stats, before, opened, first = Stats(), timed.seconds, 0, 0
            for cycle in decode(sequence):
                stats.add(cycle)
                opened += bool(cycle.drafted)
                first += cycle.index > 0 and cycle.accepted > 0
            record = PromptRecord(
                index=index,
                prompt_tokens=len(prompt),
                tokens=stats.tokens,
                cycles=stats.cycles,
                drafted=stats.drafted,
                accepted=stats.accepted,
                opened=opened,
                accepted_1=first,
                decode_s=stats.decode_s - stats.seconds["listen"],
                learning_s=timed.seconds - before,
            )
            result.add(record, stats, keep)
            if on_prompt is not None:
                on_prompt(record, sequence.output)
    if not result.total.index:
        raise UserError("there is no prompt to decode")
    return result
