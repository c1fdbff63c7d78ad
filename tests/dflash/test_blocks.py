"""The two ways through the model, blocks over packed rows and one block over a cache, against the slow one: states row by row."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash import drafts, reference
from understudy.drafters.dflash import attention
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.target.cache import KVCache

SHAPES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"sliding_window": 4},
    "mixed": {"sliding_window": 3, "layer_types": ("sliding_attention", "full_attention")},
    "from the anchor": {"markov_rank": 2},
    "embeddings": {"train_embeddings": True},
    "mask row": {"mask_token_id": 3},
}


def made(kind: str) -> DFlashDrafter:
    """In float64, but for rotary factors and the softmax of training."""
    return drafts.drafter(**SHAPES[kind])


def check(drafter: DFlashDrafter, lengths: list[int], rows: int) -> None:
    """A row of documents of random taps and tokens, a block at every token."""
    model, plain, generator = drafter.model, reference.plain(drafter), torch.Generator().manual_seed(sum(lengths))
    batch = reference.pack([[reference.document(n, "#" * n, n) for n in lengths]])
    total = sum(lengths)
    taps = torch.randn(1, total, model.fc.in_features, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        found = model.blocks(taps, batch, torch.arange(total)[None], rows)[0]
        begin = 0
        for length in lengths:
            own = taps[0, begin : begin + length]
            context = plain.context([[part[:32], part[32:]] for part in own])
            for t in range(length):
                token = batch.ids[0, begin + t : begin + t + 1]
                want = torch.stack(plain.block(int(token), context, t, rows))
                torch.testing.assert_close(found[begin + t], want, rtol=1e-5, atol=1e-5)
                cache = KVCache(len(model.layers))
                for start in range(0, t, 2):  # chunk by chunk, and a block in between that is overwritten
                    model.write(own[start : min(start + 2, t)], start, cache)
                    model.block(token, rows, min(start + 2, t), cache)
                torch.testing.assert_close(model.block(token, rows, t, cache), want, rtol=1e-5, atol=1e-5)
            begin += length


@pytest.mark.parametrize("kind", SHAPES)
def test_both_ways_are_the_slow_one(kind: str) -> None:
    drafter = made(kind)
    check(drafter, [1, 7, 3], 4)
    check(drafter, [6], 1 if kind == "from the anchor" else 2)


@settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(2, 7),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from([1, 12, 128]),
)
def test_any_layout(lengths: list[int], rows: int, kind: str, together: int) -> None:
    with patch.object(attention, "TOGETHER", together):
        check(made(kind), lengths, rows)


def test_rows_beyond_the_slab() -> None:
    """The cache grows once in a while, and keeps what it has."""
    drafter = made("full")
    model = drafter.model
    taps = torch.randn(300, model.fc.in_features, dtype=torch.float64)
    with torch.no_grad():
        whole, parts = KVCache(2), KVCache(2)
        model.write(taps, 0, whole)
        for start in range(0, 300, 50):
            model.write(taps[start : start + 50], start, parts)
            model.block(torch.tensor([5]), 4, start + 50, parts)
        a, b = (model.block(torch.tensor([5]), 4, 300, cache) for cache in (whole, parts))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert parts.capacity == 512
