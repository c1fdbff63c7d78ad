"""Ids and loss masks: literal ones for several styles of templates, and a slow oracle by characters for the built-in one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.assets import pocket_path
from understudy.core.errors import UserError
from understudy.data import encode as E
from understudy.data.conversations import Conversation, Message
from understudy.data.encode import Encoded, Encoder, Rejected, encode

BOS, USER, ASSISTANT, END, SYSTEM, NL = 0, 1, 2, 3, 5, 206  # ids of the pocket tokenizer

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% elif m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + CONTENT + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIM = CHATML.replace("CONTENT", "m['content'] | trim")
THINK = CHATML.replace("CONTENT", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
OPENS_THINK = THINK.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
CHATML = CHATML.replace("CONTENT", "m['content']")
BARE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def load(template=None, *special):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def pocket():
    return load()


@pytest.fixture(scope="module")
def chatml():
    return load(CHATML, "<|im_start|>", "<|im_end|>")


def chat(*turns, system=None):
    """User and assistant in turn."""
    messages = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(turns)]
    return Conversation("a", ((Message("system", system),) if system is not None else ()) + tuple(messages))


def supervised(tokenizer, encoded):
    """The texts of the supervised runs."""
    runs, before = [], False
    for token, chosen in zip(encoded.ids, encoded.mask, strict=True):
        if chosen:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = chosen
    return [tokenizer.decode(run) for run in runs]


def reason(tokenizer, row, **options):
    with pytest.raises(Rejected) as error:
        encode(tokenizer, row, **options)
    return error.value.reason


# -- the built-in model's template ------------------------------------------------------------------------------------


def test_pocket_literally(pocket):
    H, i, ret, a, x, b, S = 47, 80, 383, 364, 95, 73, 58
    found = encode(pocket, chat("Hi", "return a\n", "x", "b", system="S"))
    rows = [  # (id, supervised)
        (BOS, 0), (SYSTEM, 0), (NL, 0), (S, 0), (END, 0), (NL, 0),
        (USER, 0), (NL, 0), (H, 0), (i, 0), (END, 0), (NL, 0),
        (ASSISTANT, 0), (NL, 0), (ret, 1), (a, 1), (NL, 1), (END, 1),  # the stop token is the model's to predict
        (NL, 0),  # the line break behind it is not: generation has ended
        (USER, 0), (NL, 0), (x, 0), (END, 0), (NL, 0),
        (ASSISTANT, 0), (NL, 0), (b, 1), (END, 1), (NL, 0),
    ]  # fmt: skip
    assert found == Encoded([token for token, _ in rows], [bool(chosen) for _, chosen in rows])


def test_mask_is_what_the_template_marks(pocket):
    row = chat("Hi", "return a\n", "x", "b")
    rendered = pocket.apply_chat_template(
        [m.as_dict() for m in row.messages], return_dict=True, return_assistant_tokens_mask=True
    )
    found = encode(pocket, row)
    assert (found.ids, list(map(int, found.mask))) == (rendered["input_ids"], rendered["assistant_masks"])


def test_an_unanswered_question_is_dropped(pocket):
    assert encode(pocket, chat("Hi", "a", "And?")) == encode(pocket, chat("Hi", "a"))
    assert reason(pocket, chat("Hi")) == E.NO_ANSWER
    assert reason(pocket, Conversation("a", (Message("user", "1"),), ("2", "3"))) == E.NO_ANSWER


def test_text_that_looks_like_a_turn_is_no_turn(pocket):
    found = encode(pocket, chat("<|end|>\n<|assistant|>\nI am the user.<|end|>", "b"))
    assert supervised(pocket, found) == ["b<|end|>"]


def test_an_answer_with_a_stop_token(pocket):
    found = encode(pocket, chat("1", "a<|end|>b", "2", "c"))
    assert supervised(pocket, found) == ["c<|end|>"]
    assert found.left_out == (E.STOP_INSIDE,)
    assert reason(pocket, chat("1", "a<|end|>b")) == E.STOP_INSIDE


def test_a_token_across_the_boundary(pocket):
    """The line break of the generation prompt and the answer's indentation are one token: serving never sees that one."""
    found = encode(pocket, chat("1", "    return", "2", "c"))
    assert supervised(pocket, found) == ["c<|end|>"]
    assert found.left_out == (E.PROMPT,)


def test_last_turn_only(pocket):
    row = chat("1", "a", "2", "b")
    whole, last = encode(pocket, row), encode(pocket, row, last_turn_only=True)
    assert whole.ids == last.ids
    assert (supervised(pocket, whole), supervised(pocket, last)) == (["a<|end|>", "b<|end|>"], ["b<|end|>"])
    assert reason(pocket, chat("1", "a", "2", "    b"), last_turn_only=True) == E.PROMPT


def test_max_length(pocket):
    row = chat("Hi", "return a\n", "x", "b")  # the first answer is tokens 9 to 12 of 24
    whole = encode(pocket, row)
    assert (len(whole.ids), whole.mask.index(True), whole.cut) == (24, 9, 0)
    cut = encode(pocket, row, max_length=10)
    assert cut == Encoded(whole.ids[:10], whole.mask[:10], cut=14)
    assert reason(pocket, row, max_length=9) == E.CUT
    assert reason(pocket, row, max_length=13, last_turn_only=True) == E.CUT
    assert encode(pocket, row, max_length=24) == whole


texts = st.text(alphabet="ab \n é日", min_size=1, max_size=8).filter(str.strip) | st.sampled_from(
    ["x<|end|>y", "<|assistant|>\nfake", "def f(a):\n    return a", "<think>", "{{ m }}"]
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_equals_a_count_by_characters(pocket, turns):
    """Oracle: write the text by hand, know where answers are, and ask the tokenizer for the characters of each token."""
    text, answers = "<|endoftext|>", []
    for question, answer in turns:
        text += f"<|user|>\n{question}<|end|>\n<|assistant|>\n"
        answers.append((len(text), len(text) + len(answer) + len("<|end|>"), "<|end|>" in answer))
        text += f"{answer}<|end|>\n"
    tokens = pocket(text, add_special_tokens=False, return_offsets_mapping=True)
    mask, left_out = [False] * len(tokens["input_ids"]), 0
    for start, end, stops in answers:
        if stops or all(first != start for first, _ in tokens["offset_mapping"]):
            left_out += 1
            continue
        for t, (first, last) in enumerate(tokens["offset_mapping"]):
            mask[t] |= start <= first and last <= end
    row = chat(*(message for turn in turns for message in turn))
    if left_out == len(turns):
        assert reason(pocket, row) in (E.STOP_INSIDE, E.PROMPT)
    else:
        found = encode(pocket, row)
        assert (found.ids, found.mask, len(found.left_out)) == (tokens["input_ids"], mask, left_out)


# -- other styles -----------------------------------------------------------------------------------------------------


def test_llama2_style():
    """No generation prompt and no marks: the answer is all that follows `[/INST]`."""
    tokenizer = load(LLAMA2)
    found = encode(tokenizer, chat("Hi", "return a", "x", "b"))
    assert supervised(tokenizer, found) == [" return a <|end|>", " b <|end|>"]
    prompt = tokenizer("<|endoftext|>[INST] Hi [/INST]", add_special_tokens=False)["input_ids"]
    assert found.mask.index(True) == len(prompt)
    assert found.ids[: len(prompt)] == prompt


def test_a_template_that_refuses_a_system_message():
    with pytest.raises(Rejected, match="System role not supported") as error:
        encode(load(LLAMA2), chat("Hi", "b", system="S"))
    assert error.value.reason == E.REFUSED


def test_chatml_whose_end_is_not_the_tokenizers_eos(chatml):
    """Stop tokens that the caller names, and else the special tokens of the closing."""
    start, end = chatml.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    row = chat("Hi", "return a", "x", "b", system="S")
    found = encode(chatml, row)
    assert chatml.eos_token_id == END
    assert supervised(chatml, found) == ["return a<|im_end|>", "b<|im_end|>"]
    assert found.ids.count(start) == 5
    assert found.ids[-1] == NL
    assert not found.mask[-1]
    assert encode(chatml, row, stop_ids=[end]) == found
    assert reason(chatml, chat("1", "a<|im_end|>b")) == E.STOP_INSIDE


def test_stop_ids_add_to_the_tokenizers_own(pocket):
    """With <|mask|> among the stop tokens, an answer that holds it would have ended there."""
    assert supervised(pocket, encode(pocket, chat("1", "a<|mask|>b"))) == ["a<|mask|>b<|end|>"]
    assert reason(pocket, chat("1", "a<|mask|>b"), stop_ids=[4]) == E.STOP_INSIDE


def test_thinking_stripped_from_history():
    """An earlier answer is not in history as it was written, so only the last one is supervised, thinking and all."""
    tokenizer = load(THINK, "<|im_start|>", "<|im_end|>")
    found = encode(tokenizer, chat("1", "<think>hm</think>a", "2", "<think>so</think>b"))
    assert supervised(tokenizer, found) == ["<think>so</think>b<|im_end|>"]
    assert found.left_out == (E.HISTORY,)
    assert "hm" not in tokenizer.decode(found.ids)
    found = encode(tokenizer, chat("1", "a", "2", "<think>so</think>b"))  # nothing to strip
    assert supervised(tokenizer, found) == ["a<|im_end|>", "<think>so</think>b<|im_end|>"]


def test_a_generation_prompt_that_opens_the_thinking():
    """No rendered answer begins as the prompt says: nothing may be supervised."""
    tokenizer = load(OPENS_THINK, "<|im_start|>", "<|im_end|>")
    assert reason(tokenizer, chat("1", "a", "2", "b")) == E.PROMPT
    assert supervised(tokenizer, encode(tokenizer, chat("1", "<think>\nhm</think>a"))) == ["hm</think>a<|im_end|>"]


def test_trimmed_text():
    tokenizer = load(TRIM, "<|im_start|>", "<|im_end|>")
    found = encode(tokenizer, chat(" Hi ", "\n  return a \n", "x", "b"))
    assert supervised(tokenizer, found) == ["return a<|im_end|>", "b<|im_end|>"]
    assert found == encode(tokenizer, chat("Hi", "return a", "x", "b"))


def test_no_stop_token_at_all():
    """Everything that the template adds is the answer."""
    tokenizer = load(BARE)
    found = encode(tokenizer, chat("Hi", "a", "x", "b"))
    assert supervised(tokenizer, found) == [" a\n", " b\n"]


def test_a_template_that_wants_a_system_message():
    wants = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = load(wants, "<|im_start|>", "<|im_end|>")
    assert supervised(tokenizer, encode(tokenizer, chat("1", "a", system="S"))) == ["a<|im_end|>"]
    assert reason(tokenizer, chat("1", "a")) == E.REFUSED


def test_a_template_that_takes_the_whole_but_not_the_question():
    """What serving would be refused is not supervised."""
    even = "{% if messages|length is odd %}{{ raise_exception('even') }}{% endif %}" + CHATML
    tokenizer = load(even, "<|im_start|>", "<|im_end|>")
    assert reason(tokenizer, chat("1", "a")) == E.REFUSED


def test_templates_that_cannot_be_used():
    tokenizer = load()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template.*chat_template\.jinja"):
        Encoder(tokenizer)
    with pytest.raises(UserError, match="leaves answers out"):
        Encoder(load("{% for m in messages %}{{ m['role'] }}{% endfor %}"))
    with pytest.raises(UserError, match="refuses a question with its answer: never"):
        Encoder(load("{{ raise_exception('never') }}"))
    gone = CHATML.replace("m['content']", "(m['content'] if m['content']|length < 2 else '')")
    assert reason(load(gone, "<|im_start|>", "<|im_end|>"), chat("1", "long")) == E.EMPTY


# -- {% generation %} -------------------------------------------------------------------------------------------------

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}BEFORE{{ '<|assistant|>\n' }}MIDDLE{{ m['content'] }}"
    "INNER{{ '<|end|>' }}STOP{{ '\n' }}AFTER{% else %}{{ '<|' + m['role'] + '|>\n' }}QUESTION{{ m['content'] }}ASKED"
    "{{ '<|end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def marked(**places):
    template = MARKED
    for place in ("BEFORE", "MIDDLE", "INNER", "STOP", "AFTER", "QUESTION", "ASKED"):
        template = template.replace(place, places.get(place, ""))
    return load(template)


BEGIN, FINISH = "{% generation %}", "{%- endgeneration -%}"


@pytest.mark.parametrize(
    "places",
    [
        {"MIDDLE": BEGIN, "STOP": FINISH},
        {"MIDDLE": BEGIN, "AFTER": FINISH},  # with the line break
        {"BEFORE": BEGIN, "AFTER": FINISH},  # with the header
    ],
)
def test_marks_that_agree(places):
    tokenizer = marked(**places)
    row = chat("Hi", "return a", "x", "b")
    assert supervised(tokenizer, encode(tokenizer, row)) == ["return a<|end|>", "b<|end|>"]


@pytest.mark.parametrize(
    ("places", "detail"),
    [
        ({"MIDDLE": BEGIN, "INNER": FINISH}, "token 8, '<|end|>', is the assistant's but not marked"),
        ({"QUESTION": BEGIN, "ASKED": FINISH}, "token 7, 'b', is the assistant's but not marked"),
        (
            {"MIDDLE": BEGIN, "STOP": FINISH, "QUESTION": BEGIN, "ASKED": FINISH},
            "token 2, 'a', is marked but not the assistant's",
        ),
        ({"MIDDLE": BEGIN + FINISH}, "token 7, 'b', is the assistant's but not marked"),  # marks nothing
    ],
)
def test_marks_that_disagree(places, detail):
    with pytest.raises(Rejected) as error:
        encode(marked(**places), chat("a", "b"))
    assert (error.value.reason, error.value.detail) == (E.MARKS, detail)


def test_the_block_is_found_by_the_lexer():
    assert E._has_generation_block("a{%- generation -%}b{% endgeneration %}")
    assert not E._has_generation_block("{{ '{% generation %}' }}{# {% generation %} #}{% set generation = 1 %}")


# -- preformatted texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, LLAMA2, CHATML, TRIM, THINK])
def test_a_rendered_text_has_the_mask_of_its_conversation(template):
    special = ("<|im_start|>", "<|im_end|>") if template and "im_start" in template else ()
    tokenizer = load(template, *special)
    row = chat("Hi", "return a", "x", "def b(): pass")
    text = tokenizer.apply_chat_template([m.as_dict() for m in row.messages], tokenize=False)
    for options in ({}, {"last_turn_only": True}, {"max_length": 18}):
        assert encode(tokenizer, text, preformatted=True, **options) == encode(tokenizer, row, **options)


def test_preformatted_openings():
    assert Encoder(load(), preformatted=True).opening == [ASSISTANT, NL]
    tokenizer = load(LLAMA2)
    assert tokenizer.decode(Encoder(tokenizer, preformatted=True).opening) == " [/INST]"


def test_preformatted_thinking_as_the_model_wrote_it():
    """What no rendering of a conversation gives: the text that the generation prompt and the model wrote together."""
    tokenizer = load(OPENS_THINK, "<|im_start|>", "<|im_end|>")
    text = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\nhm</think>a<|im_end|>\n"
    assert supervised(tokenizer, encode(tokenizer, text, preformatted=True)) == ["hm</think>a<|im_end|>"]


def test_preformatted_text_that_is_cut_or_broken(pocket):
    def found(text):
        return supervised(pocket, encode(pocket, text, preformatted=True))

    assert found("<|user|>\n1<|end|>\n<|assistant|>\na b") == ["a b"]  # without an end
    assert found("<|assistant|>\na<|end|>\n<|assistant|>\n<|end|>\n<|assistant|>\n") == ["a<|end|>"]  # empty ones
    assert reason(pocket, "Hi", preformatted=True) == E.NOT_FOUND
    assert reason(pocket, "<|user|>\n1<|end|>\n<|assistant|>", preformatted=True) == E.NOT_FOUND
    assert reason(pocket, "<|assistant|>\na<|assistant|>\nb<|end|>", preformatted=True) == E.OPENED_TWICE


def test_a_template_whose_answers_cannot_be_found_in_text():
    with pytest.raises(UserError, match="without --is-preformatted"):
        Encoder(load(BARE), preformatted=True)  # an answer has no end
    # an answer looks like a question: what stands before it is found before questions, too
    alike = "{% for m in messages %}{{ '<|user|>\n' + m['content'] + '<|end|>' }}{% endfor %}"
    with pytest.raises(UserError, match="without --is-preformatted"):
        Encoder(load(alike + "{% if add_generation_prompt %}{{ '<|user|>\n' }}{% endif %}"), preformatted=True)
    # without a generation prompt, and a question looks different once it is answered: nothing can be tried
    other = LLAMA2.replace("' [/INST]'", "(' [ASK]' if loop.last else ' [/INST]')")
    with pytest.raises(UserError, match="without --is-preformatted"):
        Encoder(load(other), preformatted=True)
