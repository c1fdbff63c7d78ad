"""Divergences and the losses of DVI against loops over single probabilities, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from online.fake import World
from understudy.ops.divergences import forward_kl, log_law, masked_mean, token_log_prob
from understudy.training.online.buffer import Batch
from understudy.training.online.losses import dvi_losses

TAU = 1.5


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    exps = [math.exp((x - max(row)) / tau) for x in row]
    return [e / sum(exps) for e in exps]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def test_divergences_are_those_of_the_textbook() -> None:
    torch.manual_seed(0)
    z, l = 3 * torch.randn(5, 7), 3 * torch.randn(5, 7)
    log_p, log_q = log_law(z, TAU), log_law(l)
    for i in range(5):
        p, q = softmax(z[i].tolist(), TAU), softmax(l[i].tolist())
        assert forward_kl(log_p, log_q)[i].item() == pytest.approx(kl(p, q), abs=1e-5)
        assert token_log_prob(l, torch.full((5,), 2))[i].item() == pytest.approx(math.log(q[2]), abs=1e-5)


def test_mean_over_nothing_is_zero() -> None:
    values = torch.tensor([1.0, 3.0, 8.0])
    assert masked_mean(values, torch.tensor([1, 0, 1])) == 4.5
    assert masked_mean(values, torch.zeros(3)) == 0


def slow(draft: Tensor, batch: Batch, baseline: float) -> dict[str, Tensor]:
    """The losses sample by sample in fp64, by autograd; the laws over the stored tokens are made by hand."""
    terms: dict[str, list[Tensor]] = {name: [] for name in ("kd", "ce", "pg", "kl", "entropy")}
    for i, row in enumerate(draft):
        if batch["z_phi"] is not None:
            kept, z = list(range(len(row))), batch["z_phi"][i].double()
        else:
            assert batch["z_idx"] is not None and batch["z_val"] is not None
            kept, z = batch["z_idx"][i].tolist(), batch["z_val"][i].double()
        p = (z / TAU).exp() / (z / TAU).exp().sum()
        q = row[kept].exp() / row[kept].exp().sum()
        terms["kd"].append((p * (p.log() - q.log())).sum())
        terms["kl"].append((q * (q.log() - p.log())).sum())
        terms["entropy"].append(-(q * q.log()).sum())
        chosen = (row.exp() / row.exp().sum())[int(batch["token"][i])].log()  # type: ignore[index]
        reward, first = int(batch["reward"][i]), bool(batch["is_first_reject"][i])  # type: ignore[index]
        if reward == 1:
            terms["ce"].append(-chosen)
        if reward == 1 or first:
            terms["pg"].append(-(reward - baseline) * chosen)
    return {name: torch.stack(values).mean() if values else draft.sum() * 0 for name, values in terms.items()}


WEIGHTS = {"kd": 0.5, "ce": 0.4, "pg": 0.2, "kl": 0.7, "entropy": 0.3}


@pytest.mark.parametrize("store", ["full", "topk"])
@pytest.mark.parametrize("only", ["kd", "ce", "pg", "kl", "entropy", "all"])
def test_losses_and_their_written_out_gradient(store: str, only: str) -> None:
    world = World(vocab=23, width=8)
    batch = world.batch(12, world.drafter(), store, topk=9)
    assert 0 < batch["reward"].sum() < 12  # type: ignore[union-attr]
    batch["is_first_reject"] = batch["is_first_reject"] & (torch.arange(12) < 8)  # some rows are neither kind
    draft = torch.randn(12, 23)
    weights = {name: w if only in (name, "all") else 0.0 for name, w in WEIGHTS.items()}
    losses, total, gradient = dvi_losses(draft, batch, TAU, 0.3, weights)
    exact = draft.double().requires_grad_()
    oracle = slow(exact, batch, 0.3)
    for name, value in losses._asdict().items():
        assert value.item() == pytest.approx(oracle[name].item(), rel=1e-4, abs=1e-5), name
    loss = sum((-1 if name == "entropy" else 1) * w * oracle[name] for name, w in weights.items() if w)
    assert isinstance(loss, Tensor)
    assert total.item() == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, exact)[0].float(), rtol=1e-3, atol=1e-6)
    assert gradient.abs().max() > 1e-4


def test_all_of_the_vocabulary_as_top_k_equals_full() -> None:
    world = World(vocab=23, width=8)
    drafter = world.drafter()
    full, cut = world.buffer(32, "full"), world.buffer(32, "topk", topk=1000)
    for _ in range(12):
        hidden = world.states(3)
        logits = hidden @ world.verify.T
        for buffer in (full, cut):
            buffer.push_block(hidden, [1, 2, 3], logits, 1)
    a, b = full.sample(16), cut.sample(16)
    draft = drafter.head_logits(a["hk"].float()).detach()  # type: ignore[union-attr]
    one, other = dvi_losses(draft, a, TAU, 0.2, WEIGHTS), dvi_losses(draft, b, TAU, 0.2, WEIGHTS)
    torch.testing.assert_close(one[2], other[2])
    torch.testing.assert_close(torch.stack(one[0]), torch.stack(other[0]))


def test_nothing_accepted_gives_no_cross_entropy() -> None:
    world = World()
    batch = world.batch(8, world.drafter())
    batch |= {"reward": torch.zeros(8, dtype=torch.int64), "is_first_reject": torch.ones(8, dtype=torch.bool)}
    losses, total, gradient = dvi_losses(
        torch.randn(8, 50), batch, TAU, 0.0, {**dict.fromkeys(WEIGHTS, 0.0), "ce": 1.0}
    )
    assert losses.ce == 0 and total == 0 and not gradient.any()


def test_an_infinite_loss_of_weight_zero_adds_nothing() -> None:
    world = World()
    batch = world.batch(8, world.drafter(), "full")
    batch["z_phi"] = torch.full_like(batch["z_phi"], -1e38)  # type: ignore[arg-type]
    batch["z_phi"][:, 0] = 1e38
    losses, total, gradient = dvi_losses(
        torch.randn(8, 50), batch, 0.01, 0.0, {**dict.fromkeys(WEIGHTS, 0.0), "ce": 1.0}
    )
    assert not losses.kl.isfinite()
    assert total.isfinite() and gradient.isfinite().all()


class Watch(TorchDispatchMode):
    """Follows what is computed from the stored verifier logits and notes any of it that is as wide as the vocabulary."""

    def __init__(self, batch: Batch, width: int) -> None:
        super().__init__()
        self.derived = {id(batch[name]) for name in ("z_idx", "z_val", "z_phi") if batch[name] is not None}
        self.kept: list[object] = []  # alive, so that no id is given twice
        self.width, self.dense = width, list[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        out = func(*args, **kwargs)
        # `scatter_add_` writes the drafter's gradient: [n, V] by nature, and of the drafter
        if any(id(x) in self.derived for x in flat) and func is not torch.ops.aten.scatter_add_.default:
            for made in torch.utils._pytree.tree_leaves(out):
                self.derived.add(id(made))
                self.kept.append(made)
                if isinstance(made, Tensor) and made.ndim and made.shape[-1] == self.width:
                    self.dense.append(str(func))
        return out


def test_top_k_builds_no_dense_verifier_tensor() -> None:
    world = World(vocab=211, width=8)
    batch = world.batch(12, world.drafter(), "topk", topk=16)
    draft = torch.randn(12, 211)
    with Watch(batch, 211) as watch:
        dvi_losses(draft, batch, TAU, 0.3, WEIGHTS)
    assert len(watch.derived) > 8 and not watch.dense
    with Watch(batch, 211) as watch:  # what the test would see if somebody did
        torch.full((12, 211), -1e4).scatter(1, batch["z_idx"].long(), batch["z_val"])  # type: ignore[union-attr, arg-type]
    assert watch.dense
    full = world.batch(12, world.drafter(), "full")
    with Watch(full, 211) as watch:
        dvi_losses(draft, full, TAU, 0.3, WEIGHTS)
    assert watch.dense
