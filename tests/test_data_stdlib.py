"""The built-in corpus: what a function becomes, determinism, and a split that no module straddles."""

from __future__ import annotations

import json
import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from understudy.core.errors import UserError
from understudy.data.conversations import read
from understudy.data.stdlib import CONVERSATION, conversations, held_out, module_of, write_corpus

MODULE = '''
"""Docstring of the module."""

@decorated(1)
def f(a, b=2, *, c: int = 3) -> str:
    """Say something.

    More:
        Indented.
    """
    return a

async def g():
    return 1

def one_line(): return 1

def only_docstring():
    """Nothing
    else."""

class C(Base, metaclass=M):
    """Docstring of the class."""
    x = 1

    def method(self):  # a comment stays
        """Short."""
        return self.x

    class Inner:
        def inner(self):
            return 2
'''


@pytest.fixture
def library(tmp_path) -> Path:
    root = tmp_path / "library"
    for name in ("colorsys.py", "json/__init__.py", "json/decoder.py", "test/test_colorsys.py", "test/test_json/test_a.py",
                 "site-packages/other.py", "lib2to3/old.py"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(MODULE)
    (root / "broken.py").write_text("def f(:\n    pass\n")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\ndef f():\n    return 1\n")
    return root


def rows(library: Path) -> dict[str, list[dict[str, str]]]:
    return {row["id"]: row["conversations"] for _, row in conversations(library)}


def test_questions_and_answers(library):
    turns = rows(library)
    assert turns["json.decoder::0"] == [
        {"from": "human",
         "value": "Write `def f(a, b=2, *, c: int=3)` in module `json.decoder`.\nSay something.\n\nMore:\n    Indented."},
        {"from": "gpt", "value": "@decorated(1)\ndef f(a, b=2, *, c: int = 3) -> str:\n    return a"},
        {"from": "human", "value": "Write `async def g()` in module `json.decoder`."},
        {"from": "gpt", "value": "async def g():\n    return 1"},
        # one_line is too short to ask for; a function that is only a docstring keeps it
        {"from": "human", "value": "Write `def only_docstring()` in module `json.decoder`.\nNothing\nelse."},
        {"from": "gpt", "value": 'def only_docstring():\n    """Nothing\n    else."""'},
    ]  # fmt: skip
    assert turns["json.decoder:C:0"] == [
        {"from": "human", "value": "Write `def method(self)` of class `C(Base)` in `json.decoder`.\nShort."},
        {"from": "gpt", "value": "def method(self):  # a comment stays\n    return self.x"},
    ]


def test_which_files(library):
    modules = [module for module, row in conversations(library) if row["id"].endswith("::0")]
    assert modules == ["colorsys", "json", "json.decoder", "test.test_colorsys", "test.test_json.test_a"]


def test_long_modules_are_cut(library):
    body = "".join(f"def f{i}():\n    return {'x' * 990!r}\n\n" for i in range(10))
    (library / "long.py").write_text(body)
    cut = {name: turns for name, turns in rows(library).items() if name.startswith("long:")}
    assert list(cut) == ["long::0", "long::4", "long::8"]
    assert sum(map(len, cut.values())) == 20
    assert all(sum(len(t["value"]) for t in turns[:-2]) < CONVERSATION for turns in cut.values())


def test_two_runs_write_the_same_bytes(library, tmp_path):
    counts = [write_corpus(tmp_path / name, library) for name in "ab"]
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {k: v for k, v in counts[0].items() if k != "output"} == {
        k: v for k, v in counts[1].items() if k != "output"
    }
    assert counts[0]["eval"] == {"conversations": 4, "answers": 8, "characters": counts[0]["eval"]["characters"]}
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["eval.jsonl", "train.jsonl"]


def test_no_module_is_on_both_sides(library, tmp_path):
    write_corpus(tmp_path, library)
    train, held = ({module_of(c.id) for c in read(tmp_path / f"{split}.jsonl")} for split in ("train", "eval"))
    assert held == {"colorsys", "test.test_colorsys"}  # a module's tests go where the module goes
    assert train == {"json", "json.decoder", "test.test_json.test_a"}


def test_the_rule_of_the_split():
    held = ["colorsys", "test.test_colorsys", "ctypes.wintypes", "test.test_ctypes.test_find", "enum", "tarfile"]
    assert all(map(held_out, held))
    assert not any(map(held_out, ["json", "json.decoder", "test.test_json", "asyncio", "argparse", "pathlib"]))


def test_the_running_interpreter_has_a_corpus():
    found = list(islice(conversations(Path(sysconfig.get_paths()["stdlib"])), 20))
    assert len(found) == 20
    assert all(json.dumps(row) and module == module_of(row["id"]) for module, row in found)


def test_a_folder_that_cannot_be_written(library, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_corpus(tmp_path / "file", library)
