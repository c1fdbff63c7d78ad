"""The ring against a deque of samples."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from online.fake import newest
from understudy.training.online import DVIRingBuffer, DVITrainSample

D, V = 6, 17
BLOCKS = st.lists(st.integers(0, 6).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k))), max_size=12)


def make(
    capacity: int, store: str = "topk", topk: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0
) -> DVIRingBuffer:
    return DVIRingBuffer(capacity, D, V, store, topk, dtype, "cpu", seed)


def unpacked(batch: dict[str, Tensor | None]) -> list[DVITrainSample]:
    assert tuple(batch) == DVITrainSample._fields
    n = len(batch["token"])  # type: ignore[arg-type]
    rows = [{name: None if value is None else value[i] for name, value in batch.items()} for i in range(n)]
    return [
        DVITrainSample(
            row["hk"],
            int(row["token"]),
            int(row["reward"]),
            int(row["pos"]),
            row["z_phi"],
            row["z_idx"],
            row["z_val"],
            bool(row["is_first_reject"]),
        )
        for row in rows
    ]


def same(a: DVITrainSample, b: DVITrainSample) -> bool:
    def equal(x: object, y: object) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    return all(equal(x, y) for x, y in zip(a, b, strict=True))


def by_id(sample: DVITrainSample) -> DVITrainSample:
    if sample.z_idx is None or sample.z_val is None:
        return sample
    order = sample.z_idx.argsort()
    return sample._replace(z_idx=sample.z_idx[order], z_val=sample.z_val[order])


@settings(max_examples=60, deadline=None)
@given(BLOCKS, st.integers(1, 9), st.sampled_from(["full", "topk"]), st.sampled_from([1, 5, 17, 99]))
def test_ring_is_a_deque_of_what_was_judged(
    blocks: list[tuple[int, int]], capacity: int, store: str, topk: int
) -> None:
    torch.manual_seed(0)
    buffer, oracle = make(capacity, store, topk), deque[DVITrainSample](maxlen=capacity)
    for k, m in blocks:
        hidden, logits = torch.randn(k, D), torch.randn(k + 1, V)
        tokens = torch.randint(V, (k,)).tolist()
        buffer.push_block(hidden, tokens, logits, m)
        for i in range(min(m + 1, k)):  # after the first reject nothing is on the text
            best = sorted(range(V), key=lambda v: -logits[i, v])[: min(topk, V)]
            best.sort()
            idx = torch.tensor(best, dtype=torch.int32) if store == "topk" else None
            val = logits[i][best] if store == "topk" else None
            z = logits[i] if store == "full" else None
            oracle.append(DVITrainSample(hidden[i].half(), tokens[i], int(i < m), i + 1, z, idx, val, i == m))
    assert buffer.size == len(oracle) <= capacity
    last = [by_id(s) for s in unpacked(newest(buffer, capacity))]
    assert all(same(a, b) for a, b in zip(last, reversed(oracle), strict=True))
    drawn = [by_id(s) for s in unpacked(buffer.sample(capacity))]  # as many as there are: each of them once
    assert len(drawn) == len(oracle)
    assert all(any(same(a, b) for b in oracle) for a in drawn)


STEPS = st.lists(st.tuples(st.sampled_from(["push", "sample", "take"]), st.integers(1, 7)), max_size=30)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 9))
def test_unseen_is_what_was_handed_out_by_nothing_yet(steps: list[tuple[str, int]], capacity: int) -> None:
    buffer, held, seen, pushed = make(capacity), deque[int](maxlen=capacity), set[int](), 0
    for what, n in steps:
        if what == "push":
            for _ in range(n):
                buffer.push_topk(torch.zeros(D), 0, torch.zeros(V), 1, pushed, False)
                held.append(pushed)
                pushed += 1
        else:
            unseen = [i for i in reversed(held) if i not in seen]
            batch = (buffer.sample if what == "sample" else buffer.take_unseen)(n)
            got: list[int] = batch["pos"].tolist()  # type: ignore[union-attr]
            assert what == "sample" or got == unseen[:n]
            seen.update(got)
        assert buffer.unseen == sum(i not in seen for i in held)


@pytest.mark.parametrize("store", ["full", "topk"])
def test_pushes_one_by_one_equal_a_block(store: str) -> None:
    torch.manual_seed(1)
    hidden, logits = torch.randn(4, D), torch.randn(5, V)
    whole, single = make(8, store), make(8, store)
    assert whole.push_block(hidden, [3, 1, 4, 1], logits, 2) == 3
    for i, token in enumerate([3, 1, 4]):
        push = single.push_full if store == "full" else single.push_topk
        push(hidden[i], token, logits[i], int(i < 2), i + 1, i == 2)
    for a, b in zip(unpacked(whole.sample(3)), unpacked(single.sample(3)), strict=True):
        assert same(by_id(a), by_id(b))


def test_types_and_shapes_are_those_of_the_document() -> None:
    for store, topk in (("full", 5), ("topk", 5), ("topk", 1024)):
        buffer = make(16, store, topk, torch.float16)
        buffer.push_block(torch.randn(4, D).bfloat16(), [1, 2, 3, 4], torch.randn(5, V).bfloat16(), 4)
        batch = buffer.sample(3)
        assert batch["hk"].dtype == torch.float16 and batch["hk"].shape == (3, D)  # type: ignore[union-attr]
        if store == "full":
            assert batch["z_idx"] is None and batch["z_val"] is None
            assert batch["z_phi"].shape == (3, V) and batch["z_phi"].dtype == torch.float16  # type: ignore[union-attr]
        else:
            k = min(topk, V)
            assert batch["z_phi"] is None
            assert batch["z_idx"].shape == (3, k) and batch["z_idx"].dtype == torch.int32  # type: ignore[union-attr]
            assert batch["z_val"].shape == (3, k) and batch["z_val"].dtype == torch.float16  # type: ignore[union-attr]


def test_bytes_per_slot_at_the_size_of_vicuna() -> None:
    topk = DVIRingBuffer(2, 4096, 32000, "topk", 1024, torch.float16, "cpu")
    assert topk.bytes_per_slot == 2 * 4096 + 16 + 1024 * (4 + 2)
    full = DVIRingBuffer(2, 4096, 32000, "full", 1024, torch.float16, "cpu")
    assert full.bytes_per_slot == 2 * 4096 + 16 + 2 * 32000
    wide = DVIRingBuffer(2, 4096, 32000, "full", 1024, torch.float32, "cpu")
    assert wide.bytes_per_slot - full.bytes_per_slot == 2 * 32000


@pytest.mark.parametrize("store", ["full", "topk"])
@pytest.mark.parametrize("topk", [5, V])
def test_numbers_beyond_half_precision_stay_finite(store: str, topk: int) -> None:
    buffer = make(4, store, topk, torch.float16)
    logits = torch.linspace(-1e6, 1e6, V).repeat(2, 1)
    logits[0, 0] = -torch.inf
    buffer.push_block(torch.full((2, D), 1e6), [1, 2], logits, 2)
    batch = buffer.sample(2)
    for name in ("hk", "z_phi", "z_val"):
        assert batch[name] is None or batch[name].isfinite().all()  # type: ignore[union-attr]
    assert batch["hk"].max() == 65504  # type: ignore[union-attr]


def test_sampling_has_a_stream_of_its_own() -> None:
    def draws(seed: int) -> list[list[int]]:
        torch.manual_seed(torch.seed())
        buffer = make(32, seed=seed)
        for i in range(32):
            buffer.push_topk(torch.zeros(D), i % V, torch.randn(V), 1, i, False)
        return [buffer.sample(6)["pos"].tolist() for _ in range(4)]  # type: ignore[union-attr]

    before = torch.random.get_rng_state()
    assert draws(0) == draws(0) != draws(1)
    torch.random.set_rng_state(before)
    make(4).push_topk(torch.zeros(D), 1, torch.zeros(V), 1, 1, False)
    make(4).sample(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(set(draws(0)[0])) == 6  # without replacement


def test_inference_tensors_are_copied_and_later_changes_do_not_show() -> None:
    buffer = make(4)
    with torch.inference_mode():
        hidden, logits = torch.ones(2, D), torch.randn(2, V)
    buffer.push_block(hidden, [1, 2], logits, 2)
    before = buffer.sample(2)["hk"].clone()  # type: ignore[union-attr]
    with torch.inference_mode():
        hidden.zero_()
    assert torch.equal(buffer.sample(2)["hk"], before)  # type: ignore[arg-type]
    assert not buffer.sample(2)["hk"].is_inference()  # type: ignore[union-attr]
