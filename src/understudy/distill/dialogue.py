"""A conversation whose user turns the target answers anew, one after another, and the rows of token ids that this gives.

Turns stay one document as long as the chat template renders the next prompt with exactly the ids so far as its beginning. Where it
does not (it strips thinking from history, or the answer's text has another spelling in tokens), a new document begins with the
prompt as the template renders it, history included; of history nothing is supervised twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from understudy.core.errors import UserError
from understudy.data.conversations import Conversation, Message
from understudy.data.prompts import render

LOOP = "the answer loops"
EMPTY = "the answer is empty"
NO_ROOM = "no room for an answer within --max-length"
REFUSED = "the chat template refuses it"


@dataclass(slots=True)
class Answer:
    """What the target said to a prompt. `ids` end with the stop token if it stopped by one."""

    ids: list[int]
    finished: Literal["stop", "length"]
    repeats: float = 0.0  # share of its 4-grams that occurred before


@dataclass(slots=True)
class Document:
    """One row to be: ids, which of them the target wrote, and what it says in words."""

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)  # how each supervised answer ended


@dataclass(frozen=True, slots=True)
class Style:
    """How prompts are rendered and answers judged; the same for all conversations of a run."""

    tokenizer: Any
    stops: frozenset[int]
    limit: int  # most tokens of a row
    max_repeat_share: float
    variables: dict[str, Any] = field(default_factory=dict)  # of the chat template


class Dialogue:
    """One conversation on its way. `prompt` is what waits for an answer; None once all turns are over.

    A turn whose answer is dropped leaves the history with its question: the next one is asked as if it had not been there.
    """

    def __init__(self, conversation: Conversation, number: int, style: Style) -> None:
        self.id, self.number, self.style = conversation.id, number, style
        self.turn = -1  # number of the user turn at hand
        self.documents: list[Document] = []
        self.dropped: list[dict[str, Any]] = []  # turns without an answer: {"turn", "reason", ...}
        self.prompt: list[int] | None = None
        self.failure: str | None = None  # why it was given up; it is to be tried again
        self._todo = _turns(conversation)
        self._history: list[Message] = []
        self._asked: list[Message] = []  # the turn at hand
        self._next()

    def answer(self, answer: Answer) -> None:
        """Take the answer to `prompt`, and render the next one."""
        style, prompt = self.style, self.prompt
        assert prompt is not None
        stopped = answer.finished == "stop"
        words = style.tokenizer.decode(answer.ids[:-1] if stopped else answer.ids, skip_special_tokens=True)
        if answer.repeats > style.max_repeat_share:
            self._drop(LOOP, repeat_share=round(answer.repeats, 3))
        elif not words.strip():
            self._drop(EMPTY)
        else:
            self._keep(prompt, answer, Message("assistant", words))
        self._next()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows to be written."""
        for i, document in enumerate(self.documents):
            name = self.id if len(self.documents) == 1 else f"{self.id}#{i}"
            yield {
                "id": name,
                "number": self.number,
                "messages": [message.as_dict() for message in document.messages],
                "finished": document.finished,
                "input_ids": document.ids,
                "loss_mask": document.mask,
            }

    def counts(self) -> Counter[str]:
        """What is told at the end: rows, answers, tokens, supervised tokens, answers that hit the length, dropped turns by reason."""
        counts = Counter(
            rows=len(self.documents),
            answers=sum(len(document.finished) for document in self.documents),
            cut=sum(document.finished.count("length") for document in self.documents),
            tokens=sum(len(document.ids) for document in self.documents),
            supervised=sum(sum(document.mask) for document in self.documents),
        )
        counts.update(f"dropped: {each['reason']}" for each in self.dropped)
        return counts

    def _keep(self, prompt: list[int], answer: Answer, said: Message) -> None:
        self._history += [*self._asked, said]
        last = self.documents[-1] if self.documents else None
        if last is None or prompt[: len(last.ids)] != last.ids:
            last = Document()
            self.documents.append(last)
        last.mask += [0] * (len(prompt) - len(last.ids)) + [1] * len(answer.ids)
        last.ids = prompt + answer.ids
        last.messages = list(self._history)
        last.finished.append(answer.finished)

    def _next(self) -> None:
        """Render the next turn that has room for an answer."""
        self.prompt = None
        while self._todo and self.prompt is None:
            self._asked = self._todo.pop(0)
            self.turn += 1
            try:
                prompt = render(self.style.tokenizer, [*self._history, *self._asked], **self.style.variables)
            except UserError as error:
                self._drop(REFUSED, detail=str(error))
                continue
            if len(prompt) < self.style.limit:
                self.prompt = prompt
            else:
                self._drop(NO_ROOM, tokens=len(prompt))

    def _drop(self, reason: str, **more: Any) -> None:
        if self._todo:  # with the turn goes its question only: system messages before it hold for the next one too
            self._todo[0][:0] = [message for message in self._asked if message.role == "system"]
        self.dropped.append({"turn": self.turn, "reason": reason, **more})


def _turns(conversation: Conversation) -> list[list[Message]]:
    """What is asked, turn by turn: each user message, and the system messages before it. Old answers are left out."""
    turns: list[list[Message]] = []
    before: list[Message] = []
    for message in conversation.messages:
        if message.role == "system":
            before.append(message)
        elif message.role == "user":
            turns.append([*before, message])
            before = []
    return turns + [[Message("user", text)] for text in conversation.turns]


class Repeats:
    """`telemetry.repeats.repeat_share` of a text while it grows."""

    def __init__(self, n: int = 4) -> None:
        self.n, self.repeated, self.total = n, 0, 0
        self._last: tuple[int, ...] = ()
        self._seen: set[tuple[int, ...]] = set()

    def add(self, token: int) -> None:
        self._last = (*self._last, token)[-self.n :]
        if len(self._last) == self.n:
            self.total += 1
            self.repeated += self._last in self._seen
            self._seen.add(self._last)

    @property
    def share(self) -> float:
        return self.repeated / self.total if self.total else 0.0

    def at_least(self, longest: int) -> float:
        """What the share cannot fall below any more if the text may have up to `longest` tokens."""
        return self.repeated / max(longest - self.n + 1, 1)
