"""The KV cache: rows go where the pass is, growing and forking copy them, keeping a path makes it contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.target.cache import GROWTH, KVCache

LAYERS, HEADS, SIZE = 3, 2, 4


def states(first: int, count: int, layer: int) -> Tensor:
    """[1, H, count, d]: each row holds its own number and layer."""
    rows = torch.arange(first, first + count, dtype=torch.float32) + 1000 * layer
    return rows[None, None, :, None].expand(1, HEADS, count, SIZE)


def filled(rows: int, capacity: int = 0) -> KVCache:
    cache = KVCache(LAYERS)
    cache.reserve(max(rows, capacity))
    for layer in range(LAYERS):
        cache.update(states(0, rows, layer), -states(0, rows, layer), layer)
    return cache


def held(cache: KVCache, layer: int, length: int) -> list[int]:
    keys, values = cache.rows(layer, length)
    assert torch.equal(keys, -values)
    assert torch.equal(keys, keys[:, :1, :, :1].expand_as(keys))
    return [int(x) - 1000 * layer for x in keys[0, 0, :, 0]]


def test_update_writes_at_start_and_returns_all_rows() -> None:
    cache = filled(5)
    cache.start = 3
    assert cache.get_seq_length() == 3
    keys, values = cache.update(states(70, 2, 1), -states(70, 2, 1), 1)
    assert [int(x) - 1000 for x in keys[0, 0, :, 0]] == [0, 1, 2, 70, 71]
    assert keys.shape == values.shape == (1, HEADS, 5, SIZE)
    assert keys.untyped_storage().data_ptr() == cache.rows(1, 5)[0].untyped_storage().data_ptr(), "a view, not a copy"
    assert held(cache, 0, 5) == [0, 1, 2, 3, 4], "other layers are left alone"


def test_growth_keeps_rows_and_happens_seldom() -> None:
    cache = filled(10)
    assert cache.capacity == GROWTH
    grown = 0
    for row in range(10, 5 * GROWTH):
        before = cache.capacity
        cache.reserve(row + 1)
        grown += cache.capacity != before
        cache.start = row
        for layer in range(LAYERS):
            cache.update(states(row, 1, layer), -states(row, 1, layer), layer)
    assert grown == 3 and cache.capacity % GROWTH == 0
    for layer in range(LAYERS):
        assert held(cache, layer, 5 * GROWTH) == list(range(5 * GROWTH))


def test_reserving_less_changes_nothing() -> None:
    cache = filled(10, capacity=600)
    slab, capacity = cache.keys[0], cache.capacity
    cache.reserve(20)
    assert cache.capacity == capacity and cache.keys[0] is slab


def test_keep_moves_the_path() -> None:
    cache = filled(12)
    cache.keep(4, [0, 2, 3, 6])
    for layer in range(LAYERS):
        assert held(cache, layer, 8) == [0, 1, 2, 3, 4, 6, 7, 10]


def test_keep_where_rows_overlap() -> None:
    cache = filled(12)
    cache.keep(0, [1, 2, 3, 4, 5, 7])  # each row moves to where the one before it was
    assert held(cache, 2, 6) == [1, 2, 3, 4, 5, 7]


def test_keep_skips_layers_that_were_never_written() -> None:
    cache = KVCache(2)
    cache.reserve(4)
    cache.update(states(0, 4, 1), -states(0, 4, 1), 1)
    cache.keep(0, [0, 3])
    assert held(cache, 1, 2) == [0, 3] and cache.written == [False, True]


def test_fork_is_a_copy() -> None:
    cache = filled(8)
    other = cache.fork(6)
    assert other.capacity == cache.capacity
    for layer in range(LAYERS):
        assert held(other, layer, 6) == [0, 1, 2, 3, 4, 5]
    other.start = 2
    other.update(states(90, 2, 0), -states(90, 2, 0), 0)
    cache.start = 4
    cache.update(states(50, 1, 0), -states(50, 1, 0), 0)
    assert held(cache, 0, 6) == [0, 1, 2, 3, 50, 5]
    assert held(other, 0, 6) == [0, 1, 90, 91, 4, 5]


def test_a_fork_grows_by_itself() -> None:
    cache = filled(8)
    other = cache.fork(8)
    other.reserve(GROWTH + 1)
    assert cache.capacity == GROWTH < other.capacity
    assert held(other, 2, 8) == held(cache, 2, 8)


def test_layers_may_differ_in_shape() -> None:
    cache = KVCache(2)
    cache.reserve(3)
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 6), 0)
    cache.update(torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8), 1)
    assert [tuple(x.shape) for x in (*cache.rows(0, 3), *cache.rows(1, 2))] == [
        (1, 2, 3, 4),
        (1, 2, 3, 6),
        (1, 1, 2, 8),
        (1, 1, 2, 8),
    ]
