"""Answers from the target in this process: many dialogues side by side, one token each per pass.

A dialogue keeps its slot from its first turn to its last, so history is never run twice. A slot that is done takes the next dialogue
before the next pass: answers that end early hold nobody up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.seeds import generator
from understudy.distill.dialogue import Answer, Dialogue, Repeats, Style
from understudy.distill.slots import Slots
from understudy.ops import laws
from understudy.target.memory import memory_guard
from understudy.target.params import SamplingParams
from understudy.target.processors import History, Processors
from understudy.target.target import Target


@dataclass(slots=True)
class Turn:
    """An answer that is being written into a slot."""

    dialogue: Dialogue
    room: int  # new tokens at most
    ids: list[int]
    repeats: Repeats
    history: History | None
    last: int  # token
    points: Tensor  # [room] the numbers that its tokens are drawn with; [0] if greedy

    def add(self, token: int, style: Style) -> Answer | None:
        """Take the next token. The answer, once it is over: also when it repeats itself too much, whatever would follow."""
        self.ids.append(token)
        self.last = token
        if self.history is not None:
            self.history.extend([token])
        if token in style.stops:
            return Answer(self.ids, "stop", self.repeats.share)
        self.repeats.add(token)
        if (share := self.repeats.at_least(self.room)) > style.max_repeat_share:
            return Answer(self.ids, "length", share)
        return Answer(self.ids, "length", self.repeats.share) if len(self.ids) == self.room else None


class Writer:
    """The target with `batch_size` slots. Draws depend on (seed, number of the dialogue, turn, position) and on nothing else."""

    def __init__(
        self, target: Target, law: SamplingParams, style: Style, max_new_tokens: int = 512, batch_size: int = 32
    ) -> None:
        self.target, self.law, self.style = target, law, style
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.processors = Processors(law, target.vocab_size, sorted(style.stops), target.device)
        self.written = 0  # tokens so far, those of dropped answers too

    @torch.inference_mode()
    def answer(self, dialogues: Iterable[Dialogue]) -> Iterator[Dialogue]:
        """Yield each dialogue once all its turns are over, in the order in which they end."""
        waiting = iter(dialogues)
        with memory_guard(self.target):
            slots = Slots(self.target, self.batch_size, self.style.limit)
            turns: dict[int, Turn] = {}  # by slot
            free = list(reversed(range(self.batch_size)))  # the first ones first: those need no copy of their caches
            more = True
            while more or turns:
                while free and more:
                    if (dialogue := next(waiting, None)) is None:
                        more = False
                    elif self._begin(slots, free[-1], dialogue, turns):
                        free.pop()
                    else:
                        yield dialogue
                at = sorted(turns)
                if not at:
                    continue
                logits = slots.step(at, [turns[slot].last for slot in at])
                for slot, token in zip(at, self._choose(logits, [turns[slot] for slot in at]), strict=True):
                    answer = self._add(turns[slot], token)
                    if answer is None:
                        continue
                    dialogue = turns.pop(slot).dialogue
                    dialogue.answer(answer)
                    if not self._begin(slots, slot, dialogue, turns):
                        free.append(slot)
                        yield dialogue

    def _begin(self, slots: Slots, slot: int, dialogue: Dialogue, turns: dict[int, Turn]) -> bool:
        """Begin the dialogue's turn at hand in a slot, and the next ones if it is over with one token. False if all are over."""
        while dialogue.prompt is not None:
            turn = self._turn(dialogue, dialogue.prompt)
            token = self._choose(slots.prefill(slot, dialogue.prompt), [turn])[0]
            if (answer := self._add(turn, token)) is None:
                turns[slot] = turn
                return True
            dialogue.answer(answer)
        return False

    def _turn(self, dialogue: Dialogue, prompt: list[int]) -> Turn:
        room = min(self.max_new_tokens, self.style.limit - len(prompt))
        points = torch.empty(0)
        if not self.processors.greedy:
            random = generator("cpu", self.law.seed, dialogue.number, dialogue.turn)
            points = laws.uniforms(room, random).to(self.target.device)
        return Turn(dialogue, room, [], Repeats(), self.processors.history(prompt), prompt[-1], points)

    def _add(self, turn: Turn, token: int) -> Answer | None:
        self.written += 1
        return turn.add(token, self.style)

    def _choose(self, logits: Tensor, turns: list[Turn]) -> list[int]:
        """The next token of each turn, from its raw logits [n, V]."""
        processors = self.processors
        if not processors.identity:
            logits = self._processed(logits, turns)
        if processors.greedy:
            chosen = laws.argmax(logits)
        else:
            chosen = laws.inverse_cdf(laws.law(logits), torch.stack([turn.points[len(turn.ids)] for turn in turns]))
        tokens: list[int] = chosen.tolist()
        if max(tokens) >= self.target.vocab_size:
            raise UserError("the model computed logits that are no numbers (NaN or all -inf): try --dtype float32")
        return tokens

    def _processed(self, logits: Tensor, turns: list[Turn]) -> Tensor:
        if not self.processors.needs_history:
            return self.processors.apply(logits)
        rows = []
        for i, turn in enumerate(turns):
            assert turn.history is not None
            last = torch.tensor([turn.last], device=logits.device)
            rows.append(self.processors.apply(logits[i : i + 1], turn.history.rows(last)))
        return torch.cat(rows)
