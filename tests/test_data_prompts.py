"""Prompt sets: what is asked of a row, how it is rendered, and the set that ships."""

from __future__ import annotations

import json

import pytest

from understudy.assets import pocket_path, prompts_path
from understudy.core.errors import UserError
from understudy.data.conversations import Message
from understudy.data.prompts import Prompt, load_prompts, render, text_prompt
from understudy.data.stdlib import held_out, module_of


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pocket_path())


class Plain:
    """A tokenizer without a chat template: BOS, then one id per character."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [1, *map(ord, text)]}


def prompts_of(tmp_path, *rows, limit=None):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(path, limit)


def sharegpt(*turns):
    return {
        "id": "a",
        "conversations": [{"from": "human" if i % 2 == 0 else "gpt", "value": t} for i, t in enumerate(turns)],
    }


def test_the_last_user_turn_is_asked(tmp_path):
    asked = (Message("user", "1"), Message("assistant", "2"), Message("user", "3"))
    assert prompts_of(tmp_path, sharegpt("1", "2", "3", "4")) == [Prompt("a", asked)]
    assert prompts_of(tmp_path, sharegpt("1", "2", "3")) == [Prompt("a", asked)]


def test_later_turns_wait_for_the_answer(tmp_path):
    assert prompts_of(tmp_path, {"turns": ["1", "2"]}) == [Prompt("prompts:1", (Message("user", "1"),), ("2",))]


def test_limit_reads_no_further(tmp_path):
    assert len(prompts_of(tmp_path, {"prompt": "1"}, {"prompt": "2"}, "broken", limit=2)) == 2
    with pytest.raises(UserError, match=r"prompts\.jsonl:3: holds text"):
        prompts_of(tmp_path, {"prompt": "1"}, {"prompt": "2"}, "broken", limit=3)


def test_nothing_to_ask(tmp_path):
    with pytest.raises(UserError, match="holds no prompts"):
        prompts_of(tmp_path)
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: prompt is empty"):
        prompts_of(tmp_path, {"prompt": ""})
    with pytest.raises(UserError, match="the prompt is empty"):
        text_prompt(" \n")
    assert text_prompt("Hi").messages == (Message("user", "Hi"),)


def test_bos_once_and_ready_for_the_answer(tokenizer):
    messages = (Message("user", "Write `def f(a)`."), Message("assistant", "def f(a): ..."), Message("user", "Again."))
    ids = render(tokenizer, messages)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids).endswith("<|user|>\nAgain.<|end|>\n<|assistant|>\n")


def test_without_a_chat_template_the_text_is_as_it_stands():
    assert render(Plain(), (Message("user", "ab"),)) == [1, *b"ab"]
    assert render(Plain(), (Message("user", "a"), Message("assistant", "b"))) == [1, *b"a\nb"]


def test_a_template_that_refuses(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles must alternate"):
        render(tokenizer, (Message("user", "a"),))


def test_the_shipped_prompts_are_held_out(tokenizer):
    prompts = load_prompts(prompts_path())
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 200
    assert all(held_out(module_of(prompt.id)) for prompt in prompts)
    assert all(not prompt.turns for prompt in prompts)
    rendered = [render(tokenizer, prompt.messages) for prompt in prompts]
    # each question once, a module's name apart
    assert len({p.messages[-1].content.replace(module_of(p.id), "") for p in prompts}) == 200
    assert max(map(len, rendered)) <= 1200
    alone = sum(len(prompt.messages) == 1 for prompt in prompts)
    assert 60 <= alone <= 140
    assert 3 <= sum(len(prompt.messages) == 1 for prompt in prompts[:10]) <= 7  # the first rows are a fair sample
