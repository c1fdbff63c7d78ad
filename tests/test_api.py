"""The library's front door and transformers' `custom_generate`, on the built-in model in fp32 and on prompts in memory."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    TextStreamer,
)

import understudy
from understudy.core.errors import UserError
from understudy.decoding.engine import decode

PROMPTS = [
    "Write `def add(a, b)` in module `operator`.\nReturn a + b.",
    "Write `def clear(self)` of class `Cache()` in `m`.",
]
DRAFTERS = ["none", "prompt-lookup", "early-exit,exit_layer=4,steps=3,threshold=0.2"]


@pytest.fixture(scope="module")
def target():
    return understudy.load(drafter="none", dtype="float32").target


def inputs(target, texts):
    tokenizer = target.tokenizer
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": text}] for text in texts]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_generate_equals_the_models_own_greedy_answer(target, drafter):
    engine = understudy.load(target, drafter)
    for text in PROMPTS:
        batch = inputs(target, [text])
        expected = target.model.generate(**batch, max_new_tokens=40, do_sample=False)[0, batch["input_ids"].shape[1] :]
        answer = understudy.generate(engine, text, max_new_tokens=40)
        assert answer.tokens == expected.tolist()
        assert answer.text == target.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.stats.tokens + 1 == len(answer.tokens)
        assert [t for c in understudy.stream(engine, text, max_new_tokens=40) for t in c.committed] == answer.tokens


def test_prompts_may_be_text_messages_or_ids(target):
    engine = understudy.load(target, "prompt-lookup")
    ids = engine.ids(PROMPTS[0])
    assert ids[0] == target.tokenizer.bos_token_id
    assert ids[1] != target.tokenizer.bos_token_id
    messages = [{"role": "user", "content": PROMPTS[0]}]
    answers = [understudy.generate(engine, p, max_new_tokens=12).tokens for p in (PROMPTS[0], messages, ids)]
    assert answers[0] == answers[1] == answers[2]


def test_samples_from_one_prefill_differ_and_repeat_with_the_seed(target):
    engine = understudy.load(target, "prompt-lookup")
    options = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 0}
    first = understudy.generate(engine, PROMPTS[0], n=3, seed=5, **options)
    again = understudy.generate(engine, PROMPTS[0], n=3, seed=5, **options)
    assert [g.tokens for g in first] == [g.tokens for g in again]
    assert len({tuple(g.tokens) for g in first}) == 3


def test_stop_strings_end_text_and_tokens(target):
    engine = understudy.load(target, "prompt-lookup")
    whole = understudy.generate(engine, PROMPTS[0], max_new_tokens=60)
    cut = understudy.generate(engine, PROMPTS[0], max_new_tokens=60, stop=["(a, b"])
    assert cut.finished == "stop"
    assert cut.text == whole.text[: whole.text.index("(a, b")]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert "(a, b" in target.tokenizer.decode(cut.tokens)
    assert "(a, b" not in target.tokenizer.decode(cut.tokens[:-1])


def test_adaptive_draft_length_changes_the_work_and_not_the_text(target):
    engine = understudy.load(target, "null")
    fixed = understudy.generate(engine, PROMPTS[0], max_new_tokens=40)
    adaptive = understudy.generate(engine, PROMPTS[0], max_new_tokens=40, adaptive=True)
    assert adaptive.tokens == fixed.tokens
    assert adaptive.stats.drafted < fixed.stats.drafted


@pytest.mark.parametrize("drafter", ["null", "prompt-lookup", "early-exit,exit_layer=8,threshold=0"])
def test_with_one_seed_every_drafter_samples_what_plain_decoding_samples(target, drafter):
    options = {"max_new_tokens": 48, "temperature": 0.9, "top_p": 0.95}
    engines = [understudy.load(target, name) for name in ("none", drafter)]
    outputs = set()
    for seed in range(4):
        plain, drafted = (understudy.generate(e, PROMPTS[0], seed=seed, **options) for e in engines)
        assert plain.tokens == drafted.tokens
        assert drafted.stats.rejected > 10
        outputs.add(tuple(plain.tokens))
    assert len(outputs) == 4


def test_the_generation_config_sets_stops_and_lengths_that_are_not_given(target, monkeypatch):
    config = copy.deepcopy(target.model.generation_config)
    config.stop_strings, config.max_new_tokens = ["(a, b"], 7
    monkeypatch.setattr(target.model, "generation_config", config)
    engine = understudy.load(target, "none")
    assert "(a, b" not in understudy.generate(engine, PROMPTS[0], max_new_tokens=40).text
    assert len(understudy.generate(engine, PROMPTS[1]).tokens) == 7


def test_one_stop_string_may_be_given_as_text(target):
    engine = understudy.load(target, "none")
    one, listed = (understudy.generate(engine, PROMPTS[0], max_new_tokens=9, stop=s) for s in ("add", ["add"]))
    assert one.tokens == listed.tokens
    assert one.text == "def "


def test_adaptive_never_drafts_more_than_it_may(target):
    for drafter, most in (("null,steps=1", 1), ("prompt-lookup,steps=0", 0)):
        engine = understudy.load(target, drafter)
        cycles = list(understudy.stream(engine, PROMPTS[0], max_new_tokens=24, adaptive=True))
        assert max(len(c.drafted) for c in cycles) == most


def test_an_exception_in_the_last_cycle_is_undone(target, monkeypatch):
    engine = understudy.load(target, "prompt-lookup")
    whole = understudy.generate(engine, PROMPTS[0], max_new_tokens=8, repetition_penalty=1.3).tokens
    sequence = engine.sequence(max_new_tokens=8, repetition_penalty=1.3)
    sequence.prefill(engine.ids(PROMPTS[0]))
    observe, failed = sequence.draft.observe, []

    def failing(commit):
        if sequence.finished and not failed:
            failed.append(True)
            raise KeyboardInterrupt
        observe(commit)

    sequence.draft.observe = failing
    with pytest.raises(KeyboardInterrupt):
        list(decode(sequence))
    list(decode(sequence))
    assert failed
    assert sequence.output == whole


def test_unknown_options_and_empty_prompts_are_refused(target):
    engine = understudy.load(target, "none")
    with pytest.raises(UserError, match="unknown option 'max_tokenz'"):
        understudy.generate(engine, "x", max_tokenz=3)
    for prompt in ("", "  ", []):
        with pytest.raises(UserError, match="the prompt is empty"):
            understudy.generate(engine, prompt)
    for prompt in ([999999], [{"role": "user"}], ["a", "b"]):
        with pytest.raises(UserError, match=r"not in the vocabulary|role and content"):
            understudy.generate(engine, prompt)
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 2}, "n > 1 needs a temperature"),
        ({"draft_sampling": "sample"}, "needs a temperature"),
        ({"stop": [""]}, "must not be empty"),
    ):
        with pytest.raises(UserError, match=message):
            understudy.generate(engine, PROMPTS[0], **options)
    with pytest.raises(UserError, match="dtype goes with a name"):
        understudy.load(target, dtype="bfloat16")
    with pytest.raises(UserError, match="a loaded model stays as it is"):
        understudy.load(target.model, device="cpu")
    with pytest.raises(UserError, match="context is 2048"):
        understudy.generate(engine, [5] * 2048)


def test_out_of_memory_says_what_would_fit(target, monkeypatch):
    engine = understudy.load(target, "none")

    def fail(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("understudy.target.cache.KVCache.reserve", fail)
    with pytest.raises(UserError, match=r"KiB per token.* tokens fit .*shorten the prompt"):
        understudy.generate(engine, "x")


def test_out_of_memory_while_loading_says_how_much_there_is(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(UserError, match=r"weights take 0\.0 GiB as saved, \d+\.\d GiB are free on cpu; try"):
        understudy.load()


class TestCustomGenerate:
    @pytest.mark.parametrize("drafter", DRAFTERS)
    def test_a_left_padded_batch_equals_generate(self, target, drafter):
        batch = inputs(target, PROMPTS)
        assert (batch["attention_mask"] == 0).any()
        plain = target.model.generate(**batch, max_new_tokens=40, do_sample=False)
        ours = target.model.generate(
            **batch, max_new_tokens=40, do_sample=False, custom_generate=understudy.custom_generate(drafter)
        )
        assert torch.equal(plain, ours)

    def test_streamers_see_what_generate_would_show(self, target, capsys):
        batch = inputs(target, PROMPTS[:1])
        shown = []
        for extra in ({}, {"custom_generate": understudy.custom_generate("prompt-lookup")}):
            streamer = TextStreamer(target.tokenizer, skip_prompt=True)
            target.model.generate(**batch, max_new_tokens=40, do_sample=False, streamer=streamer, **extra)
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1] != ""

    def test_generation_config_is_applied(self, target):
        batch = inputs(target, PROMPTS[:1])
        options = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": 1.4, "min_new_tokens": 30}
        plain = target.model.generate(**batch, **options)
        ours = target.model.generate(**batch, **options, custom_generate=understudy.custom_generate("prompt-lookup"))
        assert torch.equal(plain, ours)
        assert plain.shape[1] - batch["input_ids"].shape[1] >= 30

    def test_stop_strings_need_the_tokenizer_and_cut_alike(self, target):
        batch = inputs(target, PROMPTS[:1])
        stops = [StopStringCriteria(target.tokenizer, ["(a, b"])]
        options = {"max_new_tokens": 40, "do_sample": False, "stopping_criteria": stops}
        plain = target.model.generate(**batch, **options)
        with_tokenizer = understudy.custom_generate("prompt-lookup", tokenizer=target.tokenizer)
        assert torch.equal(plain, target.model.generate(**batch, **options, custom_generate=with_tokenizer))
        with pytest.raises(UserError, match="tokenizer=tokenizer"):
            target.model.generate(**batch, **options, custom_generate=understudy.custom_generate("none"))

    def test_sampling_returns_several_sequences(self, target):
        batch = inputs(target, PROMPTS[:1])
        ours = target.model.generate(
            **batch,
            max_new_tokens=12,
            do_sample=True,
            num_return_sequences=3,
            return_dict_in_generate=True,
            custom_generate=understudy.custom_generate("prompt-lookup"),
        )
        assert ours.sequences.shape[0] == 3
        assert len({tuple(row) for row in ours.sequences.tolist()}) > 1
        method = understudy.custom_generate("none")
        again = [
            target.model.generate(**batch, max_new_tokens=12, do_sample=True, custom_generate=method) for _ in "ab"
        ]
        assert again[0].tolist() != again[1].tolist()

    def test_models_are_let_go(self):
        engine = understudy.load(drafter="none", dtype="float32")
        batch = inputs(engine.target, PROMPTS[:1])
        engine.target.model.generate(**batch, max_new_tokens=2, custom_generate=understudy.custom_generate("none"))
        model = weakref.ref(engine.target.model)
        del engine
        gc.collect()
        assert model() is None

    def test_what_cannot_be_honoured_is_refused(self, target):
        class Shout(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return scores

        class Never(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        batch = inputs(target, PROMPTS[:1])
        ours = understudy.custom_generate("none")
        for options, message in (
            ({"num_beams": 2}, "num_beams=2 is not supported"),
            ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3 is not supported"),
            ({"logits_processor": [Shout()]}, "logits processor Shout is not supported"),
            (
                {"repetition_penalty": 1.01, "logits_processor": [RepetitionPenaltyLogitsProcessor(2.5)]},
                "logits processor RepetitionPenaltyLogitsProcessor is not supported",
            ),
            ({"return_dict_in_generate": True, "output_scores": True}, "output_scores is not supported"),
            ({"stopping_criteria": [Never()]}, "stopping criterion Never is not supported"),
        ):
            with pytest.raises(UserError, match=message):
                target.model.generate(**batch, max_new_tokens=4, custom_generate=ours, **options)
