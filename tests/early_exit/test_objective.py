"""The offline objective of an early exit, against a loop over slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from understudy.drafters.early_exit.adapter import Adapter
from understudy.drafters.early_exit.config import DVIConfig, ExitConfig
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafters.early_exit.head import DrafterHead
from understudy.drafters.early_exit.objective import ExitObjective, ExitObjectiveConfig, begins, runs, supervised
from understudy.drafting.objective import Batch, Features


def batch() -> Batch:
    """Two rows: documents of 6 and 5 slots and 3 of padding; one of 14."""
    ids = torch.randint(0, tiny.V, (2, 14), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 6 + [1] * 5 + [-1] * 3, [0] * 14])
    positions = torch.tensor([[*range(6), *range(5), 0, 0, 0], [*range(14)]])
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 0, 0], [0] * 7 + [1] * 7], dtype=torch.bool)
    return Batch(ids, mask, documents, positions)


def features(target) -> Features:
    generator = torch.Generator().manual_seed(2)
    shape = (2, 14, target.hidden_size)
    return Features(batch(), {2: torch.randn(shape, generator=generator)}, torch.randn(shape, generator=generator))


def trained(target, kind: str) -> ExitObjective:
    torch.manual_seed(5)
    if kind == "adapter":
        adapter = Adapter.identity(target, 2)
        torch.nn.init.normal_(adapter.block.self_attn.o_proj.weight, std=0.3)
        drafter = ExitDrafter(target, ExitConfig(steps=2), adapter)
    else:
        head = DrafterHead(target, 3, 3.0)
        torch.nn.init.normal_(head.proj.B, std=0.3)
        drafter = ExitDrafter(target, DVIConfig(steps=2), None, head)
    return ExitObjective(drafter, ExitObjectiveConfig(loss_chunk=4))


def test_supervised_slots_are_those_before_the_assistants_tokens():
    want = [[0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0], [0] * 6 + [1] * 7 + [0]]
    # slot 5 is the last of its document: the token after it belongs to another one, although it is supervised there
    assert supervised(batch()).int().tolist() == want


def slow(objective: ExitObjective, f: Features):
    """Slot by slot, in whole rows: (loss, count, right)."""
    drafter, target = objective.drafter, objective.drafter.target
    loss, right = torch.zeros(()), {}
    for b in range(2):
        for t in range(13):
            if not (f.batch.mask[b, t + 1] and f.batch.documents[b, t] == f.batch.documents[b, t + 1]):
                continue
            start = t - int(f.batch.positions[b, t])
            states = f.taps[2][b, start : t + 1]
            if drafter.adapter is not None:
                n = states.shape[0]
                read = drafter.adapter(states[None], torch.arange(n)[None], torch.zeros(1, n, dtype=torch.int64))[
                    0, -1:
                ]
            else:
                read = target.norm(states[-1:])
            q = drafter.head_logits(read)[0].log_softmax(-1)
            teacher = target.head(f.last[b, t][None])[0]
            loss = loss - (teacher.softmax(-1) * q).sum()
            right[b, t] = bool(q.argmax() == teacher.argmax())
    return loss, len(right), right


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", ["adapter", "head"])
def test_values_and_gradients_are_the_slow_ones(family, kind):
    target = tiny.target(family)
    f = features(target)
    objective = trained(target, kind)
    out = objective(f)
    loss, count, right = slow(objective, f)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    assert len(parameters) == (6 if kind == "adapter" else 2)
    want = torch.autograd.grad(loss, parameters)
    got = torch.autograd.grad(out.loss, parameters)
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-4)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert int(out.count) == count and out.metrics["acc_1"][0] == sum(right.values())


def test_chunks_do_not_change_the_loss():
    target = tiny.target("llama")
    f, sums = features(target), []
    for chunk in (1, 5, 1000):
        objective = trained(target, "head")
        objective.config = ExitObjectiveConfig(loss_chunk=chunk)
        sums.append(objective(f).loss.detach())
    torch.testing.assert_close(sums[0], sums[1])
    torch.testing.assert_close(sums[1], sums[2])


def test_nothing_supervised_is_a_zero_that_can_be_differentiated():
    target = tiny.target("llama")
    f = features(target)
    empty = Batch(f.batch.ids, torch.zeros_like(f.batch.mask), f.batch.documents, f.batch.positions)
    out = trained(target, "adapter")(Features(empty, f.taps, f.last))
    out.loss.backward()
    assert out.loss == 0 and out.count == 0


def drafted(right, slots, sure, t: int, most: int) -> int:
    """Accepted drafts of a cycle after slot t: draft by draft, as decoding goes."""
    n = 0
    while n < most and t + n < len(right) and slots[t + n] and right[t + n]:
        n += 1
        if not sure[t + n - 1]:
            break
    return n


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 5), st.booleans())
def test_runs_of_right_slots(data, most, asks):
    length = data.draw(st.integers(1, 12))
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    right, slots = data.draw(bits), data.draw(bits)
    sure = data.draw(bits) if asks else [True] * length
    want = [drafted(right, slots, sure, t, most) for t in range(length)]
    found = runs(torch.tensor([right]), torch.tensor([slots]), most, torch.tensor([sure]) if asks else None)
    assert found[0].tolist() == want


def test_cycles_begin_after_the_assistants_tokens_that_another_one_follows():
    want = [[0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0], [0] * 7 + [1] * 6 + [0]]
    # not slot 3, which ends its answer; not slot 5, whose next token is another document's
    assert begins(batch()).int().tolist() == want


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", ["adapter", "head"])
def test_predictions_and_lengths_are_the_slow_ones(family, kind):
    """Logits of every slot by itself; the text is made one that some drafts hit."""
    target, steps = tiny.target(family), 3
    objective = trained(target, kind)
    objective.drafter.steps = steps
    objective.config = ExitObjectiveConfig(loss_chunk=4)
    f = features(target)
    with torch.no_grad():
        laws = objective.drafter.head_logits(objective.reads(f).flatten(0, 1)).softmax(-1).unflatten(0, (2, 14))
        teacher = target.head(f.last).argmax(-1)
    says, slots = laws.argmax(-1), begins(batch())
    threshold = float(laws.max(-1).values[slots].sort().values[4:6].mean())  # between two: rounding decides nothing
    objective.drafter.config = objective.drafter.config.model_copy(update={"threshold": threshold})
    hits = torch.rand(2, 13, generator=torch.Generator().manual_seed(4)) < 0.7
    ids = f.batch.ids.clone()
    ids[:, 1:] = torch.where(hits, says[:, :-1], ids[:, 1:])
    f = Features(Batch(ids, f.batch.mask, f.batch.documents, f.batch.positions), f.taps, f.last)

    found = objective.predictions(f)
    assert found.slots.tolist() == slots.flatten().nonzero()[:, 0].tolist() and len(found.slots) == 9
    assert found.predicted.tolist() == [says[slots].tolist()] and found.target.tolist() == [teacher[slots].tolist()]
    at = laws[slots]
    torch.testing.assert_close(found.pred_conf[0], at.max(-1).values)
    torch.testing.assert_close(found.target_conf[0], at[torch.arange(9), teacher[slots]])
    assert found.asked.shape == (1, 9) and found.asked.all()
    norm = objective.drafter.norm if kind == "head" else objective.drafter.adapter.norm
    torch.testing.assert_close(norm(found.hidden), objective.reads(f)[slots])
    assert not torch.allclose(found.hidden, objective.reads(f)[slots], atol=1e-2)

    right = torch.zeros_like(slots)
    right[:, :-1] = says[:, :-1] == ids[:, 1:]
    sure = laws.max(-1).values >= threshold
    assert 2 < int(sure[slots].sum()) < 7
    want = [
        [drafted(right[b].tolist(), slots[b].tolist(), sure[b].tolist(), t, steps) for t in range(14)] for b in range(2)
    ]
    assert objective.lengths(f).tolist() == want and max(map(max, want)) > 1
    assert not any(x.requires_grad for x in (found.pred_conf, found.hidden, objective.lengths(f)))


def test_the_simulated_accept_length_knows_the_threshold():
    target = tiny.target("llama")
    f, simulated = features(target), []
    for threshold in (0.0, 1.0):
        objective = trained(target, "adapter")
        objective.drafter.config = ExitConfig(steps=2, threshold=threshold)
        agree = Features(f.batch, f.taps, objective.reads(f).detach())  # the head then reads what the drafter's does
        total, count = objective(agree).metrics["tau_sim"]
        simulated.append(float(total / count))
    # all drafts are right: two of them where the answer goes on, or one, after which nobody is sure enough
    assert simulated[1] == 2.0 < simulated[0] <= 3.0


def test_training_the_head_raises_agreement():
    target = tiny.target("llama")
    f = features(target)
    objective = trained(target, "head")
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=0.05)
    first = float(objective(f).loss)
    for _ in range(60):
        out = objective(f)
        optimizer.zero_grad()
        (out.loss / out.count).backward()
        optimizer.step()
    assert float(out.loss) < 0.8 * first
