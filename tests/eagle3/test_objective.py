"""EAGLE-3's objective against the slow one: losses, counts, metrics, gradients, predictions and lengths, on packed rows."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from eagle3 import reference
from eagle3.reference import Document, document
from understudy.drafters.eagle3 import attention
from understudy.drafters.eagle3.objective import Eagle3Objective, aligned, asked
from understudy.drafting.objective import Features

HALF = 3  # of 5 tokens
# several documents per row, of one token and more; a prompt, an answer that ends, a second turn; masks with holes, empty, whole
ROWS = [
    [document(7, "..#####", 1), document(1, "#", 2), document(9, "..###..##", 3)],
    [document(2, "##", 4), document(3, "...", 5), document(8, "########", 6)],
    [document(6, ".#.##.", 7), document(3, "###", 8)],
]
DOCUMENTS = [d for row in ROWS for d in row]


def places(rows: list[list[Document]]) -> list[tuple[int, int]]:
    """(row, first column) of every document, in the order of the rows."""
    found = []
    for b, row in enumerate(rows):
        column = 0
        for d in row:
            found.append((b, column))
            column += len(d.tokens)
    return found


def agree(objective: Eagle3Objective, rows: list[list[Document]], gap: float = 0.0) -> None:
    """All that the objective says of `rows` is what the slow one says; in training, acceptance rates only where the loss has them."""
    documents = [d for row in rows for d in row]
    want = reference.slow(objective, documents)
    if gap:
        assume(want.gap > gap)
    batch = reference.pack(rows)
    features = reference.features(objective, batch)
    out = objective(features)
    assert int(out.count) == want.cycles
    torch.testing.assert_close(out.loss.detach().double(), want.loss, rtol=1e-4, atol=1e-4)
    compare(reference.gradients(objective, out.loss), want.gradients)
    tokens = sum(len(d.tokens) for d in documents) if objective.config.loss_normalizer == "all" else None
    assert (None if out.divisor is None else int(out.divisor)) == tokens
    steps, drafts = objective.config.ttt_length, objective.drafter.steps
    wanted, looked = (want.metrics(n, drafts) if want.cycles else {} for n in (steps, max(steps, drafts)))
    looks = objective.eval()(features)
    torch.testing.assert_close(looks.loss.detach(), out.loss.detach(), rtol=1e-4, atol=1e-4)
    assert {name: (float(total), float(count)) for name, (total, count) in looks.metrics.items()} == {
        name: pytest.approx(pair, rel=1e-4, abs=1e-4) for name, pair in looked.items()
    }
    without = "-" if objective.config.loss_type in ("tv", "lk") else "overlap"
    assert {name: (float(total), float(count)) for name, (total, count) in out.metrics.items()} == {
        name: pytest.approx(pair, rel=1e-4, abs=1e-4) for name, pair in wanted.items() if not name.startswith(without)
    }
    agree_on_sight(objective, features, want, places(rows))


def agree_on_sight(
    objective: Eagle3Objective, features: Features, want: reference.Slow, places: list[tuple[int, int]]
) -> None:
    """`predictions` and `lengths`."""
    found, columns = objective.predictions(features), features.batch.ids.shape[1]
    begins = {
        places[s.document][0] * columns + places[s.document][1] + s.t + 1: (s.document, s.t)
        for s in want.slots
        if not s.k
    }
    assert found.slots.tolist() == sorted(begins)
    for i, at in enumerate(found.slots.tolist()):
        for k in range(objective.config.ttt_length):
            slot = want.by_place.get((*begins[at], k))
            assert bool(found.asked[k, i]) == (slot is not None)
            if slot is not None:
                assert (int(found.predicted[k, i]), int(found.target[k, i])) == (slot.said, slot.best)
                sure = float(found.pred_conf[k, i]), float(found.target_conf[k, i])
                assert sure == pytest.approx(slot.confidence, rel=1e-3, abs=1e-6)
                if k == 0:
                    torch.testing.assert_close(found.hidden[i].double(), slot.out, rtol=1e-3, atol=1e-3)
    runs = torch.zeros_like(features.batch.ids)
    for at, (d, t) in begins.items():
        runs.view(-1)[at] = want.run(d, t, objective.drafter.steps, text=True)
    assert torch.equal(objective.lengths(features), runs)


def compare(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Relative to the largest entry; where a gradient is zero by nature, to a hundredth of the largest of all."""
    assert list(got) == list(want)
    largest = max(float(gradient.abs().max()) for gradient in want.values())
    for name, gradient in want.items():
        scale = max(float(gradient.abs().max()), largest / 100, 1e-6)
        torch.testing.assert_close(
            got[name].double() / scale, gradient / scale, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fc norm": {"fc_norm": True, "draft_vocab_size": HALF},
    "norm before fc": {"norm_before_fc": True},
    "norm output": {"norm_output": True},
    "norm before residual": {"norm_before_residual": True, "draft_vocab_size": HALF, "out_of_vocab": "keep"},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True, "norm_before_residual": True},
    "all of vLLM's": {"norm_before_fc": True, "norm_output": True, "norm_before_residual": True, "loss_type": "kl"},
    "drop": {"draft_vocab_size": HALF, "out_of_vocab": "drop", "ttt_length": 4},
    "keep": {"draft_vocab_size": HALF, "out_of_vocab": "keep", "loss_type": "kl"},
    "tv": {"draft_vocab_size": HALF, "loss_type": "tv", "out_of_vocab": "keep"},
    "lk": {"draft_vocab_size": HALF, "loss_type": "lk", "loss_normalizer": "all"},
    "tv of all": {"loss_type": "tv", "loss_normalizer": "all"},
    "one step": {"ttt_length": 1},
    "no decay, more steps than tokens": {"ttt_decay": 1.0, "ttt_length": 9},
    "decay": {"ttt_decay": 0.5, "loss_type": "lk"},
    "frozen head": {"train_head": False},
    "two taps": {"taps": [3, 1]},
    "fewer drafts than steps": {"draft_steps": 1},
    "more drafts than steps": {"draft_steps": 5},
}


@pytest.mark.parametrize("case", CASES)
def test_everything_is_what_the_slow_one_says(case):
    objective = reference.objective(reference.small(), **CASES[case])
    agree(objective, ROWS)
    want = {
        name
        for name, _ in objective.drafter.model.named_parameters()
        if name != "lm_head.weight" or case != "frozen head"
    }
    assert {name for name, p in objective.drafter.model.named_parameters() if p.requires_grad} == want


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere2", "granite"])
def test_other_families(family):
    """Softcaps and scales of logits, multipliers of embeddings, head sizes, layer norms."""
    agree(reference.objective(tiny.target(family), draft_vocab_size=tiny.V // 2), ROWS)


def test_the_slow_one_sees_what_it_should():
    """The cases have right and wrong drafts, in and outside the draft vocabulary, and chains that end early."""
    objective = reference.objective(reference.small(), draft_vocab_size=HALF)
    want = reference.slow(objective, DOCUMENTS)
    assert {s.k for s in want.slots} == {0, 1, 2} and want.cycles < len(want.slots) < 3 * want.cycles
    assert 0 < sum(s.counted for s in want.slots) < len(want.slots)
    assert all(0 < sum(s.right for s in want.slots if s.k == k) < sum(s.k == k for s in want.slots) for k in range(3))
    assert {want.run(s.document, s.t, 3) for s in want.slots} >= {0, 1, 2}


@st.composite
def rows_of_documents(draw: st.DrawFn) -> list[list[Document]]:
    """One row to three, each of one document to four, with any mask."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = []
        for _ in range(draw(st.integers(1, 4))):
            length = draw(st.sampled_from([1, 1, 2, 2, 3, 4, 5, 8]))
            mask = draw(st.one_of(st.just([True] * length), st.just([False] * length),
                                  st.lists(st.sampled_from([True, True, False]), min_size=length, max_size=length)))  # fmt: skip
            row.append(Document(document(length, seed=draw(st.integers(0, 999))).tokens, mask))
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(rows_of_documents(), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(1, 5))
def test_ragged_documents_and_masks(rows, steps, reduced, flag, chunk):
    objective = reference.objective(
        reference.small(), ttt_length=steps, draft_vocab_size=HALF if reduced else None, norm_output=flag, loss_chunk=chunk
    )  # fmt: skip
    agree(objective, rows, gap=1e-4)


@given(rows_of_documents(), st.integers(1, 6))
def test_the_mask_is_exact(rows, steps):
    """(t, k) is asked iff x_{t+1} .. x_{t+2+k} are the assistant's, all in one document."""
    found, batch = asked(reference.pack(rows), steps), reference.pack(rows)
    want = torch.zeros_like(found)
    for d, (b, column) in zip([d for row in rows for d in row], places(rows), strict=True):
        for t in range(len(d.tokens)):
            for k in range(steps):
                want[k, b, column + t] = reference.asked(d, t, k)
    assert torch.equal(found, want) and found.shape == (steps, *batch.ids.shape)


@given(rows_of_documents(), st.integers(1, 6))
def test_slots_meet_the_teacher_of_the_token_before_their_draft(rows, steps):
    """Outputs and last states that say where they stand: an output is (slot, step), a last state its row."""
    batch = reference.pack(rows)
    wanted, where = asked(batch, steps), torch.arange(batch.ids.numel()).view(batch.ids.shape).float()
    outs = [torch.stack([where, torch.full_like(where, k)], -1) for k in range(steps)]
    found, met = aligned(Features(batch, {}, where[..., None]), outs, wanted), set()
    for row, k in found.asked.nonzero().tolist():
        slot, step = found.outs[row, k].tolist()
        assert step == k and found.last[row, 0] == found.at[row] == slot + 1 + k
        met.add((k, int(slot)))
    assert met == {(k, slot) for k, slot in wanted.flatten(1).nonzero().tolist()}
    assert found.asked.any(-1).all()


def run(objective: Eagle3Objective, rows: list[list[Document]] = ROWS) -> tuple[Any, dict[str, Tensor]]:
    out = objective(reference.features(objective, reference.pack(rows)))
    return out, reference.gradients(objective, out.loss)


@pytest.mark.parametrize("options", [{}, {"draft_vocab_size": HALF, "norm_output": True, "loss_type": "lk"}])
def test_chunks_are_the_whole(options):
    """Of the loss, and of attention's queries: the same values and gradients."""
    whole, gradients = run(reference.objective(reference.small(), **options))
    calls: list[int] = []
    merged = attention.DraftAttention._merged

    def counted(self: Any, q: Tensor, *rest: Tensor) -> Tensor:
        calls.append(q.shape[2])
        return merged(self, q, *rest)

    for scores, chunk in ((2**26, 1), (2**26, 10), (1, 4096), (4 * 3 * 17 * 5, 7)):
        calls.clear()
        with patch.object(attention, "WHOLE", scores), patch.object(attention.DraftAttention, "_merged", counted):
            objective = reference.objective(reference.small(), loss_chunk=chunk, **options)
            out, found = run(objective)
        assert max(calls) == {2**26: 17, 1: 1}.get(scores, 5)  # queries of a chunk: rows x heads x T scores each
        torch.testing.assert_close(out.loss, whole.loss, rtol=1e-5, atol=1e-5)
        assert {n: tuple(map(float, x)) for n, x in out.metrics.items()} == {
            n: pytest.approx(tuple(map(float, x)), rel=1e-4) for n, x in whole.metrics.items()
        }
        compare(found, {name: g.double() for name, g in gradients.items()})


def test_checkpointed_steps_are_the_same_bit_for_bit_and_computed_twice():
    found, calls = [], []
    for checkpointed in (False, True):
        objective = reference.objective(reference.small(), checkpoint_steps=checkpointed).train()
        count = []
        objective.drafter.model.midlayer.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        found.append(run(objective))
        calls.append(len(count))
    assert torch.equal(found[0][0].loss, found[1][0].loss)
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert calls == [3, 6]


def test_packing_and_batching_change_nothing():
    """A row per document, or all in one row: the same sums."""
    objective = reference.objective(reference.small(), draft_vocab_size=HALF)
    packed, gradients = run(objective)
    for rows in ([[d] for d in DOCUMENTS], [DOCUMENTS], [DOCUMENTS[::-1]]):
        out, found = run(objective, rows)
        torch.testing.assert_close(out.loss, packed.loss, rtol=1e-5, atol=1e-5)
        assert out.count == packed.count
        compare(found, {name: g.double() for name, g in gradients.items()})


def test_nothing_supervised_is_a_zero_that_can_be_differentiated():
    objective = reference.objective(reference.small(), loss_normalizer="all")
    out, gradients = run(objective, [[document(4, "...."), document(1, "#"), document(3, "#.#")]])
    assert out.loss == 0 and out.count == 0 and out.metrics == {} and out.divisor == 8
    assert not any(g.any() for g in gradients.values())


def test_no_gradient_reaches_the_target():
    target = reference.small()
    objective = reference.objective(target)
    features = reference.features(objective, reference.pack(ROWS))
    features = dataclasses.replace(features, last=features.last.requires_grad_())  # type: ignore[union-attr]
    objective(features).loss.backward()
    assert features.last is not None and features.last.grad is None
    assert all(p.grad is None for p in target.model.parameters())


def test_bf16_products_leave_the_target_and_the_loss_alone():
    """As `--mixed-precision bf16` runs it: the drafter's products are rounded; the target's law and the loss are not."""
    objective = reference.objective(tiny.target("llama"), spread=0.05)
    features = reference.features(objective, reference.pack(ROWS))
    losses, autocast, laws = objective._losses, list[bool](), list[Tensor]()

    def watched(logits: Tensor, p: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        autocast.append(torch.is_autocast_enabled("cpu"))
        laws.append(p)
        return losses(logits, p, share)

    with patch.object(objective, "_losses", watched):
        whole, found = objective(features), objective.predictions(features)
        with torch.autocast("cpu", torch.bfloat16):
            out, rounded = objective(features), objective.predictions(features)
    assert autocast == [False, False] and torch.equal(*laws) and out.loss.dtype == torch.float32
    assert torch.equal(rounded.target, found.target) and not torch.equal(rounded.pred_conf, found.pred_conf)
    assert float(out.loss.detach()) == pytest.approx(float(whole.loss.detach()), rel=0.02)
    assert all(g.isfinite().all() for g in reference.gradients(objective, out.loss).values())
