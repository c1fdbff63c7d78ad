"""The built-in corpus: Python's standard library as conversations in which a user asks for functions and gets them.

Every machine that runs this project has the text, so nothing is downloaded. The functions of a module, or of a class, make one
conversation, cut at about 4,000 characters of answers; a question is the function's signature, its place and its docstring, and
the answer is its source without the docstring. One module in twenty is held out whole, together with its tests: functions of
one module resemble each other too much to be split.

The same interpreter gives the same bytes on every machine.

    understudy data stdlib --output runs/stdlib
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from understudy.core.errors import UserError
from understudy.core.files import replacing

SKIPPED = {"site-packages", "dist-packages", "lib2to3", "__pycache__", "turtledemo", "idle_test"}
HELD_OUT = 20  # one module in so many
DOCSTRING = 800  # characters of a docstring that go into the question
LINES = range(2, 81)  # lines of an answer
CHARACTERS = 3000  # an answer is shorter than this
CONVERSATION = 4000  # characters of answers after which a conversation ends

Function = ast.FunctionDef | ast.AsyncFunctionDef
Turn = dict[str, str]


def write_corpus(output: str | Path, root: str | Path | None = None) -> dict[str, Any]:
    """Write `train.jsonl` and `eval.jsonl` (ShareGPT rows) into `output` and return what was counted.

    `root` is the library to read, by default that of the running interpreter.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    output = Path(output)
    counts = {split: {"conversations": 0, "answers": 0, "characters": 0} for split in ("train", "eval")}
    try:
        with (
            replacing(output / "train.jsonl") as train,
            replacing(output / "eval.jsonl") as held,
            train.open("w", encoding="utf-8") as train_lines,
            held.open("w", encoding="utf-8") as held_lines,
        ):
            for module, row in conversations(root):
                split, lines = ("eval", held_lines) if held_out(module) else ("train", train_lines)
                lines.write(json.dumps(row) + "\n")
                turns = row["conversations"]
                counts[split]["conversations"] += 1
                counts[split]["answers"] += len(turns) // 2
                counts[split]["characters"] += sum(len(turn["value"]) for turn in turns)
    except OSError as error:
        raise UserError(f"cannot write the corpus to {output}: {error.strerror or error}") from None
    return {"output": str(output), "python": platform.python_version(), **counts}


def held_out(module: str) -> bool:
    """Whether a module belongs to the evaluation split. A test module goes where the module goes that it tests.

    `test.` is taken out wherever it stands, not as a prefix only: this spreads the few helpers below `test.libregrtest` over
    both splits, and every published held-out figure is of exactly this split.
    """
    subject = module.replace("test.test_", "").replace("test.", "") if module.startswith("test.") else module
    fingerprint = hashlib.sha256(subject.split(".")[0].encode()).hexdigest()
    return int(fingerprint, 16) % HELD_OUT == 0


def module_of(conversation_id: str) -> str:
    """The module that a conversation, or a prompt taken from one, comes from."""
    return conversation_id.split(":")[0]


def conversations(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(module, ShareGPT row) of everything below `root`, in an order that does not depend on the file system."""
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    for path in sorted((path for path in files if not SKIPPED & set(path.parts)), key=lambda path: path.parts):
        try:
            source = (root / path).read_text(encoding="utf-8")
            with warnings.catch_warnings(action="ignore"):  # the library's tests are full of doubtful escapes
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # files in other encodings, and deliberately broken ones
            continue
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for name, turns in _groups(module, tree, source.split("\n")):
            for start, stop in _cuts(turns):
                yield module, {"id": f"{module}:{name}:{start // 2}", "conversations": turns[start:stop]}


def _groups(module: str, tree: ast.Module, lines: Sequence[str]) -> Iterator[tuple[str, list[Turn]]]:
    """(class name or "", turns): the module's own functions first, then each class in the order of the source."""
    yield "", _turns(tree.body, f"in module `{module}`", lines)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield node.name, _turns(node.body, f"of class `{node.name}({bases})` in `{module}`", lines)


def _turns(body: Sequence[ast.stmt], place: str, lines: Sequence[str]) -> list[Turn]:
    """Question, answer, question, answer, ... for the functions of `body` that are neither trivial nor long."""
    turns = []
    for node in body:
        if isinstance(node, Function):
            answer = _answer(node, lines)
            if answer.count("\n") + 1 in LINES and len(answer) < CHARACTERS:
                turns += [{"from": "human", "value": _question(node, place)}, {"from": "gpt", "value": answer}]
    return turns


def _question(function: Function, place: str) -> str:
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    request = f"Write `{keyword} {function.name}({ast.unparse(function.args)})` {place}."
    docstring = ast.get_docstring(function)
    return f"{request}\n{docstring.strip()[:DOCSTRING]}" if docstring else request


def _answer(function: Function, lines: Sequence[str]) -> str:
    """The source of a function with its decorators and, unless it is all there is, without its docstring."""
    start = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)]) - 1
    source = list(lines[start : function.end_lineno])
    docstring = function.body[0]
    if ast.get_docstring(function, clean=False) is not None and len(function.body) > 1:
        assert docstring.end_lineno is not None
        first, last = docstring.lineno - 1 - start, docstring.end_lineno - start
        if first > 0:  # on the line of the signature it cannot be cut out by lines
            del source[first:last]
    return textwrap.dedent("\n".join(source)).strip("\n")


def _cuts(turns: Sequence[Turn]) -> Iterator[tuple[int, int]]:
    """Cut a long conversation into ranges of turns, each of one question and answer at least."""
    start, length = 0, 0
    for i in range(0, len(turns), 2):
        if length >= CONVERSATION:
            yield start, i
            start, length = i, 0
        length += len(turns[i]["value"]) + len(turns[i + 1]["value"])
    if turns:
        yield start, len(turns)
