"""A stream of prompts through the online learner: the text stays the target's, the head learns, nothing piles up."""

from __future__ import annotations

import pytest
import torch

import tiny
from training import words
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.data.conversations import Skipped
from understudy.drafting.learning import LearnOptions
from understudy.drafting.lora import lora_state_dict
from understudy.training.online import OnlineLearner
from understudy.training.streaming import read_prompts, stream, summed

QUICK = LearnOptions(
    dvi_online=True, dvi_batch_size=4, dvi_update_every=2, max_online_train_ms=0, dvi_lr=1e-2, dvi_guard=0
)


@pytest.fixture(scope="module")
def target():
    return words.target()


def test_texts_are_plain_decodings_while_the_head_learns(target):
    drafter, prompts = words.drafter(target, 0), words.prompts(6)
    before, outputs, records = lora_state_dict(drafter), [], []
    learner = OnlineLearner(drafter, QUICK)

    def keep(record, output) -> None:
        records.append(record)
        outputs.append(output)

    result = stream(target, drafter, prompts, learner, max_new_tokens=16, on_prompt=keep)
    assert outputs == [tiny.reference("llama", prompt, 16) for prompt in prompts]
    assert learner.trainer.ran > 5
    assert any(not torch.equal(p, before[name]) for name, p in lora_state_dict(drafter).items())
    assert result.records == records and [record.index for record in records] == list(range(6))
    assert learner.global_step == result.total.cycles


def test_without_a_learner_nothing_is_learned_and_nothing_else_changes(target):
    drafter, prompts = words.drafter(target, 0), words.prompts(3)
    before = lora_state_dict(drafter)
    result = stream(target, drafter, prompts, max_new_tokens=12)
    assert all(torch.equal(p, before[name]) for name, p in lora_state_dict(drafter).items())
    assert result.total.learning_s == result.share_learning == 0.0


class Watch:
    """Counts what the records should say, cycle by cycle."""

    needs = Needs()

    def __init__(self) -> None:
        self.turns: list[list] = []

    def on_cycle(self, cycle) -> None:
        if cycle.index == 0:
            self.turns.append([])
        else:
            self.turns[-1].append(cycle)


def test_records_count_what_happened(target):
    watch, prompts = Watch(), words.prompts(3)
    result = stream(target, words.drafter(target, 0), prompts, listeners=[watch], max_new_tokens=12)
    for record, prompt, cycles in zip(result.records, prompts, watch.turns, strict=True):
        assert record.prompt_tokens == len(prompt) and record.tokens == 11 and record.cycles == len(cycles)
        assert record.drafted == sum(len(c.drafted) for c in cycles)
        assert record.accepted == sum(c.accepted for c in cycles)
        opened = [c for c in cycles if c.drafted]
        assert record.acc_1 == sum(c.accepted >= 1 for c in opened) / len(opened)
        assert record.tau == record.tokens / len(cycles)
        assert record.tokens_per_s == record.tokens / record.decode_s
    total = summed(result.records)
    for name in ("tokens", "cycles", "accepted", "decode_s"):
        assert getattr(result.total, name) == pytest.approx(getattr(total, name))
    assert result.total.index == total.index == 3
    assert result.total.tau == pytest.approx(result.stats.tau)


def test_learning_is_timed_apart_from_other_listeners(target):
    import time

    class Sleeps:
        needs = Needs()

        def on_cycle(self, cycle) -> None:
            time.sleep(0.05)

    drafter, prompts = words.drafter(target, 0), words.prompts(1)
    learning = stream(target, drafter, prompts, Sleeps(), max_new_tokens=6).total
    assert (
        learning.learning_s >= 0.05 * learning.cycles and learning.tokens_per_s < learning.tokens / learning.learning_s
    )
    assert stream(target, drafter, prompts, listeners=[Sleeps()], max_new_tokens=6).total.learning_s == 0.0


def test_prompts_are_taken_one_by_one_and_records_need_not_be_kept(target):
    seen: list[str] = []

    def prompts():
        for i, prompt in enumerate(words.prompts(4)):
            seen.append(f"take {i}")
            yield prompt

    result = stream(
        target, words.drafter(target, 0), prompts(), max_new_tokens=4, keep=False,
        on_prompt=lambda record, _: seen.append(f"done {record.index}"),
    )  # fmt: skip
    assert seen == [f"{what} {i}" for i in range(4) for what in ("take", "done")]
    assert result.records == [] and result.total.index == 4


def test_a_stream_at_temperature_1_has_the_text_of_plain_decoding(target):
    from understudy.drafting.spec import build

    texts = []
    for drafter in (build("none", target), words.drafter(target, 0)):
        outputs: list[list[int]] = []
        stream(
            target, drafter, words.prompts(3), max_new_tokens=10, temperature=1.0, seed=4,
            on_prompt=lambda _, output, outputs=outputs: outputs.append(output),
        )  # fmt: skip
        texts.append(outputs)
    assert texts[0] == texts[1] and texts[0] != [tiny.reference("llama", p, 10) for p in words.prompts(3)]


def test_an_empty_stream_is_an_error(target):
    with pytest.raises(UserError, match="no prompt to decode"):
        stream(target, words.drafter(target, 0), [])


def test_bad_lines_are_counted_with_number_and_reason(target, tmp_path, monkeypatch):
    rows = tmp_path / "chat.jsonl"
    long = " ".join(["word"] * 12)
    rows.write_text(
        '{"conversations": [{"from": "system", "value": "be brief"}, {"from": "human", "value": "one two"},'
        ' {"from": "gpt", "value": "three"}, {"from": "human", "value": "four"}]}\n'
        "{broken\n\n"
        f'{{"messages": [{{"role": "user", "content": "{long}"}}]}}\n'
        '{"prompt": "last one"}\n'
    )
    monkeypatch.setitem(target.__dict__, "context", 12)
    skipped = Skipped()
    found = list(read_prompts(rows, target, skipped))
    ids = words.Words()
    assert found == [ids("be brief\none two")["input_ids"], ids("last one")["input_ids"]]
    assert skipped.count == 2
    assert skipped.first[0].startswith(f"{rows}:2: not JSON")
    assert "chat:4" in skipped.first[1] and "the prompt has 12 tokens, the model's context is 12" in skipped.first[1]
