"""The report at the start: counts, the masked sample, coverage, and the run that would supervise nothing."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from understudy.assets import pocket_path
from understudy.core.errors import UserError
from understudy.data import encode as E
from understudy.data import stream as S
from understudy.data.encode import Encoder
from understudy.data.report import ADVICE, coverage, inspect
from understudy.data.stream import Corpus


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pocket_path())


def row(*turns):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]}


def report(tmp_path, tokenizer, *rows, limit=None, sizes=(), **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    corpus = Corpus([path], preformatted=options.get("preformatted", False))
    return inspect(corpus, Encoder(tokenizer, **options), limit, sizes)


def test_counts(tmp_path, tokenizer):
    found = report(
        tmp_path,
        tokenizer,
        row("Hi", "a"),  # 12 tokens, 2 supervised
        "broken",
        row("Hi", "a b", "Hi", "    x"),  # 24 tokens; 3 supervised, the second answer is left out
        "",
        {"prompt": "1"},
        {"prompt": "2"},
        row("Hi", "a" + " b" * 50),  # cut to 25 tokens, of which the answer has 16
        sizes=(1, 2, 3, 4096),
        max_length=25,
    )
    path = str(tmp_path / "a.jsonl")
    broken = f"{path}:2 (not JSON: Expecting value (column 1))"
    assert found.as_dict() == {
        "files": [path],
        "lines": 7,
        "sampled": False,
        "rows": 6,
        "documents": 3,
        "rejected": {S.MALFORMED: 1, E.NO_ANSWER: 2},
        "rejected_first": {S.MALFORMED: [broken], E.NO_ANSWER: [f"{path}:5", f"{path}:6"]},
        "answers_left_out": {E.PROMPT: 1},
        "written_by": {},
        "thinking": {},
        "other_template": 0,
        "tokens": 61,
        "supervised": 21,
        "supervised_fraction": 21 / 61,
        "length_median": 24.0,
        "length_max": 25,
        "truncated": 1,
        # " b" 16 times, "a" 3 times, the stop token twice
        "coverage": {"1": 16 / 21, "2": 19 / 21, "3": 1.0, "4096": 1.0},
    }
    json.dumps(found.as_dict())
    found.check()
    assert found.packed_rows(50) == 2  # 7 lines, 10.2 tokens per row


def test_the_sample(tmp_path, tokenizer):
    found = report(tmp_path, tokenizer, {"prompt": "1"}, row("Hi", "return [bold]a", "x", "b"))
    assert found.sample_plain() == (
        "<|endoftext|><|user|>\nHi<|end|>\n<|assistant|>\n⟦return [bold]a<|end|>⟧\n<|user|>\nx<|end|>\n<|assistant|>\n⟦b<|end|>⟧\n"
    )
    text = found.sample_text()
    assert text.plain == found.sample_plain().replace("⟦", "").replace("⟧", "")
    assert [text.plain[s.start : s.end] for s in text.spans if s.style == "green"] == [
        "return [bold]a<|end|>",
        "b<|end|>",
    ]
    assert {str(span.style) for span in text.spans} == {"green", "dim"}


def test_a_long_sample_is_a_window_with_the_first_answer(tmp_path, tokenizer):
    found = report(tmp_path, tokenizer, row("q " * 300, "a " * 400))
    plain = found.sample_plain()
    assert plain.startswith("... ")
    assert plain.endswith("⟧ ...")
    assert "<|assistant|>\n⟦a a a" in plain
    assert len(plain) < 1200


def test_on_a_terminal_and_without_colour(tmp_path, tokenizer):
    found = report(tmp_path, tokenizer, "broken", row("Hi", "a"), sizes=(2,))
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, width=200, color_system="standard").print(found)
    shown = stream.getvalue()
    assert "\x1b[32ma<|end|>" in shown
    for what in (
        "2 rows",
        "1 documents",
        "malformed line",
        ":1 (not JSON",
        "supervised 2 (16.7%)",
        "max 12 tokens",
        "100.00%",
    ):
        assert what in shown
        assert what in found.plain()
    assert found.plain().endswith("⟦a<|end|>⟧\n")


def test_a_sample_of_the_rows_says_so(tmp_path, tokenizer):
    rows = [row("Hi", "a")] * 50 + [row("Hi", "a b")] * 50
    found = report(tmp_path, tokenizer, *rows, limit=10)
    assert (found.lines, found.rows, found.documents, found.sampled) == (100, 10, 10, True)
    assert found.supervised == 25  # evenly spread: five of each
    assert "a sample of 10 rows of 100 lines" in found.plain()
    assert found.packed_rows(12) == 105  # of all lines
    for limit in (None, 100, 500):
        whole = report(tmp_path, tokenizer, *rows, limit=limit)
        assert (whole.rows, whole.sampled) == (100, False)
        assert "sample of" not in whole.plain()


def test_places_are_named_a_few_times_only(tmp_path, tokenizer):
    found = report(tmp_path, tokenizer, *["broken"] * 30, row("Hi", "a"))
    assert found.rejected[S.MALFORMED] == 30
    assert len(found.where[S.MALFORMED]) == 5


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        ([{"prompt": "1"}, {"prompt": "2"}, "broken"], {}, E.NO_ANSWER),
        ([{"text": "Hi"}], {}, S.ONLY_TEXT),
        ([row("Hi", "a")], {"preformatted": True}, S.NO_TEXT),
        ([{"text": "### Response: a"}], {"preformatted": True}, E.NOT_FOUND),
        ([row("Hi " * 30, "a")], {"max_length": 8}, E.CUT),
        ([row("Hi", "    a")], {}, E.PROMPT),
        ([row("Hi", "a<|end|>b")], {}, E.STOP_INSIDE),
    ],
)
def test_a_run_that_would_supervise_nothing(tmp_path, tokenizer, rows, options, reason):
    found = report(tmp_path, tokenizer, *rows, **options)
    assert found.supervised_fraction == 0
    assert found.sample == []
    with pytest.raises(UserError) as error:
        found.check()
    message = str(error.value)
    assert message.startswith(
        f"nothing to train on: none of {len(rows)} rows of {tmp_path / 'a.jsonl'} supervises a token. {reason}"
    )
    assert f"first {tmp_path / 'a.jsonl'}:1" in message
    assert message.endswith(ADVICE[reason])
    assert "\n" not in message


def test_no_rows_at_all(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"nothing to train on: .*a\.jsonl has no rows"):
        report(tmp_path, tokenizer).check()


def test_coverage_literally():
    counts = np.array([5, 0, 3, 2])
    assert [coverage(counts, size) for size in range(6)] == [0.0, 0.5, 0.8, 1.0, 1.0, 1.0]
    assert coverage(np.zeros(4, np.int64), 2) == 0.0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 14))
def test_coverage_is_the_best_choice(counts, size):
    """Oracle: take the largest, one after another."""
    left, taken = list(counts), 0
    for _ in range(min(size, len(left))):
        taken += left.pop(left.index(max(left)))
    assert coverage(np.array(counts), size) == (taken / sum(counts) if sum(counts) else 0.0)
