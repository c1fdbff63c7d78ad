"""`understudy layers`: one process or several, the same figures; every option shows; one line for what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny
from training.kangaroo import target, write_rows
from understudy.analysis import cost
from understudy.assets import pocket_path
from understudy.cli import layers, main
from understudy.target.target import Target

LAYERS = tiny.LAYERS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A tiny target, timed once."""
    monkeypatch.setattr(layers, "load", lambda config: target())
    monkeypatch.setattr(cost, "TRIES", range(1, 2))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def layers_of(capsys, *args: object) -> dict[str, Any]:
    code = main(["layers", *map(str, args)])
    out, err = capsys.readouterr()
    assert code == 0, err
    last: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {**last, "out": out}


def measured(capsys, rows: Path, folder: Path, *args: object) -> dict[str, Any]:
    layers_of(capsys, "--data-path", rows, "--max-length", 64, "--output-dir", folder, *args)
    found: dict[str, Any] = json.loads((folder / "layers.json").read_text())
    return found


def refused(capsys, *args: object) -> str:
    assert main(["layers", *map(str, args)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    return err


def figures(found: dict[str, Any]) -> list[Any]:
    """What does not depend on the clock."""
    flat = [
        {**{k: v for k, v in row.items() if k != "early_exit"}, **(row["early_exit"] or {})} for row in found["curves"]
    ]
    return [found["samples"], found["tokens"], *(value for row in flat for value in row.values() if value is not None)]


def test_one_call_does_everything(capsys, tmp_path, rows):
    last = layers_of(
        capsys, "--data-path", rows, "--max-length", 64, "--output-dir", tmp_path / "run", "--num-samples", 5, "--plot"
    )
    folder = tmp_path / "run"
    found = json.loads((folder / "layers.json").read_text())
    assert (last["folder"], last["samples"], last["tokens"]) == (str(folder), 5, found["tokens"])
    assert [row["layer"] for row in found["curves"]] == list(range(LAYERS + 1))
    assert [row["target_layer_id"] for row in found["curves"]] == [None, *range(LAYERS)]
    assert found["curves"][-1]["early_exit"]["agreement"] == 1
    assert last["taps"] == found["taps"][0]["taps"] and max(last["taps"]) < LAYERS
    assert last["target_layer_ids"] == [tap - 1 for tap in last["taps"]]
    assert last["default_taps"] == [2] and [one["rule"] for one in found["taps"]] == [
        "equal_steps",
        "lowest_loss",
        "even",
    ]
    gains = [one["speedup"] for one in found["exits"]]
    assert len(gains) == LAYERS - 1 and gains == sorted(gains, reverse=True)
    assert (last["exit_layer"], last["predicted_speedup"]) == (found["exits"][0]["layer"], gains[0])
    for name in last["files"][1:]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert len(last["files"]) == 5 and not list(folder.glob("rank-*"))
    assert "layers[i]" in last["out"] and "--target-layer-ids" in last["out"]


def test_two_ranks_are_one_process(capsys, tmp_path, rows, monkeypatch):
    one = measured(capsys, rows, tmp_path / "one", "--num-samples", 7)
    share = ("--data-path", rows, "--max-length", 64, "--output-dir", tmp_path / "two", "--num-samples", 7)
    first = layers_of(capsys, *share, "--rank", 0, "--world-size", 2)
    assert (first["samples"], first["file"]) == (4, str(tmp_path / "two" / "rank-0-of-2.json"))
    assert "lacks rank 1 of 2" in refused(capsys, "--aggregate", "--output-dir", tmp_path / "two")
    monkeypatch.setenv("RANK", "1")  # as torchrun does
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert layers_of(capsys, *share)["samples"] == 3
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    layers_of(capsys, "--aggregate", "--plot", "--output-dir", tmp_path / "two")
    two = json.loads((tmp_path / "two" / "layers.json").read_text())
    assert figures(two) == pytest.approx(figures(one), rel=1e-9, abs=1e-7)
    assert (two["world_size"], two["settings"], two["taps"]) == (2, one["settings"], one["taps"])
    assert (tmp_path / "two" / "cosine.png").exists()


def test_more_ranks_than_samples(capsys, tmp_path, rows):
    share = ("--data-path", rows, "--max-length", 64, "--output-dir", tmp_path, "--num-samples", 1, "--world-size", 2)
    assert layers_of(capsys, *share, "--rank", 0)["samples"] == 1
    assert "rank 1 of 2 has no sample" in refused(capsys, *share, "--rank", 1)


def test_options_show(capsys, tmp_path, rows):
    plain = measured(capsys, rows, tmp_path, "--num-samples", 3)
    again = measured(capsys, rows, tmp_path, "--num-samples", 3)
    assert figures(again) == figures(plain)
    assert measured(capsys, rows, tmp_path, "--num-samples", 4)["samples"] == 4
    assert figures(measured(capsys, rows, tmp_path, "--num-samples", 3, "--seed", 1)) != figures(plain)
    assert measured(capsys, rows, tmp_path, "--num-samples", 3, "--max-length", 18)["tokens"] < plain["tokens"]
    few = measured(capsys, rows, tmp_path, "--num-samples", 3, "--layers", "0,2,3", "--num-taps", 1)
    assert [row["layer"] for row in few["curves"] if row["early_exit"]] == [0, 2, 3, LAYERS]
    assert [len(one["taps"]) for one in few["taps"]] == [1, 1, 1]
    assert {one["layer"] for one in few["exits"]} == {2, 3}
    assert all(row["cosine"] is not None for row in few["curves"])


def test_what_the_rows_are(capsys, tmp_path):
    turns = [("human", "Write f."), ("gpt", "def f(): pass"), ("human", "Write g."), ("gpt", "def g(): pass")]
    rows = tmp_path / "turns.jsonl"
    rows.write_text(json.dumps({"conversations": [{"from": who, "value": text} for who, text in turns]}) + "\n")
    both = measured(capsys, rows, tmp_path / "run")
    assert both["samples"] == 1
    last = measured(capsys, rows, tmp_path / "run", "--last-turn-only")
    assert 0 < last["tokens"] < both["tokens"]
    text = target().tokenizer.apply_chat_template(
        [{"role": {"human": "user", "gpt": "assistant"}[who], "content": text} for who, text in turns], tokenize=False
    )
    rendered = tmp_path / "rendered.jsonl"
    rendered.write_text(json.dumps({"text": text}) + "\n")
    assert figures(measured(capsys, rendered, tmp_path / "run", "--is-preformatted")) == figures(both)


def test_fewer_samples_than_asked_for_are_said(capsys, tmp_path, rows):
    last = layers_of(capsys, "--data-path", rows, "--max-length", 64, "--output-dir", tmp_path, "--num-samples", 50)
    assert last["samples"] == 12 and "the data have 12 conversations" in last["out"]


def test_aggregate_chooses_among_what_was_measured(capsys, tmp_path, rows):
    common = ("--data-path", rows, "--max-length", 64, "--output-dir", tmp_path, "--num-samples", 4)
    for rank in (0, 1):
        layers_of(capsys, *common, "--layers", "0,1,3", "--rank", rank, "--world-size", 2)
    again = ("--aggregate", "--output-dir", tmp_path)
    assert layers_of(capsys, *again, "--num-samples", 4, "--data-path", rows)["taps"] == [1, 3]
    assert layers_of(capsys, *again, "--layers", "0,1")["taps"] == [1]
    assert layers_of(capsys, *again, "--num-taps", 1)["taps"] == [3]
    assert "--layers 2 was not measured: step B has layers 0, 1, 3" in refused(capsys, *again, "--layers", "1,2")
    assert "--num-samples 5: the ranks were measured with 4" in refused(capsys, *again, "--num-samples", 5)
    assert "--model other: the ranks were measured with pocket" in refused(capsys, *again, "--model", "other")
    assert "leave --device out" in refused(capsys, *again, "--device", "cpu")
    assert "leave --rank out" in refused(capsys, *again, "--rank", 0)
    for rank in range(3):
        layers_of(capsys, *common, "--rank", rank, "--world-size", 3)
    assert "files of --world-size 2 and 3" in refused(capsys, *again)
    assert layers_of(capsys, *again, "--world-size", 2)["taps"] == [1, 3]
    assert "of --world-size 4" in refused(capsys, *again, "--world-size", 4)


def test_ranks_that_do_not_belong_together_are_refused(capsys, tmp_path, rows, monkeypatch):
    common = ("--data-path", rows, "--max-length", 64, "--output-dir", tmp_path, "--world-size", 2)
    layers_of(capsys, *common, "--rank", 0, "--num-samples", 4)
    layers_of(capsys, *common, "--rank", 1, "--num-samples", 6)
    says = refused(capsys, "--aggregate", "--output-dir", tmp_path)
    assert "rank 1 was measured with num samples 6, rank 0 with 4" in says
    model = tiny.build("Qwen3ForCausalLM", "Qwen3Config", seed=9, vocab_size=4096, eos_token_id=2)
    other = Target(model, AutoTokenizer.from_pretrained(pocket_path()), "tiny")
    monkeypatch.setattr(layers, "load", lambda config: other)
    layers_of(capsys, *common, "--rank", 1, "--num-samples", 4)
    assert "rank 1 was measured on another target" in refused(capsys, "--aggregate", "--output-dir", tmp_path)
    (tmp_path / "rank-1-of-2.json").write_text('{"rank": 1}')
    assert "rank-1-of-2.json is not what" in refused(capsys, "--aggregate", "--output-dir", tmp_path)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--rank", "2", "--world-size", "2"], "with --world-size 2 it is at most 1"),
        (["--world-size", "8"], "say with --rank which of them this process is, 0 to 7"),
        (["--rank", "0", "--world-size", "2", "--plot"], "give it with --aggregate"),
        (["--aggregate"], "holds no rank's file"),
        (["--layers", "0,five"], "--layers must be a whole number (got five)"),
        (["--layers", "99", "--data-path", "ROWS", "--max-length", "64"], "layers are 0 (embeddings) to"),
        (["--max-length", "999", "--data-path", "ROWS"], "beyond the target's context of 256"),
        (["--data-path", "none.jsonl", "--max-length", "64"], "cannot read none.jsonl"),
    ],
)
def test_mistakes(args, says, capsys, tmp_path, rows):
    args = [str(rows) if arg == "ROWS" else arg for arg in args]
    assert says in refused(capsys, *args, "--output-dir", tmp_path / "run")


def test_nothing_to_count_is_said(capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi"}\n')
    args = ("--data-path", rows, "--max-length", 64, "--output-dir", tmp_path)
    assert "can be trained on: no assistant answer" in refused(capsys, *args)


def test_the_built_in_corpus_is_the_default(capsys, tmp_path, monkeypatch):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "json.py").write_text("def f():\n    return 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    assert layers_of(capsys, "--max-length", 64, "--output-dir", tmp_path / "run")["samples"] == 1
    found = json.loads((tmp_path / "run" / "layers.json").read_text())
    # the half without the modules that the preset's prompts are from
    assert found["settings"]["bytes"] == (tmp_path / "run" / "corpus" / "train.jsonl").stat().st_size > 0


@pytest.mark.slow
def test_two_processes_on_the_built_in_model(tmp_path, rows):
    """As on two devices: started at once, merged by a third."""
    base = [sys.executable, "-m", "understudy", "layers"]
    common = ["--data-path", str(rows), "--num-samples", "4", "--device", "cpu", "--threads", "1"]

    def started(*args: str) -> subprocess.Popen[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*base, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    two, one = tmp_path / "two", tmp_path / "one"
    ranks = [started(*common, "--output-dir", str(two), "--rank", str(r), "--world-size", "2") for r in range(2)]
    for process in ranks:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for args in (["--aggregate", "--output-dir", str(two)], [*common, "--output-dir", str(one)]):
        _, err = (process := started(*args)).communicate(timeout=300)
        assert process.returncode == 0, err
    found = [json.loads((folder / "layers.json").read_text()) for folder in (one, two)]
    assert figures(found[1]) == pytest.approx(figures(found[0]), rel=1e-9, abs=1e-7)
