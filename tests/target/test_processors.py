"""Processors equal transformers', row by row over a draft tree; a GenerationConfig is applied or refused, never ignored."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as hf
from transformers.generation.configuration_utils import WatermarkingConfig
from transformers.generation.utils import GenerationMixin

from understudy.core.errors import UserError
from understudy.ops import laws, trees
from understudy.target import params as tables
from understudy.target.params import SamplingParams, params_from_generation_config
from understudy.target.processors import History, Processors

V = 24
EOS = [3, 7]


def unequal_logits(rows: int, seed: int) -> Tensor:
    """[rows, V] without ties."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(V, generator=generator) for _ in range(rows)])
    return (ranks + 0.5 * torch.rand(rows, V, generator=generator)) * 0.4 - 4.0


def oracle(params: SamplingParams, prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
    """One row [V] through transformers' processors, in the order of `generate`; slow and obvious."""
    ids, scores = torch.tensor([prompt + output]), logits[None].clone()
    if params.logit_bias:
        scores = hf.SequenceBiasLogitsProcessor({(t,): b for t, b in params.logit_bias.items()})(ids, scores)
    if params.repetition_penalty != 1.0:
        scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token in set(output):
        scores[0, token] -= params.frequency_penalty * output.count(token)
        scores[0, token] -= params.presence_penalty
    if params.min_tokens:
        scores = hf.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, EOS)(ids, scores)
    if params.suppress_tokens:
        scores = hf.SuppressTokensLogitsProcessor(params.suppress_tokens)(ids, scores)
    if params.allowed_tokens is not None:
        others = [t for t in range(V) if t not in params.allowed_tokens]
        scores = hf.SuppressTokensLogitsProcessor(others)(ids, scores)
    if params.begin_suppress_tokens:
        scores = hf.SuppressTokensAtBeginLogitsProcessor(params.begin_suppress_tokens, len(prompt))(ids, scores)
    if params.temperature == 0.0:
        return scores[0]
    scores = hf.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1.0:
        scores = hf.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(ids, scores)
    return scores[0]


ids = st.integers(8, V - 1)  # masks never meet the end-of-sequence tokens, and leave 0..2 and 4..6
sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 6, 100]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.07]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, 0.35]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([1.7, -0.9]), max_size=4),
    suppress_tokens=st.lists(ids, max_size=3).map(tuple),
    allowed_tokens=st.one_of(st.none(), st.just(tuple(range(16)))),
    begin_suppress_tokens=st.lists(ids, max_size=3).map(tuple),
    min_tokens=st.sampled_from([0, 2, 5]),
)
random_parents = st.lists(st.integers(0, 10**6), max_size=8).map(
    lambda xs: [-1] + [x % (i + 1) for i, x in enumerate(xs)]
)


def path_to(row: int, parents: list[int]) -> list[int]:
    """The rows below the root on the way to `row`."""
    return [] if row == 0 else [*path_to(parents[row], parents), row]


@settings(max_examples=300, deadline=None, derandomize=True)  # no new example puts a sum at the edge of top-p in fp32
@given(sampling_params, random_parents, st.booleans(), st.integers(0, 2**31), st.integers(0, 4))
def test_rows_equal_transformers_on_each_rows_own_prefix(params, parents, chain, seed, committed) -> None:
    if chain:
        parents = list(range(-1, len(parents) - 1))
    generator = torch.Generator().manual_seed(seed)
    prompt, output, drafts = (
        torch.randint(V, (n,), generator=generator).tolist() for n in (5, committed, len(parents) - 1)
    )
    logits = unequal_logits(len(parents), seed)

    processors = Processors(params, V, EOS)
    history = processors.history(prompt)
    rows = None
    if history is not None:
        history.extend(output)
        tokens = torch.tensor([(prompt + output)[-1], *drafts])
        rows = history.rows(tokens, None if chain else trees.ancestors(parents))
    raw = logits.clone()
    got = processors.apply(logits, rows)

    assert torch.equal(logits, raw), "the raw logits are the listeners'"
    assert got.dtype == torch.float32
    for row in range(len(parents)):
        own = [drafts[i - 1] for i in path_to(row, parents)]
        expected = oracle(params, prompt, output + own, logits[row])
        assert torch.equal(got[row] == -math.inf, expected == -math.inf)
        torch.testing.assert_close(got[row], expected, rtol=1e-5, atol=1e-5)
    if processors.identity:
        assert torch.equal(got, logits)


def test_a_pass_in_bf16_is_processed_in_fp32() -> None:
    logits = unequal_logits(3, 0).bfloat16()
    got = Processors(SamplingParams(temperature=0.7), V, EOS).apply(logits)
    assert torch.equal(got, logits.float() / 0.7)


@pytest.mark.parametrize(
    ("options", "greedy", "identity", "needs_history"),
    [
        ({}, True, True, False),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1}, True, True, False),  # filters keep the argmax
        ({"temperature": 1.0}, False, True, False),
        ({"temperature": 0.5}, False, False, False),
        ({"temperature": 1.0, "min_p": 0.1}, False, False, False),
        ({"logit_bias": {1: 1.0}}, True, False, False),
        ({"allowed_tokens": (1, 2)}, True, False, False),
        ({"repetition_penalty": 1.1}, True, False, True),
        ({"presence_penalty": 0.1}, True, False, True),
        ({"frequency_penalty": 0.1}, True, False, True),
        ({"min_tokens": 2}, True, False, True),
        ({"begin_suppress_tokens": (1,)}, True, False, True),
    ],
)
def test_what_a_request_costs(options: dict[str, Any], greedy: bool, identity: bool, needs_history: bool) -> None:
    processors = Processors(SamplingParams(**options), V, EOS)
    assert (processors.greedy, processors.identity, processors.needs_history) == (greedy, identity, needs_history)
    assert (processors.history([1]) is not None) == needs_history


# --- history ----------------------------------------------------------------------------------------------------------


def same(a: History, b: History) -> bool:
    return torch.equal(a.in_prompt, b.in_prompt) and torch.equal(a.counts, b.counts) and a.output == b.output


def test_history_extends_truncates_and_forks() -> None:
    history = History([1, 2, 2], V)
    history.extend([4, 4, 5])
    history.extend([])
    twin = history.fork()
    history.truncate(1)
    assert same(history, rebuilt([4]))
    twin.extend([6])
    assert same(twin, rebuilt([4, 4, 5, 6]))
    history.truncate(0)
    assert same(history, History(torch.tensor([1, 2, 2]), V))


def rebuilt(output: list[int]) -> History:
    history = History([1, 2, 2], V)
    history.extend(output)
    return history


def test_rows_of_a_history_by_hand() -> None:
    history = History([0, 1], 6)
    history.extend([2, 2])
    rows = history.rows(torch.tensor([2, 3, 3, 2]), trees.ancestors([-1, 0, 1, 0]))
    assert rows.counts().tolist() == [
        [0, 0, 2, 0, 0, 0],  # the root: committed already, not counted again
        [0, 0, 2, 1, 0, 0],
        [0, 0, 2, 2, 0, 0],  # 3 after 3
        [0, 0, 3, 0, 0, 0],  # the other branch: no 3
    ]
    assert rows.seen().int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
    ]
    assert rows.before(4).flatten().tolist() == [True, True, False, True]  # rows predict outputs 3, 4, 5, 4
    assert rows.before(2) is None
    single = history.rows(torch.tensor([2]))
    assert single.counts().tolist() == [[0, 0, 2, 0, 0, 0]]
    assert single.before(3).tolist() == [[True]]


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": 1e-9},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": -2.5},
        {"logit_bias": {1: math.inf}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {-1: 1.0}},
        {"suppress_tokens": (-1,)},
        {"allowed_tokens": ()},
        {"min_tokens": -1},
        {"seed": -1},
        {"top_q": 1},
    ],
)
def test_values_out_of_range_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)
    with pytest.raises(UserError, match=next(iter(wrong))):
        params_from_generation_config(None, **wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {V: 1.0}}, "logit_bias has token id 24"),
        ({"suppress_tokens": (99,)}, "suppress_tokens has token id 99"),
        ({"allowed_tokens": (99,)}, "allowed_tokens has token id 99"),
        ({"begin_suppress_tokens": (99,)}, "begin_suppress_tokens has token id 99"),
        ({"allowed_tokens": (5,), "suppress_tokens": (5,)}, "leave no token"),
        ({"allowed_tokens": (3, 7), "min_tokens": 1}, "leave no token"),
        ({"allowed_tokens": (3, 5), "min_tokens": 1, "begin_suppress_tokens": (5,)}, "leave no token"),
    ],
)
def test_masks_that_cannot_be_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Processors(SamplingParams(**options), V, EOS)


def test_an_end_token_outside_the_logits_needs_no_mask() -> None:
    assert not Processors(SamplingParams(min_tokens=3), V, [V + 5]).needs_history


def test_params_import_without_torch() -> None:
    code = "import sys, understudy.target.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- generation_config ------------------------------------------------------------------------------------------------


def test_every_field_of_generation_config_is_applied_or_refused_or_harmless() -> None:
    known = [tables.APPLIED, tables.STOPPING, tables.HARMLESS, frozenset(tables.REFUSED)]
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in fields:
        assert sum(name in table for table in known) == 1, (
            f"{name}: what does this transformers field do to the output?"
        )
    assert set().union(*known) <= fields, "a field that transformers no longer has"


ACTIVE = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": [object()],
    "force_words_ids": [[1]],
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_return_sequences": 2,
    "top_h": 0.4,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "no_repeat_ngram_size": 3,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "min_length": 10,
    "max_time": 1.0,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 3,
    "exponential_decay_length_penalty": (5, 1.1),
    "remove_invalid_values": True,
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": WatermarkingConfig(),
    "assistant_ensemble_weight": 0.5,
    "cache_implementation": "quantized",
}


@pytest.mark.parametrize("name", tables.REFUSED)
def test_active_fields_are_refused_by_name(name: str) -> None:
    config = GenerationConfig()
    setattr(config, name, ACTIVE[name])
    with pytest.raises(UserError, match=rf"generation_config\.{name}=.*: \w+"):
        params_from_generation_config(config)


def test_fields_at_their_neutral_values_pass() -> None:
    """transformers fills these in before it calls a custom generate function."""
    config = GenerationConfig(**GenerationConfig._get_default_generation_params())
    config.typical_p, config.epsilon_cutoff, config.eta_cutoff, config.guidance_scale = 1.0, 1.0, 0.0, 1.0
    config.cache_implementation, config.renormalize_logits, config.num_assistant_tokens = "static", True, 5
    assert params_from_generation_config(config) == SamplingParams(top_k=50)
    assert params_from_generation_config(None) == params_from_generation_config(GenerationConfig()) == SamplingParams()


def test_an_unknown_field_is_refused() -> None:
    config = GenerationConfig()
    config.dry_multiplier = 0.8
    with pytest.raises(UserError, match="dry_multiplier"):
        params_from_generation_config(config)


def test_min_length_is_overridden_by_min_new_tokens() -> None:
    assert params_from_generation_config(GenerationConfig(min_length=9, min_new_tokens=4)).min_tokens == 4
    assert params_from_generation_config(GenerationConfig(min_length=9), min_tokens=5).min_tokens == 5


def test_sampling_is_what_generate_would_make_of_it() -> None:
    sampled = GenerationConfig(do_sample=True, top_p=0.9)
    assert params_from_generation_config(sampled) == SamplingParams(temperature=1.0, top_k=50, top_p=0.9)
    assert params_from_generation_config(sampled, top_k=0, temperature=0.5) == SamplingParams(
        temperature=0.5, top_p=0.9
    )
    assert params_from_generation_config(sampled, temperature=None, top_p=None).temperature == 1.0
    assert params_from_generation_config(sampled, temperature=0.0).temperature == 0.0
    assert params_from_generation_config(GenerationConfig(temperature=0.6, top_p=0.9)).temperature == 0.0
    hot = params_from_generation_config(GenerationConfig(top_p=0.9), temperature=0.7)
    assert hot == SamplingParams(temperature=0.7, top_p=0.9)


def test_overrides_win_but_bad_words_stay() -> None:
    config = GenerationConfig(
        suppress_tokens=[9],
        bad_words_ids=[[5], [3]],
        sequence_bias=[[[1], -2.0], [[2], 1.5]],
        eos_token_id=EOS,
        seed=None,
    )
    assert params_from_generation_config(config) == SamplingParams(suppress_tokens=(9, 5), logit_bias={1: -2.0, 2: 1.5})
    got = params_from_generation_config(config, suppress_tokens=(8,), logit_bias={1: 4.0}, seed=11)
    assert got == SamplingParams(suppress_tokens=(8, 5), logit_bias={1: 4.0, 2: 1.5}, seed=11)


@pytest.mark.parametrize("field", [{"bad_words_ids": [[5, 6]]}, {"sequence_bias": [[[5, 6], -1.0]]}])
def test_phrases_of_several_tokens_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="several tokens"):
        params_from_generation_config(GenerationConfig(**field))


CONFIGS = [
    {"do_sample": False, "repetition_penalty": 1.2},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.6, "top_k": 8, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.05},
    {"do_sample": True, "top_k": 0, "min_new_tokens": 3, "suppress_tokens": [9], "begin_suppress_tokens": [11, 2]},
    {"bad_words_ids": [[5], [3], [8]], "sequence_bias": [[[1], -2.0], [[2], 1.5]], "repetition_penalty": 0.7},
    {"do_sample": True, "renormalize_logits": True, "temperature": 2.0, "top_p": 0.5, "min_new_tokens": 1},
]


@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("new_tokens", [0, 1, 4])
def test_a_config_gives_the_law_of_generate(options: dict[str, Any], new_tokens: int) -> None:
    """Against the very list that `generate` builds, so that its order is part of the test."""
    config = GenerationConfig(**options, eos_token_id=EOS)
    params = params_from_generation_config(config)
    filled = GenerationConfig(**{**GenerationConfig._get_default_generation_params(), **config.to_diff_dict()})
    filled._eos_token_tensor = torch.tensor(EOS)
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda default, custom: default,
    )
    prompt = [1, 4, 4, 10, 2]
    output = [6, 12, 12, 13][:new_tokens]
    listed = GenerationMixin._get_logits_processor(model, filled, input_ids_seq_length=len(prompt), device="cpu")
    logits = unequal_logits(1, 5)
    expected = listed(torch.tensor([prompt + output]), logits.clone())

    processors = Processors(params, V, EOS)
    history = processors.history(prompt)
    if history is not None:
        history.extend(output)
    got = processors.apply(logits, history and history.rows(torch.tensor([(prompt + output)[-1]])))
    assert processors.greedy == (not options.get("do_sample"))
    torch.testing.assert_close(laws.law(got), laws.law(expected))
    assert got.argmax() == expected.argmax()
