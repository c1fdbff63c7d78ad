"""The reader of conversations: every form, both policies, line numbers, and flat memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.core.errors import UserError
from understudy.data.conversations import Conversation, Message, Skipped, read


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SAME = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello"))
FORMS = {
    "sharegpt": {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"},
                                   {"from": "gpt", "value": "Hello"}]},
    "sharegpt with roles as names": {"conversations": [{"from": "system", "value": "Be brief."},
                                     {"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
    "role and content in conversations": {"conversations": [{"role": "system", "content": "Be brief."},
                                          {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "openai": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                            {"role": "assistant", "content": "Hello"}]},
    "openai text parts": {"messages": [{"role": "system", "content": "Be brief."},
                          {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                          {"role": "assistant", "content": "Hello"}]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form):
    (conversation,) = read(write(tmp_path / "rows.jsonl", {"id": "a", **FORMS[form]}))
    assert conversation == Conversation("a", SAME)


def test_turns_and_prompt(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"turns": ["One?", "Two?", "Three?"], "question_id": 81}, {"prompt": "One?"})
    assert list(read(path)) == [
        Conversation("81", (Message("user", "One?"),), ("Two?", "Three?")),
        Conversation("rows:2", (Message("user", "One?"),)),
    ]


HUMAN = {"from": "human", "value": "Hi"}
MALFORMED = {  # reason -> line
    "not JSON": b'{"prompt": "a"',
    "not UTF-8 (byte 12)": b'{"prompt": "\xff"}',
    "not readable as JSON": b'{"prompt": ' + b"[" * 100_000,
    "holds a list, expected one JSON object": b'[{"prompt": "a"}]',
    "none of the keys": b'{"text": "a"}',
    "prompt is empty": b'{"prompt": "  "}',
    "prompt is a number, expected text": b'{"prompt": 1}',
    "half of a surrogate pair": b'{"prompt": "\\ud800"}',
    "turns is text, expected a list": b'{"turns": "a"}',
    "turns is empty": b'{"turns": []}',
    "turn 2 is null": b'{"turns": ["a", null]}',
    "conversations has no user message": b'{"conversations": [{"from": "gpt", "value": "a"}]}',
    "message 1 is text, expected an object": b'{"messages": ["a"]}',
    "message 1 has no 'content'": b'{"messages": [{"role": "user"}]}',
    "message 1 has no 'role'": b'{"messages": [{"content": "a"}]}',
    "message 1 has no 'value'": b'{"conversations": [{"from": "human"}]}',
    "message 1 is from 'alien', expected one of": b'{"messages": [{"role": "alien", "content": "a"}]}',
    "message 2 (assistant) is empty": json.dumps({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}).encode(),
    "content part of type 'image_url'": b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    "message 1 (user) is null": b'{"messages": [{"role": "user", "content": null}]}',
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_line(tmp_path, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n\n' + MALFORMED[reason] + b'\n{"prompt": "also good"}\n')
    with pytest.raises(UserError) as error:
        list(read(path))
    assert str(error.value).startswith(f"{path}:3: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)

    skipped = Skipped()
    assert [c.id for c in read(path, skipped)] == ["rows:1", "rows:4"]
    assert skipped.count == 1
    assert skipped.first == [str(error.value)]


def test_byte_order_mark_and_no_newline_at_the_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}')
    assert [c.messages[0].content for c in read(path)] == ["a", "b"]


def test_an_empty_system_message_is_kept(tmp_path):
    row = {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]}
    (conversation,) = read(write(tmp_path / "rows.jsonl", row))
    assert conversation.messages[0] == Message("system", "")


@pytest.mark.parametrize("skipped", [None, Skipped()])
def test_a_file_that_cannot_be_opened(tmp_path, skipped):
    with pytest.raises(UserError, match="No such file"):
        list(read(tmp_path / "none.jsonl", skipped))
    with pytest.raises(UserError, match="directory"):
        list(read(tmp_path, skipped))


def test_skipped_keeps_the_first_only(tmp_path):
    path = write(tmp_path / "rows.jsonl", *range(10))
    skipped = Skipped(keep=3)
    assert list(read(path, skipped)) == []
    assert skipped.count == 10
    assert [line.split(":")[-2] for line in skipped.first] == ["1", "2", "3"]


def test_memory_stays_flat(tmp_path):
    row = json.dumps({"conversations": [HUMAN, {"from": "gpt", "value": "x" * 2000}]}) + "\n"
    path = tmp_path / "rows.jsonl"
    path.write_text((row * 99 + "broken\n") * 100)  # 20 MB
    skipped = Skipped()
    tracemalloc.start()
    try:
        count = sum(1 for _ in read(path, skipped))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (count, skipped.count) == (9900, 100)
    assert peak < 1_000_000


texts = st.text(min_size=1).filter(str.strip)
messages = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1).filter(
    lambda items: any(role == "user" for role, _ in items)
)


@settings(deadline=None)
@given(messages, st.booleans())
def test_what_is_written_is_read(tmp_path_factory, items, ascii_only):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"id": "a", "messages": [{"role": role, "content": text} for role, text in items]}
    path.write_text(json.dumps(row, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    assert list(read(path)) == [Conversation("a", tuple(Message(*item) for item in items))]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["user", "human", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["conversations", "messages", "turns", "prompt", "from", "value", "role", "content", "type", "id"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)
lines = st.binary().map(lambda raw: raw.replace(b"\n", b" ")) | values.map(lambda value: json.dumps(value).encode())


@settings(deadline=None)
@given(st.lists(lines, max_size=8))
def test_any_line_is_read_or_skipped(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(b"\n".join(rows))
    skipped = Skipped()
    count = sum(1 for _ in read(path, skipped))
    assert count + skipped.count <= len(rows)
    if skipped.count:
        with pytest.raises(UserError) as error:
            list(read(path))
        assert str(error.value) == skipped.first[0]
    else:
        assert len(list(read(path))) == count
