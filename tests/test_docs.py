"""The code in README and CONTRIBUTING runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tiny
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_drafter_is_a_drafter():
    names: dict[str, object] = {"__name__": "bigram"}
    exec(compile(blocks("CONTRIBUTING.md")[0], "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    (spec,) = names["SPECS"]
    target, prompt = tiny.target("qwen3"), tiny.prompt()
    (drafter,) = spec.tiny(target)
    sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=32), stop=StopRule())
    sequence.prefill(prompt)
    cycles = list(decode(sequence))
    assert sequence.output == tiny.reference("qwen3", prompt, 32)
    assert sum(len(c.drafted) for c in cycles) > 0


@pytest.mark.slow
def test_the_readmes_library_example_runs(capsys):
    exec(compile(blocks("README.md")[0], "README.md", "exec", dont_inherit=True), {})
    assert "def add(a, b)" in capsys.readouterr().out
