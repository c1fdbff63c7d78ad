"""`understudy data regenerate` on the built-in model: files, ranks, going on, every option, and what is trained on in the end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from understudy.assets import pocket_path
from understudy.cli import data_regenerate, main
from understudy.cli.common import ModelOptions, load
from understudy.data.options import DataOptions, corpus_paths
from understudy.data.stream import open_stream
from understudy.distill.output import Output
from understudy.target.target import Target


@cache
def pocket() -> Target:
    return load(ModelOptions(dtype="float32"))


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch):
    monkeypatch.setattr(data_regenerate, "load", lambda config: pocket())


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    write_talks(path, 7)
    return path


def write_talks(path: Path, count: int) -> None:
    names = ("close", "parse_args", "read_line", "visit", "to_json", "get_name", "reset")
    with path.open("w") as file:
        for i in range(count):
            turns = []
            for turn in range(1 + i % 2):
                turns += [{"from": "human", "value": f"Write `def {names[(i + turn) % 7]}(self)` of class `A{i}`."}]
                turns += [{"from": "gpt", "value": "an old answer"}]
            file.write(json.dumps({"id": f"talk {i}", "conversations": turns}) + "\n")


def run(capsys, folder: Path, talks: Path, *more: Any) -> dict[str, Any]:
    given = [] if "--max-new-tokens" in more else ["--max-new-tokens", 16]
    code = main([*map(str, ("data", "regenerate", "--output-dir", folder, "--data-path", talks, *given, *more))])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def refused(capsys, *args: Any) -> str:
    code = main([*map(str, ("data", "regenerate", *args))])
    err = capsys.readouterr().err
    assert code == 2, err
    return " ".join(err.split())


def read(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{split}-[0-9].jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["number"])


def test_rows_are_trained_on_as_they_were_written(tmp_path, talks, capsys):
    summary = run(capsys, tmp_path / "out", talks, "--batch-size", 3)
    rows = read(tmp_path / "out")
    assert summary["conversations"] == summary["done"] == 7 and summary["rows"] == len(rows) == 7
    assert summary["answers"] == 10 == sum(len(row["finished"]) for row in rows)
    assert summary["supervised"] == sum(sum(row["loss_mask"]) for row in rows) == summary["new_tokens"]
    assert summary["cut"] == sum(row["finished"].count("length") for row in rows) > 0
    assert {row["id"] for row in rows} == {f"talk {i}" for i in range(7)}
    assert all(m["content"] != "an old answer" for row in rows for m in row["messages"])
    made = rows[0]["made"]
    assert set(made) == {"target", "tokenizer", "template", "thinking", "sampling"}
    assert made["sampling"] == {"temperature": 0.0, "seed": 0}

    options = DataOptions(train_data_path=tmp_path / "out", max_length=256, pack=False)
    paths, held_out = corpus_paths(options, tmp_path)
    assert paths == [tmp_path / "out" / "train-0.jsonl"] and held_out is None
    stream = open_stream(options, paths, pocket().tokenizer, batch_size=1, shuffle=False)
    seen = [(packed.ids[0].tolist(), packed.mask[0].tolist()) for packed in stream]
    written = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert seen == [(row["input_ids"], [bool(x) for x in row["loss_mask"]]) for row in written]


def test_two_ranks_give_what_one_process_gives(tmp_path, talks, capsys, monkeypatch):
    run(capsys, tmp_path / "one", talks)
    run(capsys, tmp_path / "two", talks, "--rank", 0, "--world-size", 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    last = run(capsys, tmp_path / "two", talks)  # as torchrun says it
    assert last["output"].endswith("train-1.jsonl") and last["conversations"] == 3
    assert read(tmp_path / "two") == read(tmp_path / "one")
    assert len((tmp_path / "two" / "train-0.jsonl").read_text().splitlines()) == 4
    assert "it is at most 1" in refused(capsys, "--output-dir", tmp_path / "three", "--data-path", talks, "--rank", 2)


def test_a_run_that_dies_goes_on(tmp_path, talks, capsys, monkeypatch):
    whole, add = run(capsys, tmp_path / "one", talks), Output.add

    def dies(self, *args):
        if len(self.done) == 3:
            self._rows.write(b'{"half": ')
            self._rows.flush()
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(Output, "add", dies)
    given = ("--output-dir", tmp_path / "two", "--data-path", talks, "--max-new-tokens", 16)
    assert main([*map(str, ("data", "regenerate", *given))]) == 130
    monkeypatch.setattr(Output, "add", add)
    capsys.readouterr()
    again = run(capsys, tmp_path / "two", talks)
    assert read(tmp_path / "two") == read(tmp_path / "one")
    changing = ("output", "new_tokens", "seconds", "tokens_per_s")
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in whole.items() if k not in changing
    }
    assert again["new_tokens"] < whole["new_tokens"]
    assert run(capsys, tmp_path / "two", talks)["new_tokens"] == 0
    assert "sampling was {'temperature': 0.0, 'seed': 0}, is" in refused(capsys, *given, "--seed", 3)
    assert "max_repeat_share was 0.5, is 0.7" in refused(capsys, *given, "--max-repeat-share", 0.7)
    assert "another --output-dir" in refused(capsys, *given[:4], "--max-new-tokens", 17)


@pytest.mark.slow
def test_a_run_that_is_killed_outright_goes_on(tmp_path, capsys):
    """kill -9 while it writes: what is there stays, nothing comes twice."""
    talks, folder = tmp_path / "talks.jsonl", tmp_path / "out"
    write_talks(talks, 150)
    given = [
        "--output-dir",
        folder,
        "--data-path",
        talks,
        "--max-new-tokens",
        64,
        "--dtype",
        "float32",
        "--batch-size",
        8,
    ]
    command = [sys.executable, "-m", "understudy", "data", "regenerate", *map(str, given)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = folder / "train-0.done"
    while process.poll() is None and not (done.exists() and done.stat().st_size):
        time.sleep(0.05)
    assert process.poll() is None, "killed in the middle"
    process.kill()
    process.wait()
    before = len(done.read_text().splitlines())
    assert 0 < before < 150
    summary = run(capsys, folder, talks, "--batch-size", 8, "--max-new-tokens", 64)
    assert summary["done"] == 150 and 0 < summary["new_tokens"] < summary["supervised"]
    assert [row["number"] for row in read(folder)] == list(range(150))
    run(capsys, tmp_path / "whole", talks, "--batch-size", 8, "--max-new-tokens", 64)
    assert read(folder) == read(tmp_path / "whole")


def test_every_option_of_the_law_changes_answers(tmp_path, talks, capsys):
    def answers(name: str, *more: Any) -> list[list[int]]:
        run(capsys, tmp_path / name, talks, *more)
        return [row["input_ids"] for row in read(tmp_path / name)]

    greedy, warm = answers("greedy"), answers("warm", "--temperature", 1)
    assert warm != greedy
    assert answers("again", "--temperature", 1, "--batch-size", 2) == warm, "the batch does not matter"
    assert answers("seed", "--temperature", 1, "--seed", 1) != warm
    assert answers("top-k", "--temperature", 1, "--top-k", 1) == greedy
    assert answers("top-p", "--temperature", 1, "--top-p", 0.0) == greedy
    assert answers("short", "--max-new-tokens", 3) != greedy


def test_samples_are_drawn_from_all_data_and_may_be_extended(tmp_path, talks, capsys):
    run(capsys, tmp_path / "few", talks, "--num-samples", 3)
    few = read(tmp_path / "few")
    assert len(few) == 3 and [row["number"] for row in few] != [0, 1, 2]
    run(capsys, tmp_path / "few", talks)
    run(capsys, tmp_path / "all", talks)
    assert read(tmp_path / "few") == read(tmp_path / "all")


def test_answers_that_loop_are_dropped_and_counted(tmp_path, talks, capsys):
    summary = run(capsys, tmp_path / "strict", talks, "--max-repeat-share", 0, "--max-new-tokens", 60)
    kept = run(capsys, tmp_path / "kept", talks, "--max-repeat-share", 1, "--max-new-tokens", 60)
    dropped = summary["dropped"]["the answer loops"]
    assert dropped > 0 == len(kept["dropped"]) and summary["answers"] + dropped == kept["answers"] == 10
    failed = [json.loads(line) for line in (tmp_path / "strict" / "train-0.failed.jsonl").read_text().splitlines()]
    assert len(failed) == dropped
    assert all(line["reason"] == "the answer loops" and 0 < line["repeat_share"] <= 1 for line in failed)


def test_lines_that_are_no_conversations_are_told_and_left_out(tmp_path, talks, capsys):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("not json\n\n" + talks.read_text())
    summary = run(capsys, tmp_path / "out", mixed, "--max-new-tokens", 4)
    assert summary["malformed"] == 1 and summary["rows"] == 7 and summary["done"] == 9
    (line,) = (tmp_path / "out" / "train-0.failed.jsonl").read_text().splitlines()
    assert "mixed.jsonl:1" in line and "not JSON" in line


def test_the_held_out_side(tmp_path, talks, capsys):
    assert "--split eval needs --eval-data-path" in refused(
        capsys, "--output-dir", tmp_path / "out", "--data-path", talks, "--split", "eval"
    )
    run(capsys, tmp_path / "out", talks, "--num-samples", 2)
    run(capsys, tmp_path / "out", talks, "--eval-data-path", talks, "--split", "eval")
    assert len(read(tmp_path / "out", "eval")) == 7 and len(read(tmp_path / "out")) == 2
    options = DataOptions(train_data_path=tmp_path / "out")
    assert corpus_paths(options, tmp_path) == ([tmp_path / "out" / "train-0.jsonl"], tmp_path / "out" / "eval-0.jsonl")


def test_a_row_is_no_longer_than_asked_for(tmp_path, talks, capsys):
    run(capsys, tmp_path / "out", talks, "--max-length", 48, "--max-new-tokens", 40)
    lengths = [len(row["input_ids"]) for row in read(tmp_path / "out")]
    assert max(lengths) == 48 and "no room" in (tmp_path / "out" / "train-0.failed.jsonl").read_text()


@pytest.mark.parametrize(("thinking", "said"), [("on", " think"), ("off", " quick"), ("default", "")])
def test_thinking_is_switched_by_the_chat_template(tmp_path, talks, capsys, monkeypatch, thinking, said):
    from understudy.target.loading import load_target

    own = load_target(pocket().model, tokenizer=_thinker(), check=False)
    monkeypatch.setattr(data_regenerate, "load", lambda config: own)
    run(capsys, tmp_path / "out", talks, "--thinking", thinking, "--num-samples", 1, "--max-new-tokens", 4)
    row = read(tmp_path / "out")[0]
    start = row["loss_mask"].index(1)
    assert own.tokenizer.decode(row["input_ids"][:start]).endswith(f"<|assistant|>\n{said}")
    assert row["made"]["thinking"] == thinking


def _thinker() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    ending = "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
    switch = "{% if enable_thinking is defined %}{{ ' think' if enable_thinking else ' quick' }}{% endif %}"
    assert ending in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(ending, ending + switch)
    return tokenizer


def test_mistakes_are_told_in_one_line(tmp_path, talks, capsys):
    given = ("--output-dir", tmp_path / "out", "--data-path", talks)
    assert "has no enable_thinking" in refused(capsys, *given, "--thinking", "on")
    assert "holds no conversations" in refused(capsys, *given[:3], _empty(tmp_path))
    assert "cannot read" in refused(capsys, *given[:3], tmp_path / "none.jsonl")
    (tmp_path / "words.jsonl").write_text("words\nand words\n")
    assert "no line of the data is a conversation" in refused(
        capsys, "--output-dir", tmp_path / "words", "--data-path", tmp_path / "words.jsonl"
    )
    assert "holds no train-0.jsonl" in refused(capsys, *given[:3], tmp_path)
    assert "--retries is for a server" in refused(capsys, *given, "--retries", 1)
    assert "--batch-size is for a target in this process" in refused(
        capsys, *given, "--endpoint", "http://127.0.0.1:9", "--batch-size", 2
    )
    assert "no server answers at http://127.0.0.1:9/v1" in refused(capsys, *given, "--endpoint", "http://127.0.0.1:9")
    assert not (tmp_path / "out" / "train.json").exists()


def _empty(folder: Path) -> Path:
    (folder / "empty.jsonl").write_text("")
    return folder / "empty.jsonl"


def test_torchrun_gives_every_process_its_device(monkeypatch):
    import torch

    config = data_regenerate.RegenerateOptions(output_dir=Path("out"))
    assert data_regenerate.on_own_device(config).device is None
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert data_regenerate.on_own_device(config).device == "cuda:3"
    assert data_regenerate.on_own_device(config.model_copy(update={"device": "cpu"})).device == "cpu"
