"""Prompt sets for `bench` and `generate`, and their rendering by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from understudy.core.errors import UserError
from understudy.data.conversations import Message, read


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is to answer: the messages up to and including a user turn.

    `turns` are the user turns that follow. They are asked after the model's own answers, so a runner that measures single
    turns leaves them out, and a multi-turn runner appends its answer and the next turn to `messages`.
    """

    id: str
    messages: tuple[Message, ...]
    turns: tuple[str, ...] = ()


VARIABLE = "enable_thinking"


def text_prompt(text: str, id: str = "prompt") -> Prompt:
    """The prompt that a person typed. Empty text raises UserError."""
    if not text.strip():
        raise UserError("the prompt is empty: give some text to answer")
    return Prompt(id, (Message("user", text),))


def load_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a JSON Lines file (the forms: `understudy.data.conversations`).

    Of a conversation the last user turn is asked, with everything before it as context: a final assistant answer is dropped.
    Of a `turns` row the first turn is asked, and the later ones are `Prompt.turns`.
    A malformed line raises UserError `FILE:LINE: reason`, a file without rows raises UserError.
    """
    prompts = []
    for conversation in islice(read(path), limit):
        messages = conversation.messages
        last = max(i for i, message in enumerate(messages) if message.role == "user")
        prompts.append(Prompt(conversation.id, messages[: last + 1], conversation.turns))
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


def render(tokenizer: Any, messages: Sequence[Message], **variables: Any) -> list[int]:
    """Token ids of `messages`, ready for the answer. `variables` are handed to the chat template, which may read them.

    A chat template writes every special token itself, BOS included, so the tokenizer adds none to what it renders. A
    tokenizer without a chat template gets the plain text of all messages, a line each, and adds its own special tokens.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer("\n".join(message.content for message in messages))["input_ids"]
    else:
        ids = _from_template(tokenizer, messages, variables)
    if not ids:
        raise UserError("the prompt is empty: it renders to no tokens")
    return list(ids)


def _from_template(tokenizer: Any, messages: Sequence[Message], variables: dict[str, Any]) -> list[int]:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            [message.as_dict() for message in messages], add_generation_prompt=True, return_dict=True, **variables
        )["input_ids"]
    except jinja2.TemplateError as error:  # a template may insist on alternating roles, or on no system message
        raise UserError(f"the model's chat template refuses this conversation: {error}") from None


def thinking_variables(tokenizer: Any, thinking: str) -> dict[str, Any]:
    """What the chat template is handed for `thinking` on, off or default. UserError for others, or if it would not read it."""
    if thinking == "default":
        return {}
    if thinking not in ("on", "off"):
        raise UserError(f"thinking is on, off or default (got {thinking!r})")
    import jinja2

    template = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else ""
    tokens = jinja2.Environment().lex(template)
    if all((kind, value) != ("name", VARIABLE) for _, kind, value in tokens):
        raise UserError(
            f"--thinking {thinking}: the model's chat template has no {VARIABLE}, so it cannot be switched; leave --thinking out"
        )
    return {VARIABLE: thinking == "on"}
