"""Corpus, order, batches: resumed = uninterrupted, ranks are disjoint, nothing is lost, memory stays flat; and the options."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from understudy.assets import pocket_path
from understudy.core.errors import UserError
from understudy.core.seeds import derive
from understudy.data import encode as E
from understudy.data import stream as S
from understudy.data.conversations import Conversation, Message
from understudy.data.encode import Encoder, Rejected
from understudy.data.options import DataOptions, corpus_paths
from understudy.data.packing import Packed
from understudy.data.stream import Corpus, Stream, epoch_order, open_stream


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pocket_path())


def line(question, answer, **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": turns, **more}) + "\n"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two files: 40 documents of very different lengths, each with a number of its own; blank, malformed and useless lines."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [line(f"q{i}", f"answer {i} " + "word " * (i * 7 % 50)) for i in range(40)]
    lines.insert(3, "\n")
    lines.insert(9, "broken\n")
    lines.insert(30, json.dumps({"prompt": "unanswered"}) + "\n")
    (folder / "a.jsonl").write_text("".join(lines[:20]))
    (folder / "b.jsonl").write_text("".join(lines[20:]).removesuffix("\n"))
    return [folder / "a.jsonl", folder / "b.jsonl"]


def make(paths, tokenizer, **options):
    encoder = Encoder(tokenizer, max_length=options.pop("max_length", 100))
    return Stream(Corpus(paths), encoder, **{"batch_size": 3, "pad_id": 0, "seed": 1, **options})


def documents(batches):
    """Every document of the batches as a tuple of ids and mask, in order."""
    found = []
    for packed in batches:
        for b in range(len(packed.ids)):
            for d in range(packed.documents[b].max() + 1):
                slots = packed.documents[b] == d
                found.append((tuple(packed.ids[b][slots]), tuple(packed.mask[b][slots])))
    return found


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


# -- lines ------------------------------------------------------------------------------------------------------------


def test_corpus(paths):
    corpus = Corpus(paths)
    assert len(corpus) == 43
    assert corpus.bytes == sum(path.stat().st_size for path in paths)
    assert corpus.where(19) == f"{paths[0]}:20"
    assert corpus.where(20) == f"{paths[1]}:1"
    assert corpus.row(0) == Conversation("a:1", (Message("user", "q0"), Message("assistant", "answer 0 ")))
    assert corpus.row(42).messages[0].content == "q39"  # the last line has no line break
    assert corpus.row(3) is None
    with pytest.raises(Rejected, match="malformed line: not JSON"):
        corpus.row(9)


def test_byte_order_mark_and_empty_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "1"}\r\n{"prompt": "2"}')
    corpus = Corpus([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert [corpus.row(i).messages[0].content for i in range(len(corpus))] == ["1", "2"]


def test_line_starts_across_reads(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"ab\n\nc\n\n\ndef")
    whole = S._line_starts(path).tolist()
    assert whole == [0, 3, 4, 6, 7, 8, 11]
    for size in range(1, 13):
        monkeypatch.setattr(S, "CHUNK", size)
        assert S._line_starts(path).tolist() == whole


def test_preformatted_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"prompt": "b"}\n{"text": 1}\n')
    corpus = Corpus([path], preformatted=True)
    assert corpus.row(0) == "a"
    for i, reason in ((1, S.NO_TEXT), (2, S.MALFORMED)):
        with pytest.raises(Rejected) as error:
            corpus.row(i)
        assert error.value.reason == reason
    with pytest.raises(Rejected) as error:
        Corpus([path]).row(0)
    assert error.value.reason == S.ONLY_TEXT


def test_a_file_that_cannot_be_read(paths, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl: No such file"):
        Corpus([*paths, tmp_path / "none.jsonl"])
    path = tmp_path / "gone.jsonl"
    path.write_text('{"prompt": "1"}\n')
    corpus = Corpus([path])
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        corpus.row(0)


def test_memory_stays_flat(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(10_000):
            file.write(line("q", f"{i}" + "x" * 2000))  # 20 MB
    encoder = Encoder(tokenizer, max_length=64)
    next(iter(Stream(Corpus([path]), encoder, batch_size=2, pad_id=0)))  # what is loaded at first use
    tracemalloc.start()
    try:
        stream = iter(Stream(Corpus([path]), encoder, batch_size=2, pad_id=0, pack=False))
        for _ in range(20):
            next(stream)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000


# -- order ------------------------------------------------------------------------------------------------------------


def test_order_is_a_function_of_seed_and_epoch():
    """Oracle: SplitMix64 in whole numbers, the same on every machine."""

    def mixed(i, seed, epoch):
        x = i * 0x9E3779B97F4A7C15 + derive(seed, "data", epoch) & 2**64 - 1
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
        x = (x ^ x >> 27) * 0x94D049BB133111EB & 2**64 - 1
        return x ^ x >> 31

    for seed, epoch in ((0, 0), (7, 3)):
        assert epoch_order(50, seed, epoch).tolist() == sorted(range(50), key=lambda i: mixed(i, seed, epoch))
    orders = {tuple(epoch_order(10, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert epoch_order(0, 0, 0).tolist() == []


def test_every_place_comes_first_about_as_often():
    firsts = Counter(int(epoch_order(8, seed, 0)[0]) for seed in range(800))
    assert set(firsts) == set(range(8))
    assert max(firsts.values()) < 140  # 100 expected, standard deviation 9.4


def test_file_order(paths, tokenizer):
    stream = make(paths, tokenizer, shuffle=False, pack=False)
    asked = [tokenizer.decode(ids).split("\n")[1] for ids, _ in documents(stream)]
    assert asked == [f"q{i}<|end|>" for i in range(40)]


# -- batches ----------------------------------------------------------------------------------------------------------


def test_everything_once_packed_and_unpacked(paths, tokenizer):
    encoder = Encoder(tokenizer, max_length=100)
    corpus = Corpus(paths)
    expected = Counter()
    for i in range(len(corpus)):
        try:
            row = encoder(corpus.row(i)) if corpus.row(i) else None
        except Rejected:
            continue
        if row:
            expected[tuple(row.ids), tuple(row.mask)] += 1
    assert sum(expected.values()) == 40
    for pack in (True, False):
        stream = make(paths, tokenizer, pack=pack)
        batches = list(stream)
        assert Counter(documents(batches)) == expected
        assert stream.rejected == {S.MALFORMED: 1, E.NO_ANSWER: 1}
        widths = {packed.ids.shape[1] for packed in batches}
        assert widths == {100} if pack else len(widths) > 1
        assert all(len(packed.ids) == 3 for packed in batches)
    assert len(list(make(paths, tokenizer))) < len(list(make(paths, tokenizer, pack=False)))


def test_padding_id_and_truncation(paths, tokenizer):
    packed = next(iter(make(paths, tokenizer, pad_id=9, pack=False, max_length=30)))
    assert packed.ids.shape[1] <= 30
    assert (packed.ids[packed.documents == -1] == 9).all()
    assert (packed.documents == -1).any()


def test_epochs_differ_and_repeat(paths, tokenizer):
    stream = make(paths, tokenizer)
    first, second = list(stream), list(stream)
    assert stream.epoch == 2
    assert not same(first, second)
    assert Counter(documents(first)) == Counter(documents(second))
    assert same(first, list(make(paths, tokenizer)))
    assert not same(first, list(make(paths, tokenizer, seed=2)))


def test_the_second_epoch_tokenises_only_its_own_rows(paths, tokenizer, monkeypatch):
    stream = make(paths, tokenizer, rank=1, world_size=2, batch_size=1)
    calls = []
    call = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, row: calls.append(1) or call(self, row))
    list(stream)
    assert len(calls) == 41  # all but the blank and the malformed line
    calls.clear()
    own = documents(stream)
    assert len(calls) == len(own) < 30


def test_count_is_exact(paths, tokenizer):
    for options in ({}, {"pack": False}, {"batch_size": 4}, {"world_size": 3}, {"max_length": 40}):
        stream = make(paths, tokenizer, **options)
        n = stream.count()
        assert n == len(list(stream)) == len(list(make(paths, tokenizer, **options)))
        assert stream.count() == len(list(stream))


def test_stopping_in_the_middle_and_going_on(paths, tokenizer):
    whole, stream = list(make(paths, tokenizer)), make(paths, tokenizer)
    first = list(islice(stream, 2))
    assert stream.batch == 2
    assert same([*first, *stream], whole)


def endless(stream):
    while True:
        yield from stream


def global_rows(streams, batches):
    """The rows of the next global batches of ranks that go on together, in the order of the epoch, as documents."""
    return [
        [documents([Packed(*(x[b : b + 1] for x in part))]) for b in range(len(parts[0].ids)) for part in parts]
        for parts in islice(zip(*map(endless, streams), strict=True), batches)
    ]


splits = st.sampled_from([(1, 4), (2, 2), (4, 1)])  # processes, rows of each


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 24), st.booleans(), splits, splits)
def test_resumed_is_uninterrupted(paths, tokenizer, batches, pack, before, after):
    """Stop after any batch of the first epochs, write the state as JSON, and go on, with other numbers of processes too."""

    def streams(split):
        world, size = split
        return [make(paths, tokenizer, pack=pack, batch_size=size, rank=r, world_size=world) for r in range(world)]

    whole = global_rows(streams((1, 4)), batches + 4)
    stopped = streams(before)
    first = global_rows(stopped, batches)
    states = [json.loads(json.dumps(stream.state())) for stream in stopped]
    assert all(state == states[0] for state in states)
    resumed = streams(after)
    for stream in resumed:
        stream.load_state(states[0])
    assert first + global_rows(resumed, 4) == whole


@pytest.mark.parametrize("pack", [True, False])
def test_ranks_are_disjoint_and_miss_nothing(paths, tokenizer, pack):
    alone = list(make(paths, tokenizer, batch_size=6, pack=pack))
    ranks = [list(make(paths, tokenizer, batch_size=2, rank=r, world_size=3, pack=pack)) for r in range(3)]
    assert {len(batches) for batches in ranks} == {len(alone)}
    assert Counter(documents(alone)) == sum((Counter(documents(batches)) for batches in ranks), Counter())
    for whole, *parts in zip(alone, *ranks, strict=True):
        for j in range(6):  # row j of the global batch is row j // 3 of rank j % 3
            part, b = parts[j % 3], j // 3
            n = part.ids.shape[1]
            assert whole.ids[j][:n].tolist() == part.ids[b].tolist()
            assert whole.documents[j][:n].tolist() == part.documents[b].tolist()


def test_the_last_batch_is_filled_up_with_empty_rows(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(line("q", "a"))
    for rank, empty in ((0, [False, True]), (1, [True, True])):
        stream = Stream(Corpus([path]), Encoder(tokenizer), batch_size=2, pad_id=0, rank=rank, world_size=2)
        (packed,) = stream
        assert [bool((row == -1).all()) for row in packed.documents] == empty


def test_a_state_of_something_else(paths, tokenizer):
    state = make(paths, tokenizer).state()
    for options, name in (
        ({"seed": 5}, "seed was 1, is 5"),
        ({"pack": False}, "pack was True, is False"),
        ({"max_length": 50}, "max_length was 100, is 50"),
        ({"batch_size": 4}, "global batch size was 3, is 4"),
        ({"shuffle": False}, "shuffle was True, is False"),
    ):
        with pytest.raises(UserError, match=f"cannot resume.*{name}"):
            make(paths, tokenizer, **options).load_state(state)
    with pytest.raises(UserError, match="lines was 43, is 20; bytes was"):
        make(paths[:1], tokenizer).load_state(state)
    with pytest.raises(UserError, match="can no longer be trained on"):
        make(paths, tokenizer).load_state({**state, "open": [[9]]})


def test_nothing_to_train_on(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1"}\n')
    with pytest.raises(UserError, match=r"no row of .*a\.jsonl can be trained on: no assistant answer \(1 rows\)"):
        list(make([path], tokenizer))
    path.write_text("")
    with pytest.raises(UserError, match="there are no rows"):
        list(make([path], tokenizer))


# -- options ----------------------------------------------------------------------------------------------------------


def test_options():
    options = DataOptions(train_data_path="a.jsonl", eval_data_path="b.jsonl")
    assert [str(path) for path in options.train_data_path] == ["a.jsonl"]
    assert DataOptions(train_data_path=["a", "b"]).train_data_path[1].name == "b"
    with pytest.raises(ValidationError):
        DataOptions(max_length=1)
    with pytest.raises(ValidationError):
        DataOptions(max_len=1)


def test_every_option_counts(paths, tokenizer, tmp_path):
    def first(files=paths, tokenizer=tokenizer, seed=0, **options):
        stream = open_stream(DataOptions(**options), files, tokenizer, batch_size=2, seed=seed, shuffle=False)
        return next(iter(stream))

    plain = first()
    assert plain.ids.shape == (2, 2048)
    assert first(max_length=77).ids.shape == (2, 77)
    assert first(pack=False).ids.shape[1] < 77
    assert (plain.ids[plain.documents == -1] == tokenizer.pad_token_id).all()
    assert not same([plain], [next(iter(open_stream(DataOptions(), paths, tokenizer, batch_size=2, seed=0)))])

    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "1a2b", strict=True)]
    (tmp_path / "two.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    two, last = (first([tmp_path / "two.jsonl"], last_turn_only=only) for only in (False, True))
    assert (two.mask.sum(), last.mask.sum()) == (4, 2)
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert same([first([tmp_path / "text.jsonl"], is_preformatted=True)], [two])


def test_stop_ids_reach_the_encoder(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(line("q", "a<|mask|>b"))
    open_ = lambda **more: open_stream(DataOptions(), [tmp_path / "a.jsonl"], tokenizer, batch_size=1, **more)  # noqa: E731
    assert next(iter(open_())).mask.sum() == 4
    with pytest.raises(UserError, match=E.STOP_INSIDE):
        next(iter(open_(stop_ids=[4])))


def test_options_as_flags():
    from understudy.cli.options import options

    flags = {flag for option in options(DataOptions) for flag in option.opts}
    assert {"--train-data-path", "--train-data", "--data-path", "--data", "--eval-data-path", "--eval-data",
            "--max-length", "--max-seq-length", "--is-preformatted", "--last-turn-only", "--pack"} <= flags  # fmt: skip


def test_options_import_no_torch():
    code = "import sys, understudy.data.options; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_which_files(tmp_path, monkeypatch):
    written = []

    def write_corpus(folder):
        written.append(folder)
        folder.mkdir()
        (folder / "train.jsonl").write_text(line("q", "a"))
        (folder / "eval.jsonl").write_text(line("q", "b"))

    monkeypatch.setattr("understudy.data.stdlib.write_corpus", write_corpus)
    train, held_out = corpus_paths(DataOptions(), tmp_path)
    assert (train, held_out) == ([tmp_path / "corpus" / "train.jsonl"], tmp_path / "corpus" / "eval.jsonl")
    assert corpus_paths(DataOptions(), tmp_path) == (train, held_out)
    assert len(written) == 1  # a resumed run keeps the bytes it began with
    assert corpus_paths(DataOptions(eval_data_path="e"), tmp_path) == (
        train,
        DataOptions(eval_data_path="e").eval_data_path,
    )
    own = DataOptions(train_data_path=["t"])
    assert corpus_paths(own, tmp_path / "other") == (own.train_data_path, None)
    assert len(written) == 1
