"""DFlash's objective against the slow one: losses, weights, metrics, gradients, predictions and lengths, on packed rows."""

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
from dflash import reference
from dflash.reference import Document, document
from understudy.drafters.dflash import attention
from understudy.drafters.dflash.objective import DFlashObjective
from understudy.drafting.objective import Features

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


def figures(metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[float, float]]:
    return {name: (float(total), float(count)) for name, (total, count) in metrics.items()}


def near(metrics: dict[str, tuple[float, float]]) -> dict[str, Any]:
    return {name: pytest.approx(pair, rel=1e-4, abs=1e-4) for name, pair in metrics.items()}


def agree(objective: DFlashObjective, rows: list[list[Document]], gap: float = 0.0) -> None:
    """All that the objective says of `rows` is what the slow one says."""
    config, model = objective.config, objective.drafter.model
    documents = [d for row in rows for d in row]
    want = reference.slow(objective, documents)
    if gap:
        assume(want.gap > gap)
    features = reference.features(objective, reference.pack(rows))
    out = objective.train()(features)
    assert int(out.count) == len(want.slots)
    torch.testing.assert_close(out.loss.detach().double(), want.loss, rtol=1e-4, atol=1e-4)
    compare(reference.gradients(objective, out.loss), want.gradients)
    taught = "kl" in config.loss_type or config.teacher == "target" or config.confidence_head
    kinds = {"confidence_loss"} if config.confidence_head else set()
    steps = objective.drafter.steps
    if want.slots:
        assert float(out.divisor) == pytest.approx(want.divisor, rel=1e-4)
        meant = "best" if taught else "true"
        assert figures(out.metrics) == near(want.metrics(steps, model.drafts, meant, kinds))
    if steps < model.drafts:
        want = reference.slow(objective, documents, rows=steps + model.first)
    looks = objective.eval()(features)
    torch.testing.assert_close(looks.loss.detach().double(), want.loss, rtol=1e-4, atol=1e-4)
    if want.slots:
        assert figures(looks.metrics) == near(want.metrics(steps, steps, "best", kinds | {"overlap"}))
    agree_on_sight(objective, features, want, places(rows))


def agree_on_sight(
    objective: DFlashObjective, features: Features, want: reference.Slow, places: list[tuple[int, int]]
) -> None:
    """`predictions` and `lengths`."""
    found, columns, steps = objective.predictions(features), features.batch.ids.shape[1], objective.drafter.steps
    begins = {
        places[s.document][0] * columns + places[s.document][1] + s.t: (s.document, s.t) for s in want.slots if not s.k
    }
    assert found.slots.tolist() == sorted(begins) and len(found.predicted) == steps
    for i, at in enumerate(found.slots.tolist()):
        for k in range(steps):
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
        runs.view(-1)[at] = want.run(d, t, steps, "true")
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


SEED = 2  # its drafts are right none to three times in a row
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"position_weights": "none"},
    "gamma": {"gamma": 0.8},
    "dpace": {"position_weights": "dpace"},
    "dpace, alpha 0, the target's token": {"position_weights": "dpace", "dpace_alpha": 0.0, "teacher": "target"},
    "kl": {"loss_type": "kl"},
    "kl and ce": {"loss_type": "ce+kl", "position_weights": "dpace"},
    "all of the kl and the target's token": {"loss_type": "ce+kl", "full_vocab": True, "teacher": "target"},
    "Markov": {"markov_rank": 3},
    "confidence": {"markov_rank": 3, "confidence_head": True},
    "confidence, kl, dpace": {"markov_rank": 2, "confidence_head": True, "loss_type": "ce+kl", "position_weights": "dpace"},
    "window": {"sliding_window": 4},
    "window smaller than a block": {"sliding_window": 2, "block_size": 5},
    "causal full layers": {"causal": True},
    "mixed layers": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "embeddings": {"train_embeddings": True},
    "mask row in the target": {"mask_token_id": 3},
    "mask row of its own embeddings": {"train_embeddings": True, "mask_token_id": 3},
    "smallest block": {"block_size": 2},
    "one row": {"block_size": 2, "markov_rank": 2},
    "blocks longer than answers": {"block_size": 9, "num_draft_layers": 1},
    "one layer, three taps": {"num_draft_layers": 1, "taps": [2, 1, 3]},
    "fewer drafts than rows": {"draft_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_everything_is_what_the_slow_one_says(case):
    agree(reference.objective(reference.small(), seed=SEED, **CASES[case]), ROWS)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere2", "granite"])
def test_other_families(family):
    """Softcaps and scales of logits, multipliers of embeddings, head sizes, layer norms; 97 tokens, of which kl takes 64."""
    agree(reference.objective(tiny.target(family), loss_type="ce+kl", block_size=3), ROWS[:2])


def test_the_slow_one_sees_what_it_should():
    """The cases have right and wrong drafts, and blocks that end early; kl over 64 tokens is not kl over all."""
    want = reference.slow(reference.objective(reference.small(), seed=SEED), DOCUMENTS)
    assert {s.k for s in want.slots} == {0, 1, 2} and 3 * sum(s.k == 0 for s in want.slots) > len(want.slots)
    runs = {m: {want.run(s.document, s.t, 3, m) for s in want.slots if s.k == 0} for m in ("best", "true")}
    assert runs == {"best": {0, 1, 2, 3}, "true": {0, 1, 2}}
    losses = [
        float(
            reference.slow(
                reference.objective(tiny.target("llama"), loss_type="kl", full_vocab=full), DOCUMENTS[:1]
            ).loss
        )
        for full in (False, True)
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


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


OPTIONS = st.fixed_dictionaries(
    {
        "block_size": st.integers(2, 5),
        "loss_chunk": st.integers(1, 5),
        "loss_type": st.sampled_from(["ce", "kl", "ce+kl"]),
        "sliding_window": st.sampled_from([None, 2, 3]),
        "markov_rank": st.sampled_from([0, 2]),
        "position_weights": st.sampled_from(["none", "exp", "dpace"]),
        "num_draft_layers": st.just(1),
    }
)


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(rows_of_documents(), OPTIONS)
def test_ragged_documents_and_masks(rows, options):
    agree(reference.objective(reference.small(), **options), rows, gap=1e-4)


# Nothing else changes anything


def run(objective: DFlashObjective, rows: list[list[Document]] = ROWS) -> tuple[Any, dict[str, Tensor]]:
    out = objective(reference.features(objective, reference.pack(rows)))
    return out, reference.gradients(objective, out.loss)


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 3, "markov_rank": 3, "confidence_head": True, "loss_type": "kl"}]
)
def test_chunks_are_the_whole(options):
    """Of the loss, and of attention's blocks: the same values and gradients."""
    whole, gradients = run(reference.objective(reference.small(), **options))
    rows: list[int] = []
    together = attention.BlockAttention._together

    def counted(self: Any, q: Tensor, *rest: Tensor) -> Tensor:
        rows.append(q.shape[2])
        return together(self, q, *rest)

    for limit, most, chunk in ((128, 2**27, 1), (128, 2**27, 10), (1, 0, 4096), (5 * 4, 0, 7), (5 * 4, 2**27, 4096)):
        rows.clear()
        with (
            patch.multiple(attention, TOGETHER=limit, MOST=most),
            patch.object(attention.BlockAttention, "_together", counted),
        ):
            out, found = run(reference.objective(reference.small(), loss_chunk=chunk, **options))
        assert max(rows) == {128: 8 * 4, 1: 4}.get(limit, 5 * 4)
        # the backward pass makes them again when they are much
        assert sum(rows) == 2 * 8 * 4 * (1 if most else 2)
        torch.testing.assert_close(out.loss, whole.loss, rtol=1e-5, atol=1e-5)
        assert figures(out.metrics) == near(figures(whole.metrics))
        compare(found, {name: g.double() for name, g in gradients.items()})


def test_packing_and_batching_change_nothing():
    """A row per document, or all in one row: the same sums."""
    objective = reference.objective(reference.small())
    packed, gradients = run(objective)
    for rows in ([[d] for d in DOCUMENTS], [DOCUMENTS], [DOCUMENTS[::-1]]):
        out, found = run(objective, rows)
        torch.testing.assert_close(out.loss, packed.loss, rtol=1e-5, atol=1e-5)
        assert out.count == packed.count and float(out.divisor) == pytest.approx(float(packed.divisor))
        compare(found, {name: g.double() for name, g in gradients.items()})


def test_nothing_supervised_is_a_zero_that_can_be_differentiated():
    objective = reference.objective(reference.small(), markov_rank=2, confidence_head=True)
    out, gradients = run(objective, [[document(4, "...."), document(1, "#"), document(3, "#.#")]])
    assert out.loss == 0 and out.count == 0 and out.metrics == {}
    assert not any(g.any() for g in gradients.values()) and len(gradients) > 10
    features = reference.features(objective, reference.pack([[document(4, "....")]]))
    assert objective.predictions(features).slots.tolist() == [] and not objective.lengths(features).any()


def test_no_gradient_reaches_the_target():
    target = reference.small()
    objective = reference.objective(target, loss_type="ce+kl")
    features = reference.features(objective, reference.pack(ROWS))
    features = dataclasses.replace(features, last=features.last.requires_grad_())  # type: ignore[union-attr]
    objective(features).loss.backward()
    assert features.last is not None and features.last.grad is None
    assert all(p.grad is None for p in target.model.parameters())
    names = {name for name, _ in objective.drafter.model.named_parameters()}
    assert (
        not {"embed_tokens.weight", "lm_head.weight"} & names
    )  # frozen and the target's: in no optimizer, in no checkpoint


def test_bf16_products_leave_the_target_and_the_loss_alone():
    """As `--mixed-precision bf16` runs it: the drafter's products are rounded; the target's law, the loss and confidence are not."""
    objective = reference.objective(
        tiny.target("llama"), spread=0.05, loss_type="ce+kl", markov_rank=3, confidence_head=True
    )
    features = reference.features(objective, reference.pack(ROWS))
    laws, sure, teacher = list[Tensor](), list[Tensor](), objective._teacher

    def watched(*where: Any) -> tuple[Tensor, Tensor]:
        law, which = teacher(*where)
        laws.append(law)
        return law, which

    head = objective.drafter.model.confidence_head
    assert head is not None
    head.register_forward_hook(lambda _, given, out: sure.append(out))
    with patch.object(objective, "_teacher", watched):
        whole = objective(features)
        with torch.autocast("cpu", torch.bfloat16):
            out = objective(features)
            found = reference.gradients(objective, out.loss)
    assert torch.equal(*laws) and out.loss.dtype == torch.float32 and {x.dtype for x in sure} == {torch.float32}
    assert not torch.equal(*sure) and float(out.loss.detach()) == pytest.approx(float(whole.loss.detach()), rel=0.02)
    assert all(g.isfinite().all() for g in found.values())
