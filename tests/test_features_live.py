"""Live features: packed = each document alone, on every family; equal to what decoding captures; nothing else is kept or run.

The oracle is the model's own forward on one document at a time, with hooks (`tiny.hidden_states`).
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafting.objective import Batch
from understudy.drafting.spec import build
from understudy.features.live import PASS_COST, LiveFeatures, _groups
from understudy.target.target import Target

ALL = Needs(taps=frozenset(range(tiny.LAYERS + 1)), last=True)


def pack(rows: list[list[int]], width: int, seed: int = 0) -> tuple[Batch, list[tuple[int, int, list[int]]]]:
    """A batch of rows with documents of these lengths, and (row, start, ids) of every document."""
    rng = random.Random(seed)
    shape = (len(rows), width)
    ids, documents = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    positions = torch.zeros(shape, dtype=torch.int64)
    found = []
    for row, lengths in enumerate(rows):
        at = 0
        for number, length in enumerate(lengths):
            text = rng.choices(range(5, tiny.V - 8), k=length)
            ids[row, at : at + length] = torch.tensor(text)
            documents[row, at : at + length] = number
            positions[row, at : at + length] = torch.arange(length)
            found.append((row, at, text))
            at += length
    return Batch(ids, documents >= 0, documents, positions), found


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp_min(1)


def check(family: str, batch: Batch, documents: list[tuple[int, int, list[int]]]) -> None:
    features = LiveFeatures(tiny.target(family), ALL)(batch)
    assert features.last is not None
    for row, at, text in documents:
        *taps, last = tiny.hidden_states(tiny.model(family), text)
        here = slice(at, at + len(text))
        for tap, want in enumerate(taps):
            assert_close(features.taps[tap][row, here], want)
        assert_close(features.last[row, here], last)
    for states in (*features.taps.values(), features.last):
        assert torch.isfinite(states).all()
        assert not states[batch.documents < 0].any()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_is_unpacked(family):
    """Windows are crossed inside documents, one row is padded, one has a document of one token."""
    check(family, *pack([[13, 9, 2], [1, 22], [5, 11]], 24))


@given(st.lists(st.lists(st.integers(1, 12), max_size=4), min_size=1, max_size=3), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_any_packing(rows, padding):
    width = max(sum(lengths) for lengths in rows) + padding
    check("mistral", *pack(rows, max(width, 1)))


def test_a_document_does_not_see_its_neighbours():
    batch, documents = pack([[7, 9], [12]], 16)
    source = LiveFeatures(tiny.target("qwen3"), ALL)
    before = source(batch).taps[tiny.LAYERS]
    _, at, _ = documents[1]
    batch.ids[0, at : at + 9] = batch.ids[0, at : at + 9].flip(0)
    after = source(batch).taps[tiny.LAYERS]
    assert torch.equal(before[0, :at], after[0, :at]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, at:], after[0, at:])


class Everything:
    """Keeps what the engine captured of the committed rows."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.rows: list[dict] = []

    def on_cycle(self, cycle) -> None:
        rows, kept = cycle.rows, slice(0, cycle.rows.width if cycle.index == 0 else cycle.accepted + 1)
        self.rows.append({**{tap: x[kept].clone() for tap, x in rows.taps.items()},
                          "exit": rows.exit[kept].clone(), "last": rows.last[kept].clone()})  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss", "granite", "cohere2", "qwen3-vl"])
def test_equal_to_what_decoding_captures(family):
    target, prompt = tiny.target(family), tiny.prompt(15)
    watch = Everything(Needs(taps=ALL.taps, exit=2, last=True))
    params = DecodeParams(max_new_tokens=12)
    sequence = DecodeSequence(target, build("prompt-lookup", target), params, stop=StopRule(), listeners=[watch])
    sequence.prefill(prompt)
    list(decode(sequence))
    text = sequence.tokens[:-1]  # the last token is in no pass yet
    assert sequence.tokens[:15] == prompt and len(text) == 26

    batch, _ = pack([[26, 4]], 32)
    batch.ids[0, :26] = torch.tensor(text)
    live = LiveFeatures(target, Needs(taps=ALL.taps, exit=2, last=True))(batch)
    for tap in ALL.taps:
        assert_close(live.taps[tap][0, :26], torch.cat([rows[tap] for rows in watch.rows]))
    assert_close(live.taps[2][0, :26], torch.cat([rows["exit"] for rows in watch.rows]))
    assert_close(live.last[0, :26], torch.cat([rows["last"] for rows in watch.rows]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_attention_of_the_model(attention):
    model = tiny.fresh_model("qwen3")
    model.set_attn_implementation(attention)
    batch, documents = pack([[13, 9], [20]], 24)
    features = LiveFeatures(Target(model), ALL)(batch)
    for row, at, text in documents:
        assert_close(features.last[row, at : at + len(text)], tiny.hidden_states(tiny.model("qwen3"), text)[-1])
    assert model.config._attn_implementation == attention


def counted(target: Target, needs: Needs) -> tuple[list[int], int]:
    """(number of layers in the body, calls of the head) while features are computed."""
    calls = []
    handle = target.model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    source = LiveFeatures(target, needs)
    source(pack([[8, 3]], 12)[0])
    handle.remove()
    return len(source._body.layers), len(calls)


def test_what_is_not_needed_is_not_run():
    target = tiny.target("llama")
    assert counted(target, Needs(taps=frozenset({1, 3}))) == (3, 0)
    assert counted(target, Needs(taps=frozenset({0}))) == (1, 0)
    assert counted(target, Needs(taps=frozenset({1}), last=True)) == (tiny.LAYERS, 0)

    batch, _ = pack([[8, 3]], 12)
    features = LiveFeatures(target, Needs(taps=frozenset({3}), exit=1))(batch)
    assert list(features.taps) == [1, 3] and features.last is None
    nothing = LiveFeatures(target, Needs())(batch)
    assert nothing.taps == {} and nothing.last is None


def test_last_tap_is_before_the_final_norm():
    features = LiveFeatures(tiny.target("qwen3"), ALL)(pack([[8]], 8)[0])
    assert torch.allclose(tiny.target("qwen3").norm(features.taps[tiny.LAYERS]), features.last, atol=1e-5)
    assert not torch.allclose(features.taps[tiny.LAYERS], features.last, atol=0.1)


def test_the_model_is_left_as_it_was():
    model = tiny.fresh_model("gemma3")
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    source = LiveFeatures(Target(model), ALL)
    source(pack([[13, 9]], 24)[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "eager" and len(model.get_decoder().layers) == tiny.LAYERS
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1]


def test_features_are_ordinary_tensors_in_the_targets_dtype():
    model = tiny.fresh_model("llama").requires_grad_(True)
    source = LiveFeatures(Target(model), ALL)
    batch, _ = pack([[8, 3]], 12)
    plain = source(batch)
    with torch.inference_mode():
        inside = source(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = source(batch)
    for features in (plain, inside, mixed):
        assert features.last is not None and torch.equal(features.last, plain.last)
        assert not features.last.is_inference() and not features.last.requires_grad
        assert features.last.dtype == torch.float32
    weight = torch.ones(32, requires_grad=True)
    (inside.last * weight).sum().backward()
    assert torch.allclose(weight.grad, plain.last.sum((0, 1)), atol=1e-3)

    half = LiveFeatures(Target(tiny.fresh_model("llama").bfloat16()), ALL)(batch)
    assert half.last.dtype == half.taps[0].dtype == torch.bfloat16


def test_groups_are_the_cheapest_partition():
    """Against every partition of a few documents, written out."""

    def cost(cuts: list[int], lengths: list[int]) -> float:
        edges = [0, *cuts, len(lengths)]
        runs = [lengths[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        padded = [len(run) * run[0] for run in runs]
        return sum(p + PASS_COST for p in padded) if max(padded) <= 2000 else float("inf")

    for seed in range(20):
        rng = random.Random(seed)
        lengths = sorted(rng.choices(range(1, 1200), k=rng.randint(1, 7)), reverse=True)
        found = _groups(np.array(lengths), 2000)
        assert [i for group in found for i in range(group.start, group.stop)] == list(range(len(lengths)))
        every = [[i for i in range(1, len(lengths)) if mask >> i & 1] for mask in range(0, 2 ** len(lengths), 2)]
        assert cost([g.start for g in found[1:]], lengths) == min(cost(cuts, lengths) for cuts in every)


def test_mistakes():
    target = tiny.target("llama")
    with pytest.raises(UserError, match=r"no tap 5: llama has taps 0 \(embeddings\) to 4"):
        LiveFeatures(target, Needs(taps=frozenset({5})))
    with pytest.raises(UserError, match="a document has 513 tokens, the target's context is 512"):
        LiveFeatures(target, Needs(last=True))(pack([[513]], 513)[0])
    batch, _ = pack([[4, 4]], 8)
    batch.positions[0, 4:] += 4
    with pytest.raises(AssertionError, match="count from 0"):
        LiveFeatures(target, Needs(last=True))(batch)
