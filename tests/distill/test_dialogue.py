"""What a conversation becomes when its turns are answered anew: documents, masks, what is dropped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.chat import ASSISTANT, END, LINE, SYSTEM, USER, Chat, style, talk
from understudy.data.conversations import Conversation, Message
from understudy.distill.dialogue import EMPTY, LOOP, NO_ROOM, REFUSED, Answer, Dialogue, Repeats
from understudy.telemetry.repeats import repeat_share


def said(dialogue: Dialogue, *answers: Answer) -> list[dict]:
    for answer in answers:
        dialogue.answer(answer)
    return list(dialogue.rows())


def test_turns_are_answered_in_order_and_stay_one_document():
    dialogue = Dialogue(talk("10", "11", system="9"), 7, style())
    assert dialogue.prompt == [SYSTEM, 9, END, LINE, USER, 10, END, LINE, ASSISTANT]
    (row,) = said(dialogue, Answer([20, 21, END], "stop"), Answer([22, END], "stop"))
    assert dialogue.prompt is None
    assert row["input_ids"] == [
        *(SYSTEM, 9, END, LINE, USER, 10, END, LINE, ASSISTANT, 20, 21, END),
        *(LINE, USER, 11, END, LINE, ASSISTANT, 22, END),
    ]
    assert row["loss_mask"] == [0] * 9 + [1, 1, 1] + [0] * 6 + [1, 1]
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("system", "9"), ("user", "10"), ("assistant", "20 21"), ("user", "11"), ("assistant", "22"),
    ]  # fmt: skip
    assert row["id"] == "a" and row["number"] == 7 and row["finished"] == ["stop", "stop"]
    counts = dialogue.counts()
    assert counts == {"rows": 1, "answers": 2, "cut": 0, "tokens": 20, "supervised": 5}


def test_user_turns_that_still_wait_are_asked_too():
    dialogue = Dialogue(Conversation("a", (Message("user", "10"),), ("11",)), 0, style())
    (row,) = said(dialogue, Answer([20, END], "stop"), Answer([21, END], "stop"))
    assert [m["content"] for m in row["messages"]] == ["10", "20", "11", "21"]


@pytest.mark.parametrize("tokenizer", [Chat(thinks=True), Chat(respelled=True)])
def test_history_that_the_template_edits_begins_a_new_row(tokenizer):
    """Thinking that is stripped from history, and an answer whose text is tokenised otherwise than it was written."""
    rows = said(
        Dialogue(talk("10", "11"), 0, style(tokenizer)), Answer([50, 20, END], "stop"), Answer([22, END], "stop")
    )
    first, second = rows
    assert (
        first["input_ids"] == [USER, 10, END, LINE, ASSISTANT, 50, 20, END] and first["loss_mask"] == [0] * 5 + [1] * 3
    )
    history = [20] if tokenizer.thinks else [51, 20]
    prompt = [USER, 10, END, LINE, ASSISTANT, *history, END, LINE, USER, 11, END, LINE, ASSISTANT]
    assert second["input_ids"] == [*prompt, 22, END]
    assert second["loss_mask"] == [0] * len(prompt) + [1, 1], "history is not supervised twice"
    assert [first["id"], second["id"]] == ["a#0", "a#1"]
    assert len(second["messages"]) == 4 and second["finished"] == ["stop"]


def test_an_answer_that_is_cut_has_no_end_token_that_is_supervised():
    dialogue = Dialogue(talk("10", "11"), 0, style())
    dialogue.answer(Answer([20, 21], "length"))
    (row,) = said(dialogue, Answer([22, END], "stop"))
    assert row["input_ids"][5:9] == [20, 21, END, LINE] and row["loss_mask"][5:9] == [1, 1, 0, 0]
    assert row["finished"] == ["length", "stop"] and dialogue.counts()["cut"] == 1


def test_a_dropped_turn_leaves_history_with_its_question():
    dialogue = Dialogue(talk("10", "11", "12"), 0, style(most=0.5))
    dialogue.answer(Answer([20, END], "stop"))
    dialogue.answer(Answer([21] * 30, "length", 0.9))
    assert dialogue.prompt == [USER, 10, END, LINE, ASSISTANT, 20, END, LINE, USER, 12, END, LINE, ASSISTANT]
    (row,) = said(dialogue, Answer([END], "stop"))
    assert row["finished"] == ["stop"]
    assert [(each["turn"], each["reason"]) for each in dialogue.dropped] == [(1, LOOP), (2, EMPTY)]
    assert dialogue.dropped[0]["repeat_share"] == 0.9
    assert dialogue.counts()[f"dropped: {LOOP}"] == 1 == dialogue.counts()[f"dropped: {EMPTY}"]


def test_a_system_message_outlives_the_turn_that_is_dropped():
    dialogue = Dialogue(talk("10", "11", "12", system="9"), 0, style(most=0.5))
    first = dialogue.prompt
    for _ in range(2):
        dialogue.answer(Answer([21] * 30, "length", 0.9))
    assert dialogue.prompt == [12 if token == 10 else token for token in first] and 9 in first
    dialogue.answer(Answer([20, END], "stop"))
    (row,) = dialogue.rows()
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


def test_an_answer_at_the_limit_of_repeats_is_kept():
    dialogue = Dialogue(talk("10"), 0, style(most=0.5))
    assert said(dialogue, Answer([20, END], "stop", 0.5))


def test_turns_without_room_and_turns_that_the_template_refuses_are_dropped():
    import jinja2

    class Strict(Chat):
        def apply_chat_template(self, messages, **options):
            if messages[-1]["content"] == "11":
                raise jinja2.TemplateError("no elevens")
            return super().apply_chat_template(messages, **options)

    long = " ".join(["10"] * 30)
    dialogue = Dialogue(talk(long, "11", "12"), 0, style(Strict(), limit=20))
    assert dialogue.prompt == [USER, 12, END, LINE, ASSISTANT]
    assert [each["reason"] for each in dialogue.dropped] == [NO_ROOM, REFUSED]
    assert dialogue.dropped[0]["tokens"] == 34 and "no elevens" in dialogue.dropped[1]["detail"]
    exact = Dialogue(talk("10 10"), 0, style(limit=6))
    assert exact.prompt is None and exact.dropped[0]["tokens"] == 6, "six tokens leave no room in six"


def test_variables_reach_the_chat_template():
    assert Dialogue(talk("10"), 0, style(enable_thinking=True)).prompt[-1] == 90


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=20))
def test_repeats_are_counted_while_a_text_grows(text, more):
    repeats = Repeats()
    for token in text:
        repeats.add(token)
    assert repeats.share == repeat_share(text)
    longest = len(text) + 20
    assert repeats.at_least(longest) <= repeat_share(text + more) + 1e-12, "whatever follows"
