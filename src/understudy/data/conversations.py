"""Conversations, read from JSON Lines one line at a time: memory stays flat however long the file is.

A row is one of
    {"conversations": [{"from": "human" | "gpt" | ..., "value": TEXT}, ...]}       ShareGPT
    {"messages": [{"role": "user" | "assistant" | ..., "content": TEXT}, ...]}     OpenAI; content may be a list of text parts
    {"turns": [TEXT, ...]}                                                         user turns, answered by nobody yet
    {"prompt": TEXT}                                                               one user turn
and both spellings of a message are understood in both lists, because published data mixes them. Other keys of a row are
ignored, but for `id`, `question_id` and `conversation_id`, the first of which names the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.core.errors import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ID_KEYS = ("id", "question_id", "conversation_id")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user or assistant."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row, whatever form it had. `turns` are user turns still to come: each waits for the model's answer to the one before."""

    id: str
    messages: tuple[Message, ...]
    turns: tuple[str, ...] = ()


@dataclass(slots=True)
class Skipped:
    """What a lenient reader left out: how many lines, and the first few of them as `FILE:LINE: reason`."""

    keep: int = 20
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < self.keep:
            self.first.append(f"{where}: {reason}")


class Malformed(Exception):
    """Why a line is no conversation. Whoever reads the file adds where."""


class Rejected(Exception):
    """A row that cannot be trained on. `reason` is one of few, to be counted; `detail` is of this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def read(path: str | Path, skipped: Skipped | None = None) -> Iterator[Conversation]:
    """Yield the conversations of a JSON Lines file, streamed.

    Without `skipped` the first malformed line raises UserError `FILE:LINE: reason`; with it, malformed lines are counted there
    and left out. Blank lines are neither. A file that cannot be opened raises UserError in both cases.
    """
    path = Path(path)
    try:
        lines = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    with lines:
        for number, raw in enumerate(lines, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # byte-order mark
            if not raw.strip():
                continue
            try:
                conversation = parse_conversation(parse_row(raw), f"{path.stem}:{number}")
            except Malformed as reason:
                if skipped is None:
                    raise UserError(f"{path}:{number}: {reason}") from None
                skipped.add(f"{path}:{number}", str(reason))
                continue
            yield conversation


def parse_row(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of nested lists
        raise Malformed(f"not readable as JSON: {error}") from None
    if not isinstance(row, dict):
        raise Malformed(f"holds {_kind(row)}, expected one JSON object per line")
    return row


def parse_conversation(row: dict[str, Any], fallback_id: str) -> Conversation:
    name = next((str(row[key]) for key in ID_KEYS if isinstance(row.get(key), (str, int))), fallback_id)
    for key in ("conversations", "messages"):
        if key in row:
            return Conversation(name, _messages(row[key], key))
    if "turns" in row:
        first, *rest = (
            checked_text(turn, f"turn {i}") for i, turn in enumerate(_items(row["turns"], "turns"), start=1)
        )
        return Conversation(name, (Message("user", first),), tuple(rest))
    if "prompt" in row:
        return Conversation(name, (Message("user", checked_text(row["prompt"], "prompt")),))
    raise Malformed("has none of the keys conversations, messages, turns, prompt")


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    messages = tuple(_message(item, f"message {i}") for i, item in enumerate(_items(value, key), start=1))
    if all(message.role != "user" for message in messages):
        raise Malformed(f"{key} has no user message")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise Malformed(f"{where} is {_kind(item)}, expected an object")
    speaker, content = ("from", "value") if "from" in item else ("role", "content")
    for key in (speaker, content):
        if key not in item:
            raise Malformed(f"{where} has no {key!r}")
    if not isinstance(item[speaker], str) or (role := ROLES.get(item[speaker])) is None:
        raise Malformed(f"{where} is from {item[speaker]!r:.60}, expected one of {', '.join(ROLES)}")
    value = item[content]
    if isinstance(value, list):
        value = "".join(_part(part, where) for part in value)
    # an empty system message is common in published data, and is not the same as none where a template has a default
    return Message(role, checked_text(value, f"{where} ({role})", empty=role == "system"))


def _part(part: Any, where: str) -> str:
    """The text of one part of an OpenAI content list."""
    if not isinstance(part, dict) or part.get("type") != "text":
        found = part.get("type") if isinstance(part, dict) else part
        raise Malformed(f"{where} has a content part of type {found!r:.60}, only text is supported")
    return checked_text(part.get("text"), f"a text part of {where}", empty=True)


def _items(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise Malformed(f"{key} is {_kind(value)}, expected a list")
    if not value:
        raise Malformed(f"{key} is empty")
    return value


def checked_text(value: Any, what: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise Malformed(f"{what} is {_kind(value)}, expected text")
    if not empty and not value.strip():
        raise Malformed(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, no tokenizer can read one
        raise Malformed(f"{what} holds half of a surrogate pair") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
