"""Packing: literal rows, and that packed rows hold exactly what unpacked ones do."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from understudy.data.encode import Encoded
from understudy.data.packing import Packed, Packer, collate
from understudy.drafting.objective import Batch


def document(length, first=10):
    """Ids first, first + 1, ...; every third token is supervised, from the second on."""
    return Encoded(list(range(first, first + length)), [i % 3 == 1 for i in range(length)])


def test_collate_literally():
    packed = collate([[document(3), document(2, 20)], [document(4, 30)], []], pad_id=7, width=6)
    assert packed.ids.tolist() == [
        [10, 11, 12, 20, 21, 7],  # two documents, then padding
        [30, 31, 32, 33, 7, 7],
        [7, 7, 7, 7, 7, 7],  # an empty row fills up a batch
    ]
    assert packed.mask.astype(int).tolist() == [[0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert packed.documents.tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1], [-1] * 6]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0], [0] * 6]


def test_collate_to_the_longest_row():
    assert collate([[document(3)], [document(5)]], pad_id=0).ids.shape == (2, 5)
    assert collate([[]], pad_id=0).ids.tolist() == [[0]]


def test_a_batch_is_made_of_it():
    packed = collate([[document(3), document(2)]], pad_id=0, width=8)
    batch = Batch(*packed.tensors())
    assert (batch.ids.dtype, batch.mask.dtype) == (torch.int64, torch.bool)
    assert (batch.documents.dtype, batch.positions.dtype) == (torch.int64, torch.int64)
    for name in Packed._fields:
        assert getattr(batch, name).tolist() == getattr(packed, name).tolist()


def packed_rows(lengths, capacity, rows):
    packer: Packer[int] = Packer(capacity, rows)
    closed, most = [], 0
    for i, length in enumerate(lengths):
        if (row := packer.add(i, length)) is not None:
            closed.append(row)
        most = max(most, len(packer.open))
    while (row := packer.pop()) is not None:
        closed.append(row)
    return closed, most


def test_best_fit_literally():
    #        10 slots, 2 open rows: 0 -> A; 1 does not fit there -> B; 2 -> A, the fuller one; 3 -> B, full, closed
    #        4 fits nowhere, A is alone -> C; 5 fits nowhere, both are open -> A, the fuller one, is closed
    assert packed_rows([6, 5, 3, 5, 8, 9], 10, 2) == ([[1, 3], [0, 2], [4], [5]], 2)
    assert packed_rows([5, 6, 4], 10, 2)[0] == [[1, 2], [0]]  # 2 fits both: the fuller one, not the first
    assert packed_rows([5, 8, 6], 10, 2)[0] == [
        [1],
        [0],
        [2],
    ]  # 2 fits neither: the fuller one is closed, not the first
    assert packed_rows([6, 10, 4], 10, 2)[0] == [[1], [0, 2]]  # a full document waits for nobody
    assert packed_rows([1, 2, 3], 10, 0) == ([[0], [1], [2]], 0)  # rows=0: alone


@given(st.lists(st.integers(1, 12)), st.integers(0, 5))
def test_every_document_once_and_no_row_too_full(lengths, rows):
    closed, most = packed_rows(lengths, 12, rows)
    assert sorted(i for row in closed for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 12 for row in closed)
    assert most <= rows


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(0, 5))
def test_packed_is_unpacked(lengths, rows):
    """Reading the documents out of packed rows by id and position gives each of them, whole and in order."""
    documents = [document(length, 100 * i) for i, length in enumerate(lengths)]
    closed, _ = packed_rows(lengths, 12, rows)
    packed = collate([[documents[i] for i in row] for row in closed], pad_id=-5, width=12)
    found = {}
    for b, row in enumerate(closed):
        for d, i in enumerate(row):
            slots = np.flatnonzero(packed.documents[b] == d)
            assert packed.positions[b][slots].tolist() == list(range(lengths[i]))
            found[i] = Encoded(packed.ids[b][slots].tolist(), packed.mask[b][slots].tolist())
        padding = packed.documents[b] == -1
        assert not packed.mask[b][padding].any()
        assert (packed.ids[b][padding] == -5).all()
        assert (packed.positions[b][padding] == 0).all()
    assert [found[i] for i in range(len(lengths))] == documents
