"""The draft layer's attention in training: against one dense mask over all keys, against decoding's cache, and how much exists at once."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import tiny
from eagle3 import reference
from eagle3.reference import Document
from understudy.drafters.eagle3 import attention
from understudy.drafters.eagle3.attention import DraftAttention
from understudy.drafting.blocks import Rotary
from understudy.target.cache import KVCache
from understudy.target.target import Target

HEADS = {"one key head": (4, 1), "two": (4, 2), "a key head per query head": (2, 2)}


def layer(heads: tuple[int, int] = (4, 2), bias: bool = False) -> tuple[DraftAttention, LlamaRotaryEmbedding]:
    config = LlamaConfig(hidden_size=16, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8,
                         attention_bias=bias)  # fmt: skip
    torch.manual_seed(1)
    made = DraftAttention(config)
    for weight in made.parameters():
        weight.data.normal_(std=0.4)
    return made, LlamaRotaryEmbedding(config)


def layout(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Documents' lengths by row -> (documents, positions) [B, T], padded."""
    batch = reference.pack([[reference.document(n, "." * n) for n in row] for row in rows])
    return batch.documents, batch.positions


def inputs(documents: Tensor, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*documents.shape, 32, generator=generator) for _ in range(steps)]


def unrolled(
    made: DraftAttention, rope: Any, documents: Tensor, positions: Tensor, xs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, inputs as leaves) of all steps."""
    length, past, outs = documents.shape[1], list[tuple[Tensor, Tensor]](), []
    visible = (documents[:, :, None] == documents[:, None]) & torch.ones(length, length).bool().tril()
    xs = [x.clone().requires_grad_() for x in xs]
    for k, x in enumerate(xs):
        out, keys, values = made.unrolled(x, rope(x, positions + k), visible[:, None], past)
        past.append((keys, values))
        outs.append(out)
    return outs, xs


def dense(
    made: DraftAttention, rope: Any, documents: Tensor, positions: Tensor, xs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same with the keys of all steps in a row, [T, (k + 1) T] scores and one mask: (slot, step) sees (slot', step') if ..."""
    xs = [x.clone().requires_grad_() for x in xs]
    (batch, length), heads, outs = documents.shape, made.heads, []
    rows = [made.project(x, rope(x, positions + k)) for k, x in enumerate(xs)]
    for k in range(len(xs)):
        q = rows[k][0]
        keys, values = (
            torch.cat([row[i] for row in rows[: k + 1]], 2).repeat_interleave(heads // made.kv_heads, 1) for i in (1, 2)
        )
        seen = torch.zeros(batch, length, (k + 1) * length, dtype=torch.bool)
        for b in range(batch):
            for t in range(length):
                for j in range(t + 1):
                    seen[b, t, j] = documents[b, j] == documents[b, t]
                for step in range(1, k + 1):
                    seen[b, t, step * length + t] = True
        scores = q @ keys.transpose(-1, -2) / made.size**0.5
        weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        outs.append(made.o_proj((weights @ values).transpose(1, 2).flatten(2)))
    return outs, xs


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_values_and_gradients_are_those_of_a_dense_mask(heads, whole):
    made, rope = layer(HEADS[heads], bias=not whole)
    documents, positions = layout([[4, 3], [1, 5]])
    xs = inputs(documents, 4)
    with patch.object(attention, "WHOLE", 2**26 if whole else 1):
        outs, got = unrolled(made, rope, documents, positions, xs)
        sums = sum((out * (k + 1)).pow(2).sum() for k, out in enumerate(outs))
        found = torch.autograd.grad(sums, [*got, *made.parameters()])
    wanted, want = dense(made, rope, documents, positions, xs)
    torch.testing.assert_close(outs, wanted, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(
        sum((o * (k + 1)).pow(2).sum() for k, o in enumerate(wanted)), [*want, *made.parameters()]
    )
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 40),
)
def test_ragged_documents(rows, steps, whole):
    made, rope = layer()
    documents, positions = layout(rows)
    xs = inputs(documents, steps)
    with torch.no_grad(), patch.object(attention, "WHOLE", whole * documents.numel()):
        outs, _ = unrolled(made, rope, documents, positions, xs)
        wanted, _ = dense(made, rope, documents, positions, xs)
    torch.testing.assert_close(outs, wanted, rtol=1e-4, atol=1e-4)


def rotations(rope: Any, like: Tensor, start: int, count: int) -> Rotary:
    return rope(like, torch.arange(start, start + count)[None])


def test_decoding_with_a_cache_is_the_unrolled_chain():
    """True rows in the cache, then a chain's own rows after them, which the next chain overwrites."""
    made, rope = layer()
    documents, positions = layout([[6]])
    xs = inputs(documents, 4)
    with torch.no_grad():
        outs, _ = unrolled(made, rope, documents, positions, xs)
        cache = KVCache(1)
        cache.reserve(16)
        for t in (0, 1, 3, 4, 5):
            if t == 3:  # a row that is only written, since nobody asks what follows it
                cache.start = 2
                made.write(xs[0][:, 2:3], rotations(rope, xs[0], 2, 1), cache)
            for k in range(4):
                cache.start = t + k
                out = made.last(xs[k][:, t : t + 1], rotations(rope, xs[0], t + k, 1), cache)
                torch.testing.assert_close(out[0, 0], outs[k][0, t], rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("chunk", [64, 8, 1])
def test_scores_exist_for_a_chunk_of_queries(chunk):
    """Forward and backward: [heads, chunk, T + 1 own key], and nothing larger than those or the [T, 2 H] that go in."""
    made, rope = layer()
    x, again = inputs(torch.zeros(1, 64), 2)
    positions, visible = torch.arange(64)[None], torch.ones(1, 1, 64, 64).bool().tril()
    _, *first = made.unrolled(x, rope(x, positions), visible, [])
    with patch.object(attention, "WHOLE", chunk * 4 * 64), Largest() as seen:
        out, *_ = made.unrolled(again, rope(again, positions + 1), visible, [tuple(first)])
        out.sum().backward()
    assert seen.elements == max(4 * chunk * 65, 64 * 32)


@pytest.mark.parametrize("reduced", [False, True])
def test_logits_exist_for_a_chunk_of_rows(reduced):
    """Of head, teacher and loss, forward and backward: no tensor is larger than a chunk of logits over the vocabulary."""
    target = Target(tiny.fresh_model("llama", vocab_size=4096), name="wide")
    rows = [[Document(tiny.prompt(50, 1), [True] * 50)]]  # 48 rows of the target teach up to 3 steps each
    largest = {}
    for chunk in (48, 4096):
        objective = reference.objective(target, loss_chunk=chunk, draft_vocab_size=3000 if reduced else None)
        features = reference.features(objective, reference.pack(rows))
        with Largest() as seen:
            objective(features).loss.backward()
            objective.predictions(features), objective.lengths(features)
        largest[chunk] = seen.elements
    assert 32 * 4096 < largest[48] <= 48 * 4096  # more than the gradient of the head
    assert largest[4096] == 48 * 3 * (3000 if reduced else 4096)
