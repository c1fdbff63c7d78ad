"""Pairs of texts: one per line, cut by characters, bad lines counted, memory flat."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from understudy.core.errors import UserError
from understudy.data.pairs import iter_sharegpt_jsonl


def row(*turns, form="conversations"):
    who = ("human", "gpt") if form == "conversations" else ("user", "assistant")
    keys = ("from", "value") if form == "conversations" else ("role", "content")
    return json.dumps({form: [{keys[0]: who[i % 2], keys[1]: text} for i, text in enumerate(turns)]})


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_one_pair_per_line(tmp_path):
    path = write(tmp_path / "a.jsonl", row("1", "2", "3", "4"), row("5", "6", form="messages"), "", row("7", "8", "9"))
    pairs = iter_sharegpt_jsonl(path)
    assert list(pairs) == [("1", "2"), ("5", "6"), ("7", "8")]
    assert pairs.skipped.count == 0
    assert list(iter_sharegpt_jsonl(str(path))) == [("1", "2"), ("5", "6"), ("7", "8")]


def test_the_first_answered_turn(tmp_path):
    turns = [{"from": who, "value": who} for who in ("system", "gpt")] + [
        {"from": "human", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]  # fmt: skip
    assert list(iter_sharegpt_jsonl(write(tmp_path / "a.jsonl", json.dumps({"conversations": turns})))) == [("b", "c")]


def test_lengths_are_characters(tmp_path):
    path = write(tmp_path / "a.jsonl", row("é日" * 2000, "日" * 2000))
    assert list(iter_sharegpt_jsonl(path)) == [("é日" * 1024, "日" * 256)]
    assert list(iter_sharegpt_jsonl(path, max_src_len=3, max_tgt_len=2)) == [("é日é", "日日")]
    for name in ("max_src_len", "max_tgt_len"):
        with pytest.raises(UserError, match=f"{name} must be at least 1 character"):
            iter_sharegpt_jsonl(path, **{name: 0})


def test_bad_lines_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", "broken", row("1", "2"), json.dumps({"prompt": "x"}), row("3", "4"), "[]")
    pairs = iter_sharegpt_jsonl(path)
    assert next(pairs) == ("1", "2")
    assert pairs.skipped.count == 1  # so far
    assert list(pairs) == [("3", "4")]
    assert pairs.skipped.count == 3
    assert [line.removeprefix(f"{path}:")[:25] for line in pairs.skipped.first] == [
        "1: not JSON: Expecting va",
        "3: no user turn is answer",
        "5: holds a list, expected",
    ]


def test_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + row("1", "2").encode())
    assert list(iter_sharegpt_jsonl(tmp_path / "a.jsonl")) == [("1", "2")]


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        next(iter_sharegpt_jsonl(tmp_path / "none.jsonl"))


def test_memory_stays_flat(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((row("q" * 1000, "a" * 1000) + "\n") * 10_000)  # 20 MB
    tracemalloc.start()
    try:
        pairs = iter_sharegpt_jsonl(path)
        found = [next(pairs) for _ in range(3)]
        count = sum(1 for _ in pairs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(found), count) == (3, 9997)
    assert peak < 1_000_000
