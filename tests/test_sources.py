"""Every command that docs/sources.md says works is run as written, with only the model and the paths replaced."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from understudy import cli

PAGE = Path(__file__).parents[1] / "docs" / "sources.md"
COMMAND = re.compile(r"`understudy ([^`]+)`")


def working_commands() -> list[str]:
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    found = []
    for row in rows:
        if len(row) >= 5 and row[3].strip() == "works" and (match := COMMAND.search(row[2])):
            found.append(match[1])
    return found


def test_the_page_names_working_commands():
    assert len(working_commands()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("command", working_commands())
def test_a_mapped_command_runs(command, tmp_path, capsys):
    args = shlex.split(command.replace("runs/", f"{tmp_path}/runs/"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}\n')
    args = [{"M": "pocket", "FILE": str(rows)}.get(arg, arg) for arg in args]
    if args[0] == "bench" and "--num-samples" not in args:
        args += ["--num-prompts", "2"]  # how many prompts is left open by the documents
    assert cli.main(args) == 0, capsys.readouterr().err
