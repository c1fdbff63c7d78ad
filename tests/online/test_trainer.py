"""One update: what it lowers, how it is bounded, and what brings the last good weights back."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from online.fake import FakeDrafter, World
from understudy.core.errors import UserError
from understudy.drafting.lora import lora_state_dict
from understudy.training.online import OnlineTrainer, PiecewiseSchedule
from understudy.training.online import trainer as module
from understudy.training.online.buffer import Batch
from understudy.training.online.losses import dvi_losses
from understudy.training.online.pace import PAUSE, SMALLEST
from understudy.training.online.trainer import WATCH, Plan


def trainer(
    drafter: FakeDrafter,
    lr: float = 1e-2,
    max_ms: float = 0,
    guard: int = 0,
    store: str = "topk",
    ema: float = 0.9,
    **weights: float,
) -> OnlineTrainer:
    schedule = PiecewiseSchedule(**{"warmup": 1000, "kl0": 1.0, "klmin": 0.1, "pgmax": 0.2, **weights})  # type: ignore[arg-type]
    return OnlineTrainer(drafter, lr, 1.5, schedule, max_ms, store, 20, 50, baseline_ema=ema, guard=guard)


ONLY = {"kl0": 0.0, "klmin": 0.0, "pgmax": 0.0, "kd0": 0.0, "ce": 0.0}


@pytest.mark.parametrize("store", ["full", "topk"])
def test_kd_falls_and_the_head_agrees_more(store: str) -> None:
    world = World()
    drafter = world.drafter()
    batch, held_out = world.batch(256, drafter, store), world.batch(256, drafter, store)
    frozen = lora_state_dict(drafter)
    learner = trainer(drafter, store=store)

    def kd(of: Batch) -> float:
        logits = drafter.head_logits(of["hk"].float())  # type: ignore[union-attr]
        return dvi_losses(logits, of, 1.5, 0.0, learner.schedule.weights())[0].kd.item()

    before = kd(held_out)
    first = learner.step(batch, 0)
    for i in range(150):
        last = learner.step(batch, i)
    assert last["kd"] < 0.5 * first["kd"]
    assert kd(held_out) < 0.7 * before
    assert all(not torch.equal(frozen[name], now) for name, now in lora_state_dict(drafter).items())


@pytest.mark.parametrize(
    ("loss", "weight", "better"),
    [("kd", "kd0", -1), ("ce", "ce", -1), ("kl", "kl0", -1), ("entropy", "entropy", 1)],
)
def test_each_loss_alone_moves_its_own_number(loss: str, weight: str, better: int) -> None:
    world = World()
    drafter = world.drafter()
    batch = world.batch(64, drafter)
    learner = trainer(drafter, **ONLY | {weight: 1.0})
    stats = [learner.step(batch, 0) for _ in range(30)]
    assert better * (stats[-1][loss] - stats[0][loss]) > 0.01
    assert stats[0]["loss"] == pytest.approx(-better * stats[0][loss])


def test_policy_gradient_lifts_what_was_accepted_over_what_was_rejected() -> None:
    world = World()
    drafter = world.drafter()
    batch = world.batch(64, drafter)
    learner = trainer(drafter, **ONLY | {"pgmax": 1.0, "warmup": 0})
    stats = [learner.step(batch, i) for i in range(40)]
    hk, token, reward = batch["hk"], batch["token"], batch["reward"]
    assert hk is not None and token is not None and reward is not None

    def chosen(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)  # type: ignore[index]

    with torch.no_grad():
        gained = chosen(drafter.head_logits(hk.float())) - chosen(drafter.frozen_logits(hk.float()))
    assert gained[reward == 1].mean() > 0.05 > -0.05 > gained[reward == 0].mean()
    assert all(torch.isfinite(torch.tensor(list(s.values()))).all() for s in stats)


def test_without_any_weight_nothing_moves() -> None:
    world = World()
    drafter = world.drafter()
    before = lora_state_dict(drafter)
    learner = trainer(drafter, **ONLY)
    assert learner.step(world.batch(16, drafter), 0)["grad_norm"] == 0
    assert all(torch.equal(before[name], now) for name, now in lora_state_dict(drafter).items())


def test_without_any_gradient_nothing_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's clipping then answers with a number on the CPU, which goes into no stack with numbers of another device."""
    world = World()
    drafter = world.drafter()

    def clip(parameters: list[Tensor], _: float) -> Tensor:
        assert all(p.grad is not None for p in parameters)
        return torch.tensor(0.5)

    monkeypatch.setattr(module, "clip_grad_norm_", clip)
    assert trainer(drafter, **ONLY).step(world.batch(16, drafter), 0)["grad_norm"] == 0
    assert trainer(drafter).step(world.batch(16, drafter), 0)["grad_norm"] == 0.5


def test_the_baseline_is_used_before_it_moves() -> None:
    world = World()
    drafter = world.drafter()
    batch = world.batch(64, drafter)
    mean = batch["reward"].float().mean().item()  # type: ignore[union-attr]
    for ema in (0.9, 0.5):
        learner = trainer(drafter, ema=ema)
        learner.baseline = 0.25
        stats = learner.step(batch, 0)
        assert stats["policy_mean_advantage"] == pytest.approx(mean - 0.25)
        assert stats["baseline"] == learner.baseline == pytest.approx(ema * 0.25 + (1 - ema) * mean)
        assert stats["policy_mean_kl"] == stats["kl"]


def test_an_update_is_adamw_on_a_clipped_gradient() -> None:
    world = World()
    drafter, oracle = world.drafter(), world.drafter()
    batch = world.batch(32, drafter)
    learner = trainer(drafter, lr=0.01, **ONLY | {"ce": 50.0})  # steep: the gradient is longer than 1
    optimizer = torch.optim.AdamW(oracle.drafter_head.proj.trainable_params(), lr=0.01, weight_decay=0.01)
    for _ in range(3):
        stats = learner.step(batch, 0)
        logits = oracle.head_logits(batch["hk"].float()).double()  # type: ignore[union-attr]
        logp = logits.log_softmax(-1).gather(1, batch["token"][:, None]).squeeze(1)  # type: ignore[index]
        optimizer.zero_grad()
        (-50 * logp[batch["reward"] == 1].mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        optimizer.step()
        assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert stats["grad_norm"] > 1
    for mine, theirs in zip(learner.parameters, oracle.drafter_head.proj.trainable_params(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert torch.equal(drafter.drafter_head.proj.base.weight, world.draft)


def test_only_a_and_b_learn_and_a_drafter_without_them_is_refused() -> None:
    world = World()
    drafter = world.drafter()
    assert {id(p) for p in trainer(drafter).parameters} == {id(p) for p in drafter.parameters() if p.requires_grad}
    bare = world.drafter()
    bare.drafter_head = torch.nn.Identity()  # type: ignore[assignment]
    with pytest.raises(UserError, match="dvi"):
        trainer(bare)


class Slow(FakeDrafter):
    """A head that takes `each` milliseconds per row."""

    each = 0.2

    def head_logits(self, hidden: Tensor) -> Tensor:
        time.sleep(self.each * hidden.shape[0] / 1e3)
        return super().head_logits(hidden)


def test_the_cap_shrinks_updates_and_skips_what_cannot_fit() -> None:
    world = World()
    drafter = Slow(world.draft)
    batch = world.batch(64, world.drafter())
    learner = trainer(drafter, max_ms=8.0)
    sizes = [learner.step(batch, i)["n"] for i in range(12)]
    assert learner.skipped == 0 and sizes[-1] < 45  # 64 rows take 13 ms and more
    drafter.each = 5.0  # now four rows take 20 ms
    stats = [learner.step(batch, i) for i in range(24)]
    assert stats[-1]["skipped"] and stats[-1]["n"] == 0 and learner.skipped >= 8
    drafter.each = 0.01
    stats = [learner.step(batch, i) for i in range(PAUSE + 12)]
    assert not stats[-1]["skipped"] and stats[-1]["n"] > 8 and 0 < stats[-1]["ms"] < 1000
    free = trainer(drafter)
    assert free.step(batch, 0)["n"] == 64


def simulate(learner: OnlineTrainer, watching: float, ordinary: float = 2.0, due: int = 400) -> list[Plan]:
    """The plans of due updates on a machine where one of n samples takes `watching` or `ordinary` + 0.02 n ms."""
    plans = []
    for _ in range(due):
        plan = learner.plan(64, unseen=64)
        if plan.n:
            learner._paces[plan.watches].record(plan.n, (watching if plan.watches else ordinary) + 0.02 * plan.n)
        plans.append(plan)
    return plans


def test_where_watching_does_not_fit_ordinary_updates_take_its_place() -> None:
    learner = trainer(World().drafter(), max_ms=5.0, guard=64)
    plans = simulate(learner, watching=6.0)
    assert sum(plan.n > 0 for plan in plans) >= 0.9 * len(plans)
    late = plans[100:]
    assert {plan.n for plan in late if not plan.watches} == {64}  # what ordinary updates take is not smaller for it
    tries = [plan.n for plan in late if plan.watches]
    assert 0 < len(tries) <= 0.05 * len(late) and set(tries) == {SMALLEST}
    plans = simulate(learner, watching=2.5)  # a slow spell passes
    assert [plan.watches for plan in plans[-8:]].count(True) == 2 and all(plan.n == 64 for plan in plans[-100:])


def test_where_not_even_an_ordinary_update_fits_nothing_watches() -> None:
    learner = trainer(World().drafter(), max_ms=5.0, guard=64)
    plans = simulate(learner, watching=12.0, ordinary=6.0)
    assert sum(plan.n > 0 for plan in plans[100:]) < 0.2 * 300
    assert sum(plan.watches for plan in plans[100:]) < 0.05 * 300


def test_without_anything_unseen_it_watches_later() -> None:
    learner = trainer(World().drafter(), guard=64)
    watched = [learner.plan(64, unseen).watches for unseen in (9, 9, 9, 0, 0, 1, 9, 9, 9, 9)]
    assert [i for i, watches in enumerate(watched) if watches] == [5, 9]
    assert not any(trainer(World().drafter(), guard=0).plan(64, 9).watches for _ in range(8))


def poisoned(batch: Batch) -> Batch:
    hk = batch["hk"]
    assert hk is not None
    hk = hk.clone()
    hk[3, 2] = torch.nan
    return batch | {"hk": hk}


@pytest.mark.parametrize("guard", [0, 64])
@pytest.mark.parametrize("what", ["loss", "weights", "step"])
def test_what_is_not_finite_brings_the_last_good_weights_back(what: str, guard: int) -> None:
    world = World()
    drafter = world.drafter()
    learner = trainer(drafter, guard=guard)
    for i in range(70):  # windows close well, or 64 updates pass: these weights are good
        learner.step(world.batch(64, drafter), i, probe=world.batch(32, drafter))
    good = {name: value.clone() for name, value in learner.guard._weights.items()}
    assert any(value.abs().max() > 0.05 for name, value in good.items() if name.endswith("B"))
    moments = learner.guard._moments
    if what == "weights":
        with torch.no_grad():
            drafter.drafter_head.proj.B[1, 1] = torch.nan
    if what == "step":
        learner.optimizer.param_groups[0]["lr"] = torch.inf
    batch = world.batch(64, world.drafter())
    before = learner.baseline
    stats = learner.step(poisoned(batch) if what == "loss" else batch, 99)
    assert stats["non_finite"] and stats["restored"] and learner.guard.restored == 1 and learner.baseline == before
    assert all(torch.equal(good[name], now) for name, now in lora_state_dict(drafter).items())
    for name, p in learner.guard.parameters.items():
        state = learner.optimizer.state[p]
        assert all(torch.equal(state[key], value) for key, value in moments[name].items())  # type: ignore[arg-type]
    learner.optimizer.param_groups[0]["lr"] = 1e-2
    assert not learner.step(batch, 100)["non_finite"]


def drive(learner: OnlineTrainer, world: World, drafter: FakeDrafter, updates: int) -> list[dict[str, float]]:
    return [learner.step(world.batch(32, drafter), i, probe=world.batch(32, drafter)) for i in range(updates)]


def agreement(world: World, drafter: FakeDrafter) -> float:
    states = world.states(2000)
    with torch.no_grad():
        drafts = drafter.head_logits(states).argmax(-1)
    return (drafts == (states @ world.verify.T).argmax(-1)).float().mean().item()


def test_a_bad_learning_rate_is_undone() -> None:
    world = World()
    drafter = world.drafter()
    learner = trainer(drafter, guard=128)
    drive(learner, world, drafter, 60)
    assert learner.guard.restored == 0
    good = agreement(world, drafter)
    assert good > agreement(world, world.drafter()) + 0.05
    learner.optimizer.param_groups[0]["lr"] = 30.0
    stats = drive(learner, world, drafter, 6 * WATCH)
    assert learner.guard.restored >= 1
    back = next(i for i, s in enumerate(stats) if s["restored"])
    assert stats[back]["guard_agree"] < stats[back]["guard_agree_frozen"]
    assert back < 5 * WATCH  # within one window of four probes and what was left of the one before
    learner.guard.restore()
    assert agreement(world, drafter) > agreement(world, world.drafter()) + 0.1  # good weights, of some updates before
    off_world = World()
    off = off_world.drafter()
    unguarded = trainer(off, lr=30.0, guard=0)
    drive(unguarded, off_world, off, 40)
    assert unguarded.guard.restored == 0 and agreement(off_world, off) < 0.2


def test_a_new_text_on_which_acceptance_falls_brings_nothing_back() -> None:
    world = World()
    drafter = world.drafter()
    learner = trainer(drafter, guard=128)
    drive(learner, world, drafter, 60)
    before = agreement(world, drafter)
    torch.manual_seed(5)
    other = torch.randn(world.vocab, world.width)  # a verifier that nothing was learned of, by the head or before it
    world.verify = 0.35 * world.verify + 0.65 * other
    assert agreement(world, drafter) < 0.7 * before
    learner.optimizer.param_groups[0]["lr"] = 1e-4
    drive(learner, world, drafter, 8 * WATCH)
    assert learner.guard.restored == 0
    assert learner.guard.verdict["agree"] < 0.7 * before  # it did look


def test_when_the_last_good_weights_are_worse_too_the_frozen_head_returns() -> None:
    world = World(distance=0.0)  # the frozen head is perfect here
    drafter = world.drafter()
    with torch.no_grad():
        drafter.drafter_head.proj.B.normal_(std=2.0)  # a start that came from another text
    learner = trainer(drafter, lr=1e-6, guard=64)
    drive(learner, world, drafter, 3 * WATCH)
    assert learner.guard.restored == 1
    # learning goes on from B = 0, at this rate by next to nothing
    assert drafter.drafter_head.proj.B.abs().max() < 1e-4 and agreement(world, drafter) > 0.99


def test_guard_compares_over_as_many_positions_as_it_is_told() -> None:
    def looks(guard: int) -> int:
        world = World()
        drafter = world.drafter()
        learner, closed, seen = trainer(drafter, guard=guard), 0, {}
        for stats in drive(learner, world, drafter, 8 * WATCH):
            now = {k: v for k, v in stats.items() if k.startswith("guard")}
            closed += now != seen
            seen = now
        return closed

    assert (looks(0), looks(64), looks(128)) == (0, 4, 2)
