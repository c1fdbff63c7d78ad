"""Prompts from a stream, and their greedy continuations with every draft that the verifier judged."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.records import Cycle
from understudy.data.conversations import Conversation, Skipped, read
from understudy.data.encode import Encoder, Rejected
from understudy.data.prompts import render
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.drafting.learning import Trace
from understudy.drafting.protocols import Drafter
from understudy.target.params import params_from_generation_config
from understudy.target.target import Target
from understudy.training.dvi_rl.buffer import Record, Rollout
from understudy.training.streaming import question


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt: the first user turn of a conversation with what stands before it, ready to be answered."""

    position: int  # conversations of the file before it
    prompt: list[int]
    reference: list[int]  # the answer that follows in the data, stop token and all, cut to `max_new_tokens`


class Prompts:
    """The prompts of a JSON Lines file, streamed: memory is that of one line.

    What is malformed, or refused by the chat template, is counted in `skipped`, what is longer than `max_prompt_tokens`, or leaves
    the context no room for an answer, in `too_long`. Iterating reads from the beginning; `after(n)` leaves out the first n
    conversations without tokenising them.

    References are the very tokens that the chat template writes behind the prompt, the stop token last (`data.encode`). Answers
    that it writes otherwise than the model does when it is served count as none. Without a chat template nothing says how an
    answer ends: it is then the tokens of its text alone.
    """

    def __init__(self, path: Path, target: Target, max_prompt_tokens: int, max_new_tokens: int) -> None:
        if target.tokenizer is None:
            raise UserError(
                f"{target.name} has no tokenizer, so prompts cannot be rendered: give a folder that has one"
            )
        self.path, self.tokenizer = path, target.tokenizer
        self._encoder = _encoder(target)
        self.most = min(max_prompt_tokens, target.context - max_new_tokens)
        self.max_new_tokens = max_new_tokens
        self.skipped, self.too_long = Skipped(), 0

    def after(self, position: int) -> Iterator[Sample]:
        """UserError where the file cannot be read."""
        for index, conversation in enumerate(read(self.path, self.skipped)):
            if index < position:
                continue
            try:
                prompt = render(self.tokenizer, question(conversation))
            except UserError as error:
                self.skipped.add(f"{self.path} ({conversation.id})", str(error))
                continue
            if len(prompt) > self.most:
                self.too_long += 1
                continue
            yield Sample(index, prompt, self._reference(conversation, prompt))

    def __iter__(self) -> Iterator[Sample]:
        return self.after(0)

    def _reference(self, conversation: Conversation, prompt: list[int]) -> list[int]:
        """The answer to `question`, cut to `max_new_tokens`; empty where there is none."""
        asked = question(conversation)
        answers = conversation.messages[len(asked) : len(asked) + 1]
        if not answers or answers[0].role != "assistant":
            return []
        if self.tokenizer.chat_template is None:
            answer: Any = self.tokenizer(answers[0].content, add_special_tokens=False)["input_ids"]
            return list(answer)[: self.max_new_tokens]
        if self._encoder is None:
            return []
        try:
            encoded = self._encoder(Conversation(conversation.id, (*asked, *answers)))
        except Rejected:
            return []
        start = encoded.mask.index(True)
        if encoded.ids[:start] != prompt:
            return []
        return encoded.ids[start : start + sum(encoded.mask)][: self.max_new_tokens]


def _encoder(target: Target) -> Encoder | None:
    """Whole answers by the target's chat template; None without a template, or with one that writes no answers."""
    try:
        return Encoder(target.tokenizer, max_length=sys.maxsize, last_turn_only=True, stop_ids=target.eos_ids)
    except UserError:
        return None


def collect(target: Target, drafter: Drafter, sample: Sample, max_new_tokens: int) -> Rollout:
    """Continue a prompt greedily with `drafter`, up to a stop token or `max_new_tokens`, and keep what was judged.

    The law is the one that `generate` uses at temperature 0: penalties of the model's generation config hold, and rewards are those
    of the choices under them. Confidence and `nll` are of the raw logits.
    """
    law = params_from_generation_config(getattr(target.model, "generation_config", None), temperature=0.0)
    sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=max_new_tokens), law)
    sequence.prefill(sample.prompt)
    rollout = Rollout([], len(sample.prompt), sample.reference)
    for cycle in decode(sequence):
        logits = cycle.rows.logits
        assert logits is not None
        # the prompt's last row gives the first new token; later, row i gives the i-th one
        said = logits[-1:] if cycle.index == 0 else logits[: len(cycle.committed)]
        rollout.nll -= float(_log_prob(said, cycle.committed).sum())
        rollout.records += judged(cycle, len(sequence.tokens) - len(cycle.committed))
        rollout.seconds += sum(cycle.seconds.values())
    rollout.tokens = list(sequence.tokens)
    return rollout


def judged(cycle: Cycle, start: int) -> list[Record]:
    """The drafts of a cycle up to and including the first reject, as far as the text goes. `start` = tokens before the cycle.

    Drafts after a reject were judged on a text that is not there, and drafts after a stop token belong to no text.
    """
    count = min(cycle.accepted + 1, len(cycle.drafted), len(cycle.committed))
    if not count:
        return []
    assert cycle.parents is None and cycle.proposal is not None and cycle.rows.logits is not None
    trace = cycle.proposal.trace
    assert isinstance(trace, Trace), "a drafter that learns traces its proposals"
    states = trace.hidden[:count].to("cpu", torch.float32, copy=True)
    confidence = _log_prob(cycle.rows.logits[:count], cycle.drafted[:count]).exp().tolist()
    return [
        Record(states[i], cycle.drafted[i], float(i < cycle.accepted), confidence[i], start - 1 + i)
        for i in range(count)
    ]


def _log_prob(logits: Tensor, tokens: list[int]) -> Tensor:
    """log softmax(logits)[token] of [n, V] logits and n tokens: [n] fp32."""
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    return logits.float().log_softmax(-1).gather(1, chosen)[:, 0]
