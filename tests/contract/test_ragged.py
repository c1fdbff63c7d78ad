"""Ragged cases, found by hypothesis: any pattern of right, wrong and twin drafts, and any history of a sequence.

With CI set in the environment the examples are the same every time.
"""

from __future__ import annotations

import os
import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from contract.checks import check_cache, check_cycles, check_greedy
from contract.histories import Broken
from contract.runs import MAKERS, Run, leave_after, open_run, same, scripted
from contract.scripted import chain
from understudy.decoding.engine import decode

RAGGED = settings(
    deadline=None,
    max_examples=40,
    database=None,
    derandomize="CI" in os.environ,
    suppress_health_check=list(HealthCheck),
)

chains = st.lists(st.builds(chain, st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=5)
node = st.tuples(st.integers(0, 6), st.sampled_from(["right", "right", "wrong", "twin", "next"]))
trees = st.lists(st.lists(node, max_size=8), min_size=1, max_size=4)
families = st.sampled_from(["llama", "gemma3", "gemma2", "cohere2", "qwen3-vl"])
prompts = st.builds(tiny.prompt, st.sampled_from([2, 5, 20]), st.integers(0, 1))


@RAGGED
@given(families, prompts, chains, st.integers(1, 24), st.sampled_from([None, 1, 2, 3]), st.sampled_from([1, 4, 64]))
def test_chains(family: str, prompt: list[int], pattern: list, count: int, exit_layer: int | None, chunk: int) -> None:
    maker = scripted("chain", pattern, exit_layer=exit_layer)
    check_cache(family, check_greedy(family, maker, prompt, count, prefill_chunk=chunk))


@RAGGED
@given(families, prompts, trees, st.integers(1, 24))
def test_trees(family: str, prompt: list[int], pattern: list, count: int) -> None:
    maker = scripted("tree", pattern, tree=True)
    check_cache(family, check_greedy(family, maker, prompt, count))


operation = st.one_of(
    st.tuples(st.just("decode"), st.integers(1, 4)),
    st.tuples(st.just("fail"), st.sampled_from(["draft", "verify", "observe"])),
    st.tuples(st.just("rewind"), st.floats(0.05, 1.0)),
    st.tuples(st.just("prefill"), st.integers(1, 9)),
    st.tuples(st.just("fork"), st.integers(1, 9)),
)


@RAGGED
@given(
    st.sampled_from(["gemma3", "qwen3"]),
    st.sampled_from(["small-model-0", "early-exit-1", "random-tree", "prompt-lookup-0", "null-0"]),
    st.lists(operation, min_size=1, max_size=7),
)
def test_any_history(family: str, name: str, operations: list[tuple[str, object]]) -> None:
    """Whatever happens to a sequence, each token that it adds is the argmax after the text before it."""
    run = open_run(family, MAKERS[name], tiny.prompt(6), max_new_tokens=24)
    text = list(tiny.prompt(6))
    given_tokens = len(text)
    produced: list[int] = []  # places in the text that decoding filled
    for what, how in [*operations, ("decode", 4)]:
        sequence = run.sequence
        if what == "decode":
            leave_after(run, how)
        elif what == "fail":
            _failing(run, how)
        elif what == "rewind":
            sequence.rewind(max(1, int(how * len(sequence.tokens))))
            produced = [at for at in produced if at < len(sequence.tokens)]
            text = text[: len(sequence.tokens)]
            given_tokens = len(text)
        elif what == "prefill" and sequence.pending is None:
            sequence.prefill(tiny.prompt(how, seed=9))
            text = [*sequence.tokens]
            given_tokens = len(text)
        elif what == "fork":
            run = Run(sequence.fork(how))
        assert run.sequence.tokens[: len(text)] == text, what
        text = list(run.sequence.tokens)
        produced += range(given_tokens, len(text))
        given_tokens = len(text)
    choices = tiny.logits(tiny.model(family), text).argmax(-1).tolist()
    same([text[at] for at in produced], [choices[at - 1] for at in produced], f"{name} after {operations}")


def _failing(run: Run, where: str) -> None:
    """One cycle that fails in the middle."""
    sequence = run.sequence
    owner, method = {
        "draft": (sequence.draft, "propose"),
        "verify": (sequence.target, "verify"),
        "observe": (sequence.draft, "observe"),
    }[where]
    call = getattr(owner, method)

    def failing(*args: object) -> None:
        call(*args)
        raise Broken

    setattr(owner, method, failing)
    try:
        next(decode(sequence), None)
    except Broken:
        pass
    finally:
        delattr(owner, method)


def test_many_prompts() -> None:
    """Short and long prompts, below and beyond the window."""
    rng = random.Random(0)
    for length in (1, 2, 3, 5, 7, 8, 9, 40):
        name = rng.choice(["ragged", "ragged-tree", "ragged-resumed"])
        run = check_greedy(
            "gemma3", MAKERS[name], tiny.prompt(length, seed=length), 10, prefill_chunk=rng.choice([1, 5, 64])
        )
        check_cycles(run, length)


def test_the_reference_is_that_of_generate() -> None:
    """The slow decoder says what transformers' own greedy `generate` says."""
    for family in tiny.CONTRACT:
        model, prompt = tiny.model(family), tiny.prompt()
        said = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        assert said[0, 20:].tolist() == tiny.reference(family, prompt, 32)[:16]
