"""Training from rollouts: what is collected, what is lowered, and what an update changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from training import words
from training.words import rolled, weights
from understudy.core.errors import UserError
from understudy.training.rollouts.collect import Rollout, roll_out
from understudy.training.rollouts.losses import kl_beta, losses
from understudy.training.rollouts.options import RolloutOptions
from understudy.training.rollouts.trainer import BAD_STEPS, RolloutTrainer


@pytest.fixture(scope="module")
def target():
    return words.target()


@pytest.mark.parametrize("shallow_rank", [0, 2])
def test_a_rollout_says_what_the_whole_model_says_of_its_text(target, shallow_rank):
    drafter, model = words.drafter(target, shallow_rank, noise=0.02), tiny.model("llama")
    seen = set()
    for rollout in rolled(target, drafter, 4):
        hidden, verifier = torch.cat(rollout.hidden), torch.cat(rollout.logits)
        assert len(rollout) == len(rollout.tokens) == len(rollout.rewards) == len(hidden) == len(verifier)
        for i, row in enumerate(rollout.rows):
            text = rollout.ids[: row + 1]
            said = tiny.logits(model, text)[-1]
            assert torch.allclose(verifier[i], said, atol=1e-3, rtol=1e-4)
            assert rollout.rewards[i] == int(rollout.tokens[i] == int(said.argmax()))
            if not shallow_rank:
                state = tiny.hidden_states(model, text)[3][-1:]
                assert torch.allclose(hidden[i], drafter.norm(state)[0], atol=1e-3, rtol=1e-4)
            with torch.no_grad():
                assert int(drafter.head_logits(hidden[i : i + 1]).argmax()) == rollout.tokens[i]
            seen.add(rollout.rewards[i])
    assert seen == {0, 1}


def test_positions_end_at_the_first_reject_of_a_block(target):
    drafter = words.drafter(target, 0)
    for rollout in rolled(target, drafter):
        blocks = [len(part) for part in rollout.hidden]
        assert sum(blocks) == len(rollout) and max(blocks) <= drafter.steps
        at = 0
        for size in blocks:
            rewards = rollout.rewards[at : at + size]
            assert rewards[:-1] == [1] * (size - 1), "only the last position of a block may be a reject"
            assert rewards[-1] == 0 or size == drafter.steps or at + size == len(rollout)
            at += size
        assert sum(rollout.rewards) == rollout.stats.accepted


def test_a_block_that_runs_over_a_stop_is_judged_on_its_own_text(target, monkeypatch):
    """Drafts accepted past a stop are no output, but the states after them have read them."""
    drafter, model = words.drafter(target, 2), tiny.model("llama")
    found = 0
    for prompt in words.prompts(6):
        whole = roll_out(target, drafter, prompt, 24, True)
        inside = [whole.ids[row + 1] for row, reward in zip(whole.rows, whole.rewards, strict=True) if reward]
        for token in inside[:2]:
            monkeypatch.setitem(target.__dict__, "eos_ids", (token,))
            rollout = roll_out(target, drafter, prompt, 24, True)
            said_all = [row for part in rollout.logits for row in part]
            for row, said in zip(rollout.rows, said_all, strict=True):
                assert torch.allclose(said, tiny.logits(model, rollout.ids[: row + 1])[-1], atol=1e-3, rtol=1e-4)
            found += len(rollout.ids) > len(prompt) and rollout.ids[-1] != token
    monkeypatch.undo()
    assert found, "no stop fell into a block: the test saw nothing"


def test_drawn_rollouts_draw_drafts_from_the_drafters_law(target):
    drafter = words.drafter(target, 0)
    drawn = rolled(target, drafter, 3, greedy=False)
    argmax = [int(drafter.head_logits(h[None]).argmax()) for r in drawn for part in r.hidden for h in part]
    assert argmax != [token for r in drawn for token in r.tokens]
    again = rolled(target, drafter, 3, greedy=False)
    assert [r.tokens for r in drawn] == [r.tokens for r in again], "one seed, one rollout"


@pytest.mark.parametrize("shallow_rank", [0, 2])
def test_states_computed_again_are_those_that_drafted(target, shallow_rank):
    drafter = words.drafter(target, shallow_rank, noise=0.02)
    trainer = RolloutTrainer(drafter, RolloutOptions())
    for rollout in rolled(target, drafter):
        chosen = list(range(0, len(rollout), 2))
        states = trainer.states(rollout, chosen)
        assert torch.allclose(states, torch.cat(rollout.hidden)[chosen], atol=1e-4)
        assert states.requires_grad == bool(shallow_rank)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), n=st.integers(1, 6), baseline=st.floats(-1, 1))
def test_losses_equal_a_slow_sum(seed, n, baseline):
    random = torch.Generator().manual_seed(seed)
    draft, verifier = torch.randn(n, 7, generator=random), torch.randn(n, 7, generator=random)
    tokens, rewards = torch.randint(7, (n,), generator=random), torch.randint(2, (n,), generator=random)
    kl = ce = pg = 0.0
    for i in range(n):
        q, p = draft[i].double().softmax(0), verifier[i].double().softmax(0)
        kl += sum(float(p[v]) * math.log(float(p[v]) / float(q[v])) for v in range(7)) / n
        chosen = -math.log(float(q[tokens[i]]))
        ce += chosen * int(rewards[i]) / max(1, int(rewards.sum()))
        pg += (int(rewards[i]) - baseline) * chosen / n
    found = losses(draft, verifier, tokens, rewards, baseline)
    assert torch.allclose(torch.stack(list(found)).double(), torch.tensor([kl, ce, pg]).double(), atol=1e-5)


def test_the_weight_of_kl_falls_in_a_straight_line():
    assert [kl_beta(u, 1.0, 0.2, 4) for u in (0, 1, 2, 3, 4, 9)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert kl_beta(0, 1.0, 0.2, 0) == pytest.approx(0.2)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_update_reaches_both_loras_and_nothing_else(family):
    target = words.target(family)
    drafter = words.drafter(target, 2, noise=0.02)
    frozen = {name: p.clone() for name, p in target.model.state_dict().items()}
    before = weights(drafter)
    RolloutTrainer(drafter, RolloutOptions(use_policy_grad=True)).step(rolled(target, drafter))
    assert before.keys() == weights(drafter).keys() and any("lora_" in name for name in before)
    for name, p in weights(drafter).items():
        assert not torch.equal(p, before[name]), f"{name} did not move"
    for name, p in target.model.state_dict().items():
        assert torch.equal(p, frozen[name]), f"the target's {name} moved"
    assert all(p.grad is None for p in [*target.model.parameters(), *drafter.parameters()])


def test_the_gradient_of_the_shallow_lora_is_that_of_finite_differences(target):
    drafter = words.drafter(target, 2, noise=0.05)
    trainer = RolloutTrainer(drafter, RolloutOptions())
    rollout = rolled(target, drafter, 1)[0]
    chosen = list(range(len(rollout)))

    def loss() -> torch.Tensor:
        logits = drafter.head_logits(trainer.states(rollout, chosen))
        return losses(logits, torch.cat(rollout.logits), torch.tensor(rollout.tokens), torch.ones(len(chosen)), 0.0).kl

    gradient = torch.autograd.grad(loss(), trainer.shallow)
    size = math.sqrt(sum(float((g**2).sum()) for g in gradient))
    direction = [g / size for g in gradient]
    values = []
    for sign in (1, -1):
        for p, d in zip(trainer.shallow, direction, strict=True):
            p.data += sign * 1e-3 * d
        with torch.no_grad():
            values.append(float(loss()))
        for p, d in zip(trainer.shallow, direction, strict=True):
            p.data -= sign * 1e-3 * d
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(size, rel=0.03)


def test_each_lora_has_its_learning_rate(target):
    """Adam's first step is the learning rate wherever there is a gradient."""
    drafter = words.drafter(target, 2)
    before = weights(drafter)
    RolloutTrainer(drafter, RolloutOptions(lr_exit=3e-3, lr_lora=7e-5)).step(rolled(target, drafter))
    moved = {name: float((p - before[name]).abs().max()) for name, p in weights(drafter).items()}
    head = max(value for name, value in moved.items() if name.endswith(".proj.B"))
    shallow = max(value for name, value in moved.items() if "lora_B" in name)
    assert head == pytest.approx(3e-3, rel=1e-2) and shallow == pytest.approx(7e-5, rel=1e-2)


def test_an_update_takes_at_most_a_batch(target):
    drafter = words.drafter(target, 0)
    rollouts = rolled(target, drafter)
    total = sum(map(len, rollouts))
    assert RolloutTrainer(drafter, RolloutOptions(batch_size=5)).step(rollouts)["positions"] == 5
    assert RolloutTrainer(drafter, RolloutOptions(batch_size=9999)).step(rollouts)["positions"] == total


def test_without_positions_nothing_changes(target):
    drafter = words.drafter(target, 0)
    before = weights(drafter)
    stats = RolloutTrainer(drafter, RolloutOptions()).step([Rollout([5, 6])])
    assert stats["positions"] == 0
    assert all(torch.equal(p, before[name]) for name, p in weights(drafter).items())


def after(target, rollouts, **options) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Statistics and weights after one update with these options."""
    drafter = words.drafter(target, 2, noise=0.02)
    stats = RolloutTrainer(drafter, RolloutOptions(**options)).step(rollouts)
    return stats, weights(drafter)


@pytest.mark.parametrize(
    "options",
    [
        {"kl_beta0": 3.0},
        {"kl_anneal_steps": 0},
        {"ce_weight": 2.0},
        {"use_policy_grad": True},
        {"use_policy_grad": True, "rl_weight": 5.0},
    ],
)
def test_weights_of_losses_change_the_update(target, options):
    rollouts = rolled(target, words.drafter(target, 2, noise=0.02))
    plain, moved = after(target, rollouts)
    stats, other = after(target, rollouts, **options)
    w = {"kl": stats["beta"], "ce": options.get("ce_weight", 0.1), "pg": options.get("rl_weight", 1.0)}
    if "use_policy_grad" not in options:
        w["pg"] = 0.0
    assert stats["loss"] == pytest.approx(sum(weight * stats[name] for name, weight in w.items()), rel=1e-5)
    assert stats["loss"] != pytest.approx(plain["loss"])
    same = [torch.equal(p, moved[name]) for name, p in other.items()]
    # a first step of Adam hides how large a loss is, not which way it points
    assert not all(same)


def test_the_baseline_follows_the_rewards(target):
    drafter = words.drafter(target, 0)
    trainer = RolloutTrainer(drafter, RolloutOptions(use_policy_grad=True, pg_baseline_ema=0.5, batch_size=9999))
    rollouts = rolled(target, drafter)
    rewards = [r for rollout in rollouts for r in rollout.rewards]
    mean = sum(rewards) / len(rewards)
    first, second = trainer.step(rollouts), trainer.step(rollouts)
    assert first["baseline"] == pytest.approx(0.5 * mean) and first["policy_mean_advantage"] == pytest.approx(mean)
    assert second["baseline"] == pytest.approx(0.75 * mean)
    assert second["policy_mean_advantage"] == pytest.approx(0.5 * mean)


def test_telemetry_hears_of_policy_gradient_only_when_it_is_used(target):
    drafter = words.drafter(target, 0)
    rollouts = rolled(target, drafter)
    without, used = (RolloutTrainer(drafter, RolloutOptions(use_policy_grad=use)) for use in (False, True))
    assert used.policy() == {"policy_mean_advantage": None, "policy_mean_kl": None}
    for trainer in (without, used):
        trainer.step(rollouts)
    assert without.policy() == {}
    assert used.policy() == {name: used.last[name] for name in ("policy_mean_advantage", "policy_mean_kl")}


def test_what_is_no_number_changes_nothing_and_ends_the_run(target):
    drafter = words.drafter(target, 2)
    rollouts = rolled(target, drafter, 1)
    rollouts[0].logits[0].fill_(math.nan)
    trainer, before = RolloutTrainer(drafter, RolloutOptions(batch_size=9999)), weights(drafter)
    for _ in range(BAD_STEPS - 1):
        assert trainer.step(rollouts)["non_finite"] == 1
    with pytest.raises(UserError, match="no number: lower --lr-exit"):
        trainer.step(rollouts)
    assert all(torch.equal(p, before[name]) for name, p in weights(drafter).items()) and trainer.baseline == 0.0


def test_updates_teach(target):
    drafter = words.drafter(target, 2)
    trainer = RolloutTrainer(drafter, RolloutOptions(lr_exit=1e-2, lr_lora=1e-3, kl_anneal_steps=9999))
    rollouts = rolled(target, drafter)
    kls = [trainer.step(rollouts)["kl"] for _ in range(40)]
    assert sum(kls[-5:]) < 0.8 * sum(kls[:5])
