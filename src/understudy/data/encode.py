"""Rows to token ids and a loss mask, exactly: which tokens the assistant wrote, found by rendering and never by searching text.

A row that holds ids already (`data.tokens`) is taken as it is. For others the model's own chat template renders the conversation up
to each answer with the generation prompt (P), up to and including that answer (F), and whole (W). The answer is what F adds to P, if P
is a prefix of F and F, up to the answer's end, one of W, token by token. Where a template edits history (thinking stripped from
earlier turns, text trimmed, another end token for the last turn) or a token reaches across the boundary, that answer is not
supervised and the reason is counted: the tokens of W would not be the ones that the model writes when it is served.

What of an answer is supervised: its tokens **and the stop token behind it**, because serving asks for that prediction; not what
the template writes after the stop token (usually a line break), because generation has ended there. A template that has
`{% generation %}` must agree: it has to mark every supervised token, and beyond the answers nothing but an answer's own header
and closing, which templates count differently and serving never asks for.

A stop token is the tokenizer's EOS or one that the caller names (`stop_ids`: the EOS list of the model's generation config). If
the template closes answers with none of them, the special tokens that it does close them with count; if there are none
either, the whole of what F adds to P is the answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.core.errors import UserError
from understudy.core.hashes import template_hash
from understudy.data.conversations import Conversation, Message
from understudy.data.conversations import Rejected as Rejected  # whoever encodes wants it
from understudy.data.tokens import TokenReader, TokenRow

NO_ANSWER = "no assistant answer"
REFUSED = "the chat template refuses it"
PROMPT = "the generation prompt is no token prefix of the rendered answer"
HISTORY = "the chat template renders the turn differently once it is history"
EMPTY = "the chat template renders the answer as nothing"
STOP_INSIDE = "an answer contains a stop token"
MARKS = "the chat template's {% generation %} marks disagree"
CUT = "nothing supervised is left after the cut at max_length"
NOT_FOUND = "no answer found in the text"
OPENED_TWICE = "an answer in the text is opened again before it ends"
EVERY_ONE: tuple[str, ...] = ()  # answers left out of a document all of whose answers are supervised


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document: T token ids, and for each whether the assistant wrote it (so that predicting it is supervised)."""

    ids: list[int]  # [T]
    mask: list[bool]  # [T]; at least one is true
    cut: int = 0  # tokens beyond max_length, left out
    left_out: tuple[str, ...] = ()  # answers that are in `ids` but not supervised: the reason of each


def encode(tokenizer: Any, row: Conversation | TokenRow | str, **options: Any) -> Encoded:
    """One row by an `Encoder` made for it. Whoever has many rows keeps the encoder."""
    return Encoder(tokenizer, **options)(row)


class Encoder:
    """Conversations and rows of ids, or with `preformatted` rendered texts, to `Encoded`.

    `max_length` cuts a document at its end (tokens). `last_turn_only` supervises the last answer alone. A tokenizer whose chat
    template cannot be used raises UserError here, a row that cannot be used raises `Rejected` when it is encoded.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int = 2048,
        last_turn_only: bool = False,
        preformatted: bool = False,
        stop_ids: Collection[int] = (),
    ) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template, so nothing says where an answer begins and ends: take an instruct"
                " model, or put the template into the model's folder as chat_template.jinja"
            )
        self.tokenizer, self.max_length = tokenizer, max_length
        self.token_reader = TokenReader(tokenizer)
        self.last_turn_only, self.preformatted = last_turn_only, preformatted
        self.template_hash = template_hash(tokenizer)
        # mapping characters to tokens, which the marks need, only Rust tokenizers can do
        self._marks = tokenizer.is_fast and _has_generation_block(tokenizer.get_chat_template())
        self._head = self._learn_head()
        self._learn_closing(stop_ids)
        self.opening = self._learn_opening() if preformatted else []

    def __call__(self, row: Conversation | TokenRow | str) -> Encoded:
        """Ids and mask of a row: a text with `preformatted`, else a conversation or ids. Raises `Rejected`.

        UserError for ids that another tokenizer made: they spell another text.
        """
        if isinstance(row, TokenRow):
            ids, spans, left_out = row.ids, self.token_reader(row), EVERY_ONE
        elif isinstance(row, str):
            assert self.preformatted
            ids = self._tokenize([row])[0]
            spans, left_out = self._scan(ids), EVERY_ONE
        else:
            ids, spans, left_out = self._rendered(row.messages, self.last_turn_only)
        mask = [False] * len(ids)
        for start, end in spans[-1:] if self.last_turn_only else spans:
            mask[start:end] = [True] * (end - start)
        cut = max(0, len(ids) - self.max_length)
        if not any(mask[: self.max_length]):
            raise Rejected(CUT, f"{len(ids)} tokens")
        return Encoded(ids[: self.max_length], mask[: self.max_length], cut, left_out)

    # -- conversations ------------------------------------------------------------------------------------------------

    def _rendered(
        self, messages: Sequence[Message], last_only: bool = False
    ) -> tuple[list[int], list[tuple[int, int]], tuple[str, ...]]:
        """(ids of the conversation up to its last answer, [start, end) of each answer that checks out, reasons of the others)."""
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise Rejected(NO_ANSWER)
        messages = messages[: answers[-1] + 1]  # an unanswered last question supervises nothing
        answers = answers[-1:] if last_only else answers
        texts = [self._text(messages)]
        for i in answers:
            texts += [self._text(messages[:i], prompt=True, lenient=True), self._text(messages[: i + 1], lenient=True)]
        ids = self._tokenize([text or "" for text in texts])
        spans: list[tuple[int, int]] = []
        left_out: list[str] = []
        for prompt, full in zip(ids[1::2], ids[2::2], strict=True):
            try:
                spans.append(self._answer(prompt, full, ids[0]))
            except Rejected as why:
                left_out.append(why.reason)
        if not spans:
            raise Rejected(left_out[-1])
        if self._marks:
            self._compare(messages, ids[0], spans, whole=not left_out and not last_only)
        return ids[0], spans, tuple(left_out)

    def _answer(self, prompt: list[int], full: list[int], whole: list[int]) -> tuple[int, int]:
        """[start, end) in `whole` of the answer that `full` adds to `prompt`. Raises `Rejected` unless every token checks out."""
        if not prompt or not full:
            raise Rejected(REFUSED)
        start = len(prompt)
        if full[:start] != prompt:
            raise Rejected(PROMPT)
        stops = [i for i in range(start, len(full)) if full[i] in self.stops]
        if len(stops) != self._closers:
            raise Rejected(STOP_INSIDE)
        end = stops[0] + 1 if stops else len(full)
        if whole[:end] != full[:end]:
            raise Rejected(HISTORY)
        if end - start < (2 if stops else 1):
            raise Rejected(EMPTY)
        return start, end

    def _compare(self, messages: Sequence[Message], ids: list[int], spans: list[tuple[int, int]], whole: bool) -> None:
        """Raise `Rejected` unless the template's own marks agree with `spans`; `whole`: with no mark elsewhere."""
        rendered = self.tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        marks = rendered["assistant_masks"]
        assert rendered["input_ids"] == ids
        unmarked = [i for start, end in spans for i in range(start, end) if not marks[i]]
        if unmarked:
            i = unmarked[0]
            raise Rejected(MARKS, f"token {i}, {self.tokenizer.decode([ids[i]])!r}, is the assistant's but not marked")
        if not whole or sum(marks) == sum(end - start for start, end in spans):
            return
        for i in self._around(messages, ids, spans):
            marks[i] = 0
        if any(marks):
            i = marks.index(1)
            raise Rejected(MARKS, f"token {i}, {self.tokenizer.decode([ids[i]])!r}, is marked but not the assistant's")

    def _around(self, messages: Sequence[Message], ids: list[int], spans: list[tuple[int, int]]) -> Iterator[int]:
        """The places of every answer with the header before it and the closing behind it."""
        answers = (i for i, message in enumerate(messages) if message.role == "assistant")
        for i, (start, end) in zip(answers, spans, strict=True):
            texts = [self._text(part, lenient=True) or "" for part in (messages[:i], messages[: i + 1])]
            before, full = self._tokenize(texts)
            yield from range(len(before) if before == ids[: len(before)] else start, max(end, len(full)))

    # -- texts --------------------------------------------------------------------------------------------------------

    def _scan(self, ids: list[int]) -> list[tuple[int, int]]:
        """[start, end) of the answers in the ids of a rendered text: from an opening to the first stop token, or the text's end."""
        width, spans, i = len(self.opening), [], 0
        while i + width < len(ids):
            if ids[i : i + width] != self.opening:
                i += 1
                continue
            start = i + width
            end = next((j + 1 for j in range(start, len(ids)) if ids[j] in self.stops), len(ids))
            if any(ids[j : j + width] == self.opening for j in range(start, end)):
                raise Rejected(OPENED_TWICE)
            if end - start > 1 or ids[start] not in self.stops:
                spans.append((start, end))
            i = end
        if not spans:
            raise Rejected(NOT_FOUND)
        return spans

    # -- what the template says of itself -----------------------------------------------------------------------------

    def _learn_head(self) -> list[Message]:
        """The messages that a conversation has to start with for the template to take it: none, or a system message."""
        refusal = ""
        for head in ([], [Message("system", "a")]):
            try:
                self._text([*head, Message("user", "a"), Message("assistant", "b")])
                return head
            except Rejected as why:
                refusal = refusal or why.detail
        raise UserError(f"the model's chat template refuses a question with its answer: {refusal}")

    def _learn_closing(self, stop_ids: Collection[int]) -> None:
        """Set `stops`, and how many of them the template itself writes behind an answer: what two answers' renderings share at the end."""
        asked = [*self._head, Message("user", "a")]
        first, second = self._tokenize([self._text([*asked, Message("assistant", x)]) or "" for x in "bc"])
        if first == second:
            raise UserError("the model's chat template leaves answers out: there is nothing to train on")
        closing = _common_end(first, second)
        eos = self.tokenizer.eos_token_id
        self.stops = frozenset(stop_ids) | ({eos} if eos is not None else set())
        if self.stops.isdisjoint(closing):
            self.stops = frozenset(self.tokenizer.all_special_ids).intersection(closing)
        self._closers = sum(token in self.stops for token in closing)

    def _learn_opening(self) -> list[int]:
        """The tokens in front of every answer: the generation prompt, or, where that is empty, what follows a question.

        They are tried on a rendered conversation, whose answers have to be found where rendering its prefixes finds them.
        """
        texts = [self._text([*self._head, Message("user", "a")], prompt) or "" for prompt in (False, True)]
        bare, asked, other = self._tokenize(
            [*texts, self._text([*self._head, Message("user", "b")], prompt=True) or ""]
        )
        added = asked[len(bare) :] if asked[: len(bare)] == bare else []
        opening = added or _common_end(asked, other)
        self.opening = opening  # for `_scan`
        if not opening or not self.stops or not self._opening_holds(must_be_tried=not added):
            raise UserError(
                "with this model's chat template, answers cannot be told from the rest of a preformatted text: give rows"
                " with `conversations` or `messages`, without --is-preformatted"
            )
        return opening

    def _opening_holds(self, must_be_tried: bool) -> bool:
        turns = [Message(role, text) for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
        try:
            ids, spans, left_out = self._rendered([*self._head, *turns])
        except Rejected:  # answers in rendered history look different from written ones (an opened thinking block)
            return not must_be_tried
        return set(spans) <= set(self._scan(ids)) and (bool(left_out) or len(self._scan(ids)) == len(spans))

    # -- rendering ----------------------------------------------------------------------------------------------------

    def _text(self, messages: Sequence[Message], prompt: bool = False, lenient: bool = False) -> str | None:
        """The conversation as the template writes it. Refused: `Rejected`, or None if `lenient`."""
        import jinja2

        if lenient and not messages:
            return None
        try:
            text: str = self.tokenizer.apply_chat_template(
                [message.as_dict() for message in messages], add_generation_prompt=prompt, tokenize=False
            )
        except jinja2.TemplateError as error:
            if lenient:
                return None
            raise Rejected(REFUSED, " ".join(str(error).split())) from None
        return text

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # a template writes every special token itself, BOS included
        distinct = list(dict.fromkeys(texts))  # a conversation, and the same up to its last answer, are one text
        ids = self.tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"]
        found = dict(zip(distinct, ids, strict=True))
        return [found[text] for text in texts]


def _common_end(a: list[int], b: list[int]) -> list[int]:
    """The longest list that both end with."""
    n = next((n for n, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y), min(len(a), len(b)))
    return a[len(a) - n :]


def _has_generation_block(template: str) -> bool:
    """Whether a template marks what the assistant writes with `{% generation %}`, by Jinja's own lexer."""
    import jinja2

    tokens = [(kind, value) for _, kind, value in jinja2.Environment().lex(template) if kind != "whitespace"]
    pairs = zip(tokens, tokens[1:], strict=False)
    return any(block[0] == "block_begin" and name == ("name", "generation") for block, name in pairs)
