"""Many texts side by side say what each says alone: every family, ragged lengths, slots that are taken again, both ways of attention."""

from __future__ import annotations

import pytest
import torch

import tiny
from distill.chat import END, STOPS, Chat, style, talk
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.distill.answers import Writer
from understudy.distill.dialogue import Dialogue
from understudy.distill.slots import Slots
from understudy.drafting.spec import build
from understudy.target.params import SamplingParams
from understudy.target.target import Target

FAMILIES = (*tiny.CONTRACT, "gpt-oss", "mistral")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_row_is_that_of_its_text_alone(family, padded):
    """Logits after each token, against the model's own pass over the whole text."""
    model = tiny.model(family)
    slots = Slots(tiny.target(family), 3, 40, padded)
    texts = [tiny.prompt(length, seed=length) for length in (3, 17, 9)]

    def same(logits, text):
        torch.testing.assert_close(logits, tiny.logits(model, text)[-1], atol=2e-4, rtol=2e-4)

    for i, text in enumerate(texts):
        same(slots.prefill(i, text)[0], text)
    for at in ([0, 1, 2], [0, 1, 2], [2, 0], [1]):
        tokens = [5 + 7 * len(texts[i]) % 80 for i in at]
        for i, token, logits in zip(at, tokens, slots.step(at, tokens), strict=True):
            texts[i].append(token)
            same(logits, texts[i])
    texts[1] = texts[1][:12] + tiny.prompt(8, seed=5)  # goes back behind the prompt, and on from there
    same(slots.prefill(1, texts[1])[0], texts[1])
    same(slots.prefill(2, texts[2])[0], texts[2])  # the same once more: its last row is run again
    for i, logits in enumerate(slots.step([0, 1, 2], [30, 31, 32])):
        same(logits, [*texts[i], 30 + i])


def alone(target: Target, prompt: list[int], length: int, law: SamplingParams) -> list[int]:
    """Our engine, one text at a time, without drafts."""
    params = DecodeParams(max_new_tokens=length)
    sequence = DecodeSequence(target, build("none", target), params, law, StopRule(STOPS))
    sequence.prefill(prompt)
    for _ in decode(sequence):
        pass
    return sequence.output


def spoken(writer: Writer, conversations) -> list[dict]:
    done = list(writer.answer(Dialogue(each, i, writer.style) for i, each in enumerate(conversations)))
    assert len(done) == len(conversations)
    return [row for dialogue in sorted(done, key=lambda each: each.number) for row in dialogue.rows()]


def conversations(count: int):
    """One to three turns each, of ragged lengths."""
    return [
        talk(
            *(" ".join(map(str, tiny.prompt(2 + (5 * i + turn) % 11, seed=9 * i + turn))) for turn in range(1 + i % 3))
        )
        for i in range(count)
    ]


LAWS = {
    "greedy": SamplingParams(),
    "penalised": SamplingParams(repetition_penalty=1.3, min_tokens=3),
    "biased": SamplingParams(logit_bias={40: 0.5, 41: -2.0, END: -9.0}),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_batched_answers_are_those_of_one_text_after_another(family, law):
    target = tiny.target(family)
    writer = Writer(target, law, style(stops=STOPS), max_new_tokens=14, batch_size=3)
    rows = spoken(writer, conversations(8))
    ended = [ending for row in rows for ending in row["finished"]]
    assert "stop" in ended, "slots are taken again"
    answers = 0
    for row in rows:
        ids, mask = row["input_ids"], [*row["loss_mask"], 0]
        for start in (i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]):
            end = mask.index(0, start)
            assert ids[start:end] == alone(target, ids[:start], 14, law)
            answers += 1
    assert answers == len(ended) and answers >= 8
    assert writer.written >= sum(sum(row["loss_mask"]) for row in rows)


def test_sampled_answers_do_not_depend_on_who_shares_the_batch():
    law = SamplingParams(temperature=1.0, seed=5)
    target, talks = tiny.target("llama"), conversations(7)
    wide, narrow = (spoken(Writer(target, law, style(), 10, size), talks) for size in (5, 1))
    assert wide == narrow
    other = spoken(Writer(target, law.model_copy(update={"seed": 6}), style(), 10, 5), talks)
    assert other != wide
    cold = SamplingParams(temperature=1.0, top_k=1)
    assert spoken(Writer(target, cold, style(), 10, 5), talks) == spoken(
        Writer(target, SamplingParams(), style(), 10, 5), talks
    )


def test_sampled_tokens_follow_the_law():
    """The first token of many one-turn conversations with the same words: shares as in the model's own law."""
    target, law = tiny.target("llama"), SamplingParams(temperature=2.0, top_k=5)
    same = [talk("10 11 12")] * 400
    rows = spoken(Writer(target, law, style(), max_new_tokens=1, batch_size=100), same)
    first = torch.tensor([row["input_ids"][-1] for row in rows])
    prompt = Chat().apply_chat_template(
        [{"role": "user", "content": "10 11 12"}], add_generation_prompt=True, return_dict=True
    )
    kept = (tiny.logits(tiny.model("llama"), prompt["input_ids"])[-1] / 2.0).topk(5)
    expected = kept.values.softmax(-1)
    for token, share in zip(kept.indices.tolist(), expected.tolist(), strict=True):
        assert (
            abs((first == token).float().mean().item() - share) < 4 * (share * (1 - share) / len(first)) ** 0.5 + 1e-3
        )


def test_an_answer_that_can_only_loop_is_not_written_to_its_end():
    target = tiny.target("llama")
    forced = SamplingParams(logit_bias={40: 1000.0})  # says 40 for ever
    writer = Writer(target, forced, style(most=0.5), max_new_tokens=100, batch_size=2)
    assert spoken(writer, [talk("10")]) == []
    assert 50 < writer.written < 60
    kept = Writer(target, forced, style(most=1.0), max_new_tokens=100, batch_size=2)
    assert len(spoken(kept, [talk("10")])) == 1 and kept.written == 100
