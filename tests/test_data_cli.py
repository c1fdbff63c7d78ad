"""`understudy data`: what it prints, its last line of JSON, and one line for what goes wrong."""

from __future__ import annotations

import json

import pytest

from understudy.cli import main


def test_peek(tmp_path, capsys):
    rows = [
        {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello" * 200}]},
        "broken",
        {"turns": ["One?", "Two?"]},
        {"prompt": "Three?"},
        {"prompt": "Four?"},
        "broken too",
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert main(["data", "peek", str(path)]) == 0
    out = capsys.readouterr().out
    assert "[a]\nprompt: Hi\nanswer: HelloHello" in out
    assert "(1,000 characters)" in out
    assert "[rows:3]\nprompt: One?\nanswer: (none)" in out
    assert "Four?" not in out
    assert f"skipped {path}:2: holds text" in out
    assert json.loads(out.splitlines()[-1]) == {"conversations": 3, "skipped": 1}

    assert main(["data", "peek", str(path), "--count", "1", "--all"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"conversations": 4, "skipped": 2}


def test_stdlib(tmp_path, capsys, monkeypatch):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "json.py").write_text("def f():\n    return 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    assert main(["data", "stdlib", "--output-dir", str(tmp_path / "corpus")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "train.jsonl: 1 conversations, 1 answers" in out[0]
    assert json.loads(out[-1])["train"]["answers"] == 1
    assert len((tmp_path / "corpus" / "train.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["peek", "none.jsonl"], "cannot read none.jsonl"),
        (["peek"], "missing argument 'FILE'"),
        (["stdlib"], "--output is required"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert main(["data", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_peek_at_what_is_no_conversation(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "other.jsonl").write_text("{\n}\n")
    for name, message in (("empty", "it is empty"), ("other", "other.jsonl:1: not JSON")):
        assert main(["data", "peek", str(tmp_path / f"{name}.jsonl")]) == 2
        assert message in capsys.readouterr().err
