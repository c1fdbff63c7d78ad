"""The recipe that chooses the default prompts: its rules, and its batched answers beside those of one by one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from understudy.assets import pocket_path, prompts_path
from understudy.data.prompts import load_prompts, render

RECIPE = Path(__file__).parents[1] / "recipes" / "pocket" / "select_prompts.py"
END = 3


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("select_prompts", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_verdicts(recipe):
    fresh = list(range(10, 10 + 255))
    assert recipe.verdict([*fresh[:23], END], END) == "too short"
    assert recipe.verdict([*fresh[:24], END], END) == "kept"
    assert recipe.verdict([*fresh, END], END) == "kept"
    assert recipe.verdict([*fresh[:12], *fresh[:12], END], END) == "repeats itself"  # 9 of 21 4-grams
    assert recipe.verdict([*fresh, 9], END) == "does not end"
    assert recipe.verdict(fresh, END) is None
    assert recipe.verdict([7] * 79, END) is None  # 75 repeats: 75 / 252 is below 0.3
    assert recipe.verdict([7] * 80, END) == "loops"  # 76: even 255 tokens cannot dilute them


def test_a_question_is_asked_once(recipe, tmp_path):
    """Two codecs ask for the same methods: only the first is taken, and at most three questions of a conversation."""
    from transformers import AutoTokenizer

    def row(module):
        asked = [f"Write `def f{i}(self)` of class `Codec()` in `encodings.{module}`." for i in range(5)]
        turns = [{"from": who, "value": text} for q in asked for who, text in (("human", q), ("gpt", "pass"))]
        return json.dumps({"id": f"encodings.{module}:Codec:0", "conversations": turns}) + "\n"

    (tmp_path / "eval.jsonl").write_text(row("a") + row("b") + row("c"))
    found = recipe.candidates(tmp_path, AutoTokenizer.from_pretrained(pocket_path()), seed=0)
    assert [sum(c.id.startswith(f"encodings.{m}:") for c in found) for m in "abc"] == [3, 2, 0]
    assert len({c.messages[-1].content.split("`")[1] for c in found}) == 5
    assert all(c.id.endswith(f"#{c.messages[-1].content[12]}") for c in found)
    again = recipe.candidates(tmp_path, AutoTokenizer.from_pretrained(pocket_path()), seed=0)
    assert found == again


@pytest.mark.slow
def test_a_batch_answers_as_one_by_one(recipe):
    """Left padding and rows that leave early change nothing: each answer is what `generate` writes for that prompt alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    model = AutoModelForCausalLM.from_pretrained(pocket_path(), dtype=torch.float32)
    prompts = sorted(load_prompts(prompts_path(), 16), key=lambda p: len(render(tokenizer, p.messages)))[:4]
    batch = [recipe.Candidate(p.id, p.messages, render(tokenizer, p.messages)) for p in prompts]
    found = recipe.answers(model, batch)
    assert len(set(map(len, found))) > 1
    for candidate, tokens in zip(batch, found, strict=True):
        assert recipe.verdict(tokens, END) == "kept"
        ids = torch.tensor([candidate.ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=256)
        assert tokens == out[0, ids.shape[1] :].tolist()
