"""The draft vocabulary: which tokens, in which order, and the two maps on disk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from eagle3 import reference
from understudy.core.errors import UserError
from understudy.drafters.eagle3.vocab import check_inverse, ids_of, membership, most_frequent, offsets

COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=30)


@given(COUNTS, st.data())
def test_the_most_frequent_tokens_and_of_equals_the_first(counts, data):
    size = data.draw(st.integers(1, len(counts)))
    found = most_frequent(torch.tensor(counts), size)
    want = sorted(range(len(counts)), key=lambda token: (-counts[token], token))[:size]
    assert found.dtype == torch.int64 and found.tolist() == sorted(want)


@given(COUNTS, st.data())
def test_maps_on_disk_and_back(counts, data):
    total = len(counts)
    ids = most_frequent(torch.tensor(counts), data.draw(st.integers(1, total)))
    d2t, t2d = offsets(ids), membership(ids, total)
    assert [i + int(offset) for i, offset in enumerate(d2t)] == ids.tolist()
    assert [token for token in range(total) if t2d[token]] == ids.tolist() and t2d.dtype == torch.bool
    assert torch.equal(ids_of(d2t, total, "here"), ids)
    check_inverse(ids, t2d, "here")
    swapped = t2d.clone()
    swapped[int(ids[0])] = False
    with pytest.raises(UserError, match="t2d and d2t name different tokens"):
        check_inverse(ids, swapped, "here")


def test_literal_maps():
    counts = torch.tensor([0, 7, 3, 0, 3, 9])
    ids = most_frequent(counts, 4)
    assert ids.tolist() == [1, 2, 4, 5]
    assert offsets(ids).tolist() == [1, 1, 2, 2]  # column 2 says token 2 + 2
    assert membership(ids, 6).tolist() == [False, True, True, False, True, True]


@pytest.mark.parametrize(
    "d2t",
    [
        [0, 0, 4],  # 6 is no token
        [-1, 0, 0],  # nor is -1
        [1, 0, 0],  # 1 twice
        [2, 0, 0],  # falls
        [],
    ],
)
def test_what_is_no_map_is_refused(d2t):
    with pytest.raises(UserError, match="d2t is no map of offsets into 6 tokens"):
        ids_of(torch.tensor(d2t, dtype=torch.int64), 6, "here")


def test_of_zeros_every_token_is_itself():
    """What engines take where d2t is lost: a map, and the wrong one. `read_drafter` refuses a checkpoint without it."""
    assert ids_of(torch.zeros(3, dtype=torch.int64), 6, "here").tolist() == [0, 1, 2]


def test_a_new_drafter_says_the_tokens_of_the_data_with_the_rows_of_the_target():
    target = tiny.target("llama")
    objective = reference.objective(target, spread=0.0, draft_vocab_size=20)
    model = objective.drafter.model
    counts = torch.randint(0, 9, (tiny.V,), generator=torch.Generator().manual_seed(0))
    assert model.ids is not None and torch.equal(model.ids, most_frequent(counts, 20))
    rows = target.model.get_output_embeddings().weight
    assert torch.equal(model.lm_head.weight, rows[model.ids]) and model.t2d is not None
    check_inverse(model.ids, model.t2d, "model")
    # a state in the space of the target's last layers gets the target's own logits
    states = torch.randn(3, target.hidden_size)
    torch.testing.assert_close(
        model.logits(states), target.head(target.norm(states))[:, model.ids], rtol=1e-4, atol=1e-4
    )


def test_all_tokens_need_no_map():
    model = reference.objective(tiny.target("llama"), spread=0.0).drafter.model
    assert model.ids is None and "d2t" not in model.state_dict() and "t2d" not in model.state_dict()
    assert model.lm_head.weight.shape[0] == tiny.V
