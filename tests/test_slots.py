"""The exact mask: which drafts decoding asks for."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.data.encode import Encoded
from understudy.data.packing import collate
from understudy.drafting.objective import Batch
from understudy.drafting.slots import asked


def cycles(mask: list[bool]) -> set[tuple[int, int]]:
    """(last committed token, draft) of every draft that decoding could be asked for, by walking every answer from every token on."""
    found, begin = set(), 0
    while begin < len(mask):
        end = begin
        while end < len(mask) and mask[end]:
            end += 1
        # the answer is begin .. end - 1: a cycle begins after each of its tokens that is committed, and drafts what is left of it
        for last in range(begin, end):
            found |= {(last, k) for k in range(end - last - 1)}
        begin = max(end, begin + 1)
    return found


@settings(deadline=None)
@given(st.lists(st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=3), min_size=1, max_size=3),
       st.integers(1, 9))  # fmt: skip
def test_supervised_iff_decoding_asks(rows: list[list[list[bool]]], drafts: int) -> None:
    batch = Batch(*collate([[Encoded([1] * len(mask), mask) for mask in row] for row in rows], 0).tensors())
    found = asked(batch, drafts)
    assert found.shape == (drafts, *batch.ids.shape) and found.dtype == torch.bool
    want = torch.zeros_like(found)
    for b, row in enumerate(rows):
        column = 0
        for mask in row:
            for last, k in cycles(mask):
                if k < drafts:
                    want[k, b, column + last] = True
            column += len(mask)
    assert torch.equal(found, want)


def test_an_answer_that_can_be_read() -> None:
    #                        prompt     answer       prompt answer
    mask = torch.tensor([[False, False, True, True, True, False, True, True]])
    batch = Batch(
        torch.ones(1, 8, dtype=torch.int64), mask, torch.zeros(1, 8, dtype=torch.int64), torch.arange(8)[None]
    )
    assert asked(batch, 3).int().tolist() == [
        [[0, 0, 1, 1, 0, 0, 1, 0]],  # the prefill's token begins a cycle; the last token of an answer begins none
        [[0, 0, 1, 0, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0, 0, 0, 0]],  # never into the next prompt
    ]


def test_padding_and_documents_that_touch() -> None:
    batch = Batch(
        torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool), torch.tensor([[0, 0, 1, 1, -1]]),
        torch.tensor([[0, 1, 0, 1, 0]]),
    )  # fmt: skip
    assert asked(batch, 9)[0].int().tolist() == [[1, 0, 1, 0, 0]] and not asked(batch, 9)[1:].any()
