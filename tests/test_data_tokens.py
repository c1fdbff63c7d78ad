"""Rows that hold token ids: read as they are, checked, and beside ordinary rows in one stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_data_encode import load
from understudy.core.errors import UserError
from understudy.core.hashes import tokenizer_hash
from understudy.data.conversations import Conversation, Malformed, Rejected
from understudy.data.encode import CUT, Encoder
from understudy.data.options import DataOptions, corpus_paths
from understudy.data.report import inspect
from understudy.data.stream import Corpus, open_stream
from understudy.data.tokens import BEYOND, UNSUPERVISED, TokenReader, TokenRow, parse_tokens

IDS, MASK = [0, 1, 206, 300, 3, 206, 2, 206, 310, 311, 3], [0] * 8 + [1, 1, 1]


@pytest.fixture(scope="module")
def pocket() -> Any:
    return load()


def row(ids=IDS, mask=MASK, **made: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return {"id": "x", "messages": messages, "input_ids": list(ids), "loss_mask": list(mask), "made": made}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_ids_are_taken_as_they_are(pocket):
    document = Encoder(pocket)(TokenRow(IDS, [bool(x) for x in MASK]))
    assert document.ids == IDS and document.mask == [bool(x) for x in MASK] and not document.cut
    cut = Encoder(pocket, max_length=9)(TokenRow(IDS, [bool(x) for x in MASK]))
    assert cut.ids == IDS[:9] and cut.mask == [False] * 8 + [True] and cut.cut == 2
    with pytest.raises(Rejected, match=CUT):
        Encoder(pocket, max_length=8)(TokenRow(IDS, [bool(x) for x in MASK]))


def test_the_last_turn_only(pocket):
    two = TokenRow([*IDS, *IDS], [bool(x) for x in [*MASK, *MASK]])
    assert Encoder(pocket, last_turn_only=True)(two).mask == [False] * 19 + [True] * 3


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_supervised_runs_are_those_of_the_mask(mask):
    reader = TokenReader(load_once())
    wanted = [i for i, on in enumerate(mask) if on and i]  # nothing predicts the first token
    if not wanted:
        with pytest.raises(Rejected, match=UNSUPERVISED):
            reader(TokenRow([5] * len(mask), mask))
        return
    runs = reader(TokenRow([5] * len(mask), mask))
    assert [i for start, end in runs for i in range(start, end)] == wanted
    assert all(end < start for (_, end), (start, _) in zip(runs, runs[1:], strict=False)), "runs do not touch"


_loaded: list[Any] = []


def load_once() -> Any:
    if not _loaded:
        _loaded.append(load())
    return _loaded[0]


def test_ids_of_another_vocabulary_are_refused(pocket):
    assert TokenReader(pocket).hash == tokenizer_hash(pocket)
    own = TokenRow(IDS, [bool(x) for x in MASK], {"tokenizer": tokenizer_hash(pocket)})
    assert Encoder(pocket)(own).ids == IDS
    with pytest.raises(UserError, match="made with another tokenizer than this model's"):
        Encoder(pocket)(TokenRow(IDS, own.mask, {"tokenizer": "0" * 16}))
    with pytest.raises(Rejected, match=f"{BEYOND}: 4096 of 4096"):
        Encoder(pocket)(TokenRow([4096], [True]))


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"input_ids": []}, "input_ids is no list of numbers"),
        ({"loss_mask": "1"}, "loss_mask is no list"),
        ({"loss_mask": [1]}, "input_ids has 11 numbers, loss_mask 1"),
        ({"input_ids": [1.5] * 11}, "1.5, which is no token id"),
        ({"input_ids": [True] * 11}, "True, which is no token id"),
        ({"input_ids": [-1] * 11}, "-1, which is no token id"),
        ({"loss_mask": [2] * 11}, "holds 2, expected 0 or 1"),
        ({"made": 3}, "made is no object"),
    ],
)
def test_rows_that_are_broken(broken, says):
    with pytest.raises(Malformed, match=says):
        parse_tokens(row() | broken)


def test_rows_with_ids_stand_beside_others(tmp_path, pocket):
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "mixed.jsonl", row(), plain, plain | {"input_ids": [9]}, row() | {"loss_mask": [7]})
    corpus = Corpus([path], ids=True)
    assert isinstance(corpus.row(0), TokenRow) and isinstance(corpus.row(1), Conversation)
    assert isinstance(corpus.row(2), Conversation), "ids without a mask do not say what is supervised"
    assert isinstance(Corpus([path]).row(0), Conversation), "who wants words gets them"
    with pytest.raises(Rejected, match="malformed line"):
        corpus.row(3)
    stream = open_stream(DataOptions(max_length=64), [path], pocket, batch_size=1)
    (packed,) = stream
    assert packed.documents.max() == 2 and stream.rejected == {"malformed line": 1}
    held = [packed.ids[0][packed.documents[0] == d].tolist() for d in range(3)]
    assert IDS in held and sum(packed.mask[0]) == 3 + 2 * 2


def test_rows_with_ids_are_no_rendered_texts(tmp_path, pocket):
    corpus = Corpus([write(tmp_path / "rows.jsonl", row())], preformatted=True)
    report = inspect(corpus, Encoder(pocket, preformatted=True))
    with pytest.raises(
        UserError, match=r"holds token ids, which --is-preformatted does not read .* leave --is-preformatted out"
    ):
        report.check()


def test_the_report_says_who_wrote_the_ids(tmp_path, pocket):
    template = Encoder(pocket).template_hash
    rows = [row(target="abc", template=template), row(endpoint_model="served", template="old"), row()]
    report = inspect(Corpus([write(tmp_path / "rows.jsonl", *rows)], ids=True), Encoder(pocket))
    assert report.written_by == {"abc": 1, "served": 1, "nobody knows whom": 1} and report.other_template == 1
    assert "written by abc" in report.plain() and "another chat template" in report.plain()
    assert report.as_dict()["written_by"] == dict(report.written_by) and report.as_dict()["other_template"] == 1


def test_a_folder_stands_for_its_files(tmp_path):
    names = ("train-10.jsonl", "train-2.jsonl", "train-2.failed.jsonl", "eval-0.jsonl", "train-2.done")
    for name in names:
        (tmp_path / name).write_text("")
    train, held_out = corpus_paths(DataOptions(train_data_path=tmp_path), tmp_path)
    assert [path.name for path in train] == [
        "train-2.jsonl",
        "train-10.jsonl",
    ] and held_out == tmp_path / "eval-0.jsonl"
    other = tmp_path / "other.jsonl"
    both = DataOptions(train_data_path=[other, tmp_path], eval_data_path=other)
    assert corpus_paths(both, tmp_path)[0][0] == other and corpus_paths(both, tmp_path)[1] == other
    assert corpus_paths(DataOptions(train_data_path=other, eval_data_path=tmp_path), tmp_path)[1] == held_out
    (tmp_path / "eval-1.jsonl").write_text("")
    with pytest.raises(UserError, match="there are 2 files to evaluate on"):
        corpus_paths(DataOptions(train_data_path=tmp_path), tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    for options in ({"train_data_path": empty}, {"train_data_path": other, "eval_data_path": empty}):
        with pytest.raises(UserError, match=r"empty holds no (train|eval)-0\.jsonl"):
            corpus_paths(DataOptions(**options), tmp_path)
