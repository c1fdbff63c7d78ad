"""A tokenizer whose words are numbers, for tiny targets: `17 23` are the tokens 17 and 23, and a chat template puts roles around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from understudy.data.conversations import Conversation, Message
from understudy.distill.dialogue import Style

SYSTEM, USER, ASSISTANT, END, LINE = 0, 1, 2, 3, 4
STOPS = frozenset({END, *range(20, 30)})
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


class Chat:
    """`thinks`: of an answer that became history only the last token is kept. `respelled`: token 50 is 51 when it is read again."""

    chat_template = "numbers, enable_thinking"

    def __init__(self, thinks: bool = False, respelled: bool = False) -> None:
        self.thinks, self.respelled = thinks, respelled

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **options: Any) -> dict[str, list[int]]:
        assert options.pop("add_generation_prompt") and options.pop("return_dict")
        ids: list[int] = []
        for message in messages:
            said = [int(word) for word in message["content"].split()]
            if message["role"] == "assistant":
                said = said[-1:] if self.thinks else said
                said = [51 if token == 50 and self.respelled else token for token in said]
            ids += [ROLES[message["role"]], *said, END, LINE]
        return {"input_ids": [*ids, ASSISTANT, *([90] if options.get("enable_thinking") else [])]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return " ".join(str(token) for token in ids if token > LINE)


def style(
    tokenizer: Any = None,
    limit: int = 200,
    most: float = 1.0,
    stops: frozenset[int] = frozenset({END}),
    **variables: Any,
) -> Style:
    return Style(tokenizer or Chat(), stops, limit, most, variables)


def talk(*texts: str, system: str | None = None, name: str = "a") -> Conversation:
    """User turns, each with an old answer behind it."""
    messages = [Message("system", system)] if system is not None else []
    for text in texts:
        messages += [Message("user", text), Message("assistant", "99")]
    return Conversation(name, tuple(messages))
