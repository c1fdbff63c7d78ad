"""Drafting with DFlash through the engine: blocks, whatever happens to a sequence."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from contract import histories
from contract.runs import MAKERS
from contract.scripted import Wrapped
from dflash import drafts, reference
from dflash.drafts import KINDS, made
from eagle3.test_drafting import _broken_cycle as broken_cycle
from eagle3.test_drafting import operations
from understudy.core.records import Proposal
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.drafters.dflash.model import DFlashModel
from understudy.target.cache import KVCache

CLEAR = 1e-6
CASES = [("llama", kind) for kind in KINDS] + [
    (family, "plain") for family in ("gemma3", "cohere2", "granite", "qwen3-vl")
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_drafts_are_the_slow_ones(family: str, kind: str) -> None:
    """In every cycle of a run, after accepted blocks of different lengths."""
    drafter, compared, lengths = made(kind, family), list[int](), set[int]()

    def compare(proposal: Proposal) -> None:
        slow = drafts.Slow(drafter, sequence.tokens)
        want = slow.chain(sequence.budget().depth)
        if slow.gap > CLEAR:
            assert proposal.tokens.tolist() == want, f"after {sequence.tokens}"
            compared.append(len(want))

    params = DecodeParams(max_new_tokens=16, prefill_chunk=3)
    sequence = DecodeSequence(drafter.target, Wrapped(drafter, on_propose=compare), params, stop=StopRule())
    sequence.prefill(drafts.text(7))
    cycles = list(decode(sequence))[1:]
    lengths |= {cycle.accepted for cycle in cycles}
    assert len(compared) == len(cycles) - (not cycles[-1].drafted) and sum(compared) >= 10
    assert len(lengths) >= 2, f"accepts only {lengths}"
    assert sequence.output == tiny.continuation(drafter.target.model, drafts.text(7), 16)


@pytest.mark.parametrize("kind", KINDS)
def test_wild_drafters_draft_the_slow_ones(kind: str) -> None:
    """Random weights show every slip; prompts of any length."""
    for seed in range(8):
        drafter, text = drafts.drafter(**{**KINDS[kind], "seed": seed, "lessons": 0}), drafts.text(2 + seed, seed)
        slow = drafts.Slow(drafter, text)
        want = slow.chain(drafter.steps)
        assert slow.gap > CLEAR
        assert drafts.proposed(drafts.at(drafter, text)) == want


def test_a_budget_cuts_the_block_and_not_its_rows() -> None:
    """Fewer drafts than asked for are the first ones of the same block."""
    drafter = drafts.drafter(block_size=6)
    sequence = drafts.at(drafter, drafts.text(9))
    whole = drafts.proposed(sequence)
    assert len(whole) == 5
    for depth in (1, 2, 4):
        assert drafts.proposed(sequence, depth) == whole[:depth]
    assert drafts.proposed(sequence, 0) == []


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_up_to_the_end_of_the_context(kind: str) -> None:
    drafter = made(kind, context=24)
    sequence = drafts.opened(drafter, drafts.text(7), max_new_tokens=60)
    cycles = list(decode(sequence))
    assert len(sequence.tokens) == 24 and sequence.output == tiny.continuation(drafter.target.model, drafts.text(7), 17)
    assert min(len(cycle.drafted) for cycle in cycles[1:]) < drafter.steps


# The cache


def _rows(session: Any) -> list[Tensor]:
    return [part.clone() for n in range(len(session.model.layers)) for part in session.cache.rows(n, session.valid)]


@pytest.mark.parametrize("kind", KINDS)
def test_context_rows_after_many_cycles_are_those_of_a_fresh_prefill(kind: str) -> None:
    drafter = made(kind)
    sequence = drafts.opened(drafter, drafts.text(7), max_new_tokens=40)
    cycles = list(decode(sequence))[1:]
    assert len({cycle.accepted for cycle in cycles}) > 1
    drafts.proposed(sequence)
    fresh = drafts.at(drafter, list(sequence.tokens))
    drafts.proposed(fresh)
    for session in (sequence.draft, fresh.draft):
        assert session.valid == len(sequence.tokens) - 1  # type: ignore[attr-defined]
    for a, b in zip(_rows(sequence.draft), _rows(fresh.draft), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_every_context_row_is_computed_once_and_nothing_is_copied() -> None:
    """One product per cycle for all layers; the slabs stay where they are, whatever is rejected."""
    drafter, products = made("plain"), list[int]()
    written, slabs = list[tuple[int, int]](), set[tuple[int, ...]]()
    write, linear = DFlashModel.write, torch.nn.functional.linear

    def counted(self: Any, taps: Tensor, start: int, cache: KVCache) -> None:
        written.append((start, len(taps)))
        with patch("understudy.drafters.dflash.model.F.linear", lambda *a: (products.append(1), linear(*a))[1]):
            write(self, taps, start, cache)

    with (
        patch.object(DFlashModel, "write", counted),
        patch.object(KVCache, "fork", None),
        patch.object(KVCache, "keep", None),
    ):
        sequence = drafts.opened(drafter, drafts.text(9), max_new_tokens=40)
        session: Any = sequence.draft
        assert written == [(0, 7)]  # the first chunk of the prompt; its last waits for the first token
        cycles = []
        for cycle in decode(sequence):
            cycles.append(cycle)
            slabs.add(tuple(slab.data_ptr() for slab in (*session.cache.keys, *session.cache.values)))
    assert [row for start, n in written for row in range(start, start + n)] == list(range(session.valid))
    assert session.valid + sum(map(len, session.waiting)) == len(sequence.tokens) - 1
    assert sum(len(c.drafted) - c.accepted for c in cycles) > 10, "nothing was rejected"
    assert len(slabs) == 1 and session.cache.capacity == 256
    drafted = sum(bool(c.drafted) for c in cycles)
    assert len(written) == drafted + 1 and len(products) == 2 * len(
        written
    )  # `fc`, then keys and values of all layers at once


def test_fused_weights_follow_the_weights() -> None:
    """After a step of training in place, a loaded checkpoint, and a cast."""
    objective = reference.objective(drafts.target(), block_size=4)
    drafter, text = objective.drafter, drafts.text(12)
    other = reference.objective(drafts.target(), seed=5, block_size=4).drafter.model.state_dict()

    def right() -> list[int]:
        found = drafts.proposed(drafts.at(drafter, text))
        assert found == drafts.Slow(drafter, text).chain(drafter.steps)
        return found

    right()
    rows = [[reference.Document(text, [i > 3 for i in range(12)])]]
    before = drafter.model._fused_weights()[0].clone()
    reference.taught(objective, rows, steps=2, lr=0.3)
    right()
    assert not torch.equal(drafter.model._fused_weights()[0], before)
    drafter.model.load_state_dict(other)
    right()
    with torch.no_grad():
        drafter.model.attentions[1].k_norm.weight.mul_(-1)  # the one part that is in no product
    right()
    drafter.model.to(torch.float32)
    assert drafter.model._fused_weights()[0].dtype == torch.float32


def test_weights_that_were_loaded_in_inference_mode_draft_too() -> None:
    """They have no version to follow, and cannot be written outside of it."""
    with torch.inference_mode():
        drafter = drafts.drafter(block_size=4)
    assert drafts.proposed(drafts.at(drafter, drafts.text(9))) == drafts.proposed(
        drafts.at(drafts.drafter(block_size=4), drafts.text(9))
    )


def test_fused_biases_follow_too() -> None:
    objective = reference.objective(drafts.target(), block_size=4)
    config = objective.drafter.model.config
    config.attention_bias = True
    target = drafts.target()
    model = DFlashModel(config, target.embed_tokens.weight, target.model.get_output_embeddings().weight).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        taps, found = torch.randn(5, 64, dtype=torch.float64), list[Tensor]()
        for _ in range(2):
            cache = KVCache(2)
            model.write(taps, 0, cache)
            for n, attention in enumerate(model.attentions):
                rotary = model.rotary.rows(0, 5, taps)
                for got, want in zip(cache.rows(n, 5), attention.keys(model.fuse(taps)[None], rotary), strict=True):
                    torch.testing.assert_close(got, want)
            found.append(cache.rows(0, 5)[1].clone())
            model.attentions[0].v_proj.bias.add_(1)
        assert not torch.equal(*found)


# Whatever happens to a sequence


def _same_as_fresh(sequence: DecodeSequence, drafter: DFlashDrafter, may_be_nothing: bool) -> None:
    """The session drafts what a session drafts that saw the text at once."""
    if sequence.pending is not None or len(sequence.tokens) < 2:
        return
    got = drafts.proposed(sequence)
    if may_be_nothing and not got:
        return
    assert got == drafts.proposed(drafts.at(drafter, list(sequence.tokens))), sequence.tokens


HISTORIES = settings(deadline=None, max_examples=30, database=None, derandomize="CI" in os.environ,
                     suppress_health_check=list(HealthCheck))  # fmt: skip


@HISTORIES
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 8), st.lists(operations, min_size=1, max_size=8))
def test_any_history(kind: str, length: int, history: list[tuple[str, Any]]) -> None:
    """Cycles, failures, rewinds, turns, forks, drafts that are thrown away, cycles without drafts."""
    drafter = made(kind)
    sequence = drafts.opened(drafter, drafts.text(length), max_new_tokens=30)
    behind = False  # the row to draft from went with a rewind; the next cycle brings it back
    for what, how in [*history, ("decode", 2)]:
        if what == "decode":
            before = len(sequence.tokens)
            for _, cycle in zip(range(how), decode(sequence), strict=False):
                behind &= not cycle.committed
            behind &= len(sequence.tokens) == before
        elif what == "fail":
            broken_cycle(sequence, how)
            behind = True  # where it failed in observe
        elif what == "rewind":
            sequence.rewind(max(1, len(sequence.tokens) - how))
            behind = True
        elif what == "prefill" and sequence.pending is None:
            sequence.prefill(drafts.text(how, seed=9))
            behind = False
        elif what == "fork":
            sequence = sequence.fork(how)
        elif what == "propose" and sequence.pending is None:
            drafts.proposed(sequence, how)
        elif what == "plain":  # a cycle that may draft nothing
            sequence.length.steps, steps = 0, sequence.length.steps
            next(decode(sequence), None)
            sequence.length.steps = steps
        _same_as_fresh(sequence, drafter, behind)


def test_forks_do_not_share_rows() -> None:
    drafter = made("plain")
    sequence = drafts.opened(drafter, drafts.text(6), max_new_tokens=30)
    for _ in zip(range(3), decode(sequence), strict=False):
        pass
    other = sequence.fork(1)
    other.rewind(3)
    other.prefill(drafts.text(9, seed=4))
    for _ in zip(range(3), decode(other), strict=False):
        pass
    assert other.tokens[:8] != sequence.tokens[:8]
    for each in (sequence, other):
        _same_as_fresh(each, drafter, may_be_nothing=False)


def test_a_prefill_that_fails_while_rows_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were not written do not count as written."""
    drafter = made("plain")
    sequence = drafts.opened(drafter, drafts.text(9), max_new_tokens=3)
    list(decode(sequence))
    before, write = list(sequence.tokens), drafter.model.write

    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drafter.model, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        sequence.prefill(drafts.text(20, seed=2))
    monkeypatch.setattr(drafter.model, "write", write)
    assert sequence.tokens == before
    sequence.prefill(drafts.text(9, seed=3))
    next(decode(sequence))
    _same_as_fresh(sequence, drafter, may_be_nothing=False)


@pytest.mark.parametrize("name", ["dflash-0", "dflash-1", "dflash-2"])
def test_exceptions_in_observe(name: str) -> None:
    histories.check_exceptions("gemma3", MAKERS[name], ("observe",))
