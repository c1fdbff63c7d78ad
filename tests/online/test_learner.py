"""From cycles to samples and updates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from online.fake import World, cycle
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.drafting.learning import LearnOptions
from understudy.drafting.lora import lora_state_dict
from understudy.training.online import OnlineLearner, learner_of

FAST: dict[str, Any] = {
    "dvi_online": True, "dvi_update_every": 2, "dvi_batch_size": 8, "max_online_train_ms": 0, "dvi_lr": 1e-2
}  # fmt: skip


def learner(world: World, **more: Any) -> OnlineLearner:
    return OnlineLearner(world.drafter(), LearnOptions(**{**FAST, **more}))


def planted(world: World, accepted: int, k: int = 4) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A cycle whose first `accepted` drafts are right, and its states and verifier logits."""
    hidden = world.states(k + 1)
    logits = hidden @ world.verify.T
    choices = logits.argmax(-1).tolist()
    drafts = [c if i < accepted else (c + 1) % world.vocab for i, c in enumerate(choices[:k])]
    return cycle(hidden[:k], drafts, logits), hidden, logits


@pytest.mark.parametrize("accepted", [0, 1, 3, 4])
@pytest.mark.parametrize("store", ["full", "topk"])
def test_accepted_drafts_and_the_first_reject_become_samples(accepted: int, store: str) -> None:
    world = World()
    of = learner(world, dvi_store=store, dvi_topk=7, dvi_logits_dtype="float32")
    made, hidden, logits = planted(world, accepted)
    of.on_cycle(made)
    assert of.buffer is not None
    count = min(accepted + 1, 4)
    batch = {name: None if v is None else v.flip(0) for name, v in of.buffer.newest(9).items()}
    assert batch["token"].tolist() == made.drafted[:count]  # type: ignore[union-attr]
    assert batch["reward"].tolist() == [1] * accepted + [0] * (count - accepted)  # type: ignore[union-attr]
    assert batch["is_first_reject"].tolist() == [False] * accepted + [True] * (count - accepted)  # type: ignore[union-attr]
    assert batch["pos"].tolist() == list(range(1, count + 1))  # type: ignore[union-attr]
    assert torch.equal(batch["hk"], hidden[:count].half())  # type: ignore[arg-type]
    if store == "full":
        assert torch.equal(batch["z_phi"], logits[:count])  # type: ignore[arg-type]
    else:
        assert torch.equal(batch["z_val"].sort(descending=True).values, logits[:count].topk(7).values)  # type: ignore[union-attr]


def test_prefill_is_no_verify_pass_and_a_pass_without_drafts_is_one() -> None:
    world = World()
    of = learner(world)
    of.on_cycle(dataclasses.replace(planted(world, 2)[0], index=0))
    assert of.global_step == 0 and of.buffer is None
    empty = cycle(world.states(0), [], world.states(1) @ world.verify.T)
    of.on_cycle(empty)
    assert of.global_step == 1 and of.buffer is None and of.summary()["samples"] == 0
    assert of.needs == Needs()


@pytest.mark.parametrize(("every", "batch"), [(1, 8), (3, 8), (2, 30)])
def test_updates_are_due_by_passes_and_by_what_the_buffer_holds(every: int, batch: int) -> None:
    world, seen = World(), list[dict[str, float]]()
    of = OnlineLearner(
        world.drafter(), LearnOptions(**FAST | {"dvi_update_every": every, "dvi_batch_size": batch}), seen.append
    )
    due, samples = [], 0
    for step in range(1, 31):
        made = planted(world, step % 4)[0]
        of.on_cycle(made)
        samples += min(made.accepted + 1, 4)
        if step % every == 0 and samples >= batch:
            due.append(step)
    assert [s["global_step"] for s in seen] == due and {s["n"] for s in seen} == {batch}
    summary = of.summary()
    assert summary["due"] == summary["ran"] == len(due) and summary["ran_share"] == 1 and summary["samples"] == samples
    assert of.last == seen[-1] and summary["ms_p99"] >= summary["ms_p50"] > 0


def test_offline_it_watches_and_does_not_learn() -> None:
    world = World()
    of = learner(world, dvi_online=False)
    before = lora_state_dict(of.drafter)
    for _ in range(20):
        of.on_cycle(planted(world, 2)[0])
    assert of.summary()["samples"] == 60 and of.due == 0
    assert all(torch.equal(before[k], v) for k, v in lora_state_dict(of.drafter).items())


def trajectory(seed: int = 0, **more: Any) -> torch.Tensor:
    """B after 40 passes of one stream of cycles."""
    world = World()
    drafter = world.drafter()
    of = OnlineLearner(drafter, LearnOptions(**{**FAST, **more}), seed=seed)
    for i in range(40):
        of.on_cycle(planted(world, i % 4)[0])
    assert of.trainer.ran
    return lora_state_dict(drafter)["drafter_head.proj.B"]


def test_without_a_cap_it_is_deterministic() -> None:
    assert torch.equal(trajectory(), trajectory())
    assert not torch.equal(trajectory(), trajectory(seed=1))


@pytest.mark.parametrize(
    "changed",
    [
        {"dvi_tau": 1.0},
        {"dvi_lr": 2e-2},
        {"dvi_topk": 5},
        {"dvi_store": "full"},
        {"dvi_logits_dtype": "float32"},
        {"dvi_buffer_size": 16},
        {"dvi_batch_size": 9},
        {"dvi_update_every": 3},
        {"dvi_warmup_steps": 5},
        {"dvi_baseline_ema": 0.5, "dvi_warmup_steps": 0},
        {"dvi_entropy_weight": 0.1},
    ],
)
def test_every_option_changes_what_is_learned(changed: dict[str, Any]) -> None:
    base = {"dvi_warmup_steps": 0} if "dvi_baseline_ema" in changed else {}
    assert not torch.equal(trajectory(**{"dvi_topk": 20} | base), trajectory(**{"dvi_topk": 20} | changed))


def test_the_cap_is_an_option() -> None:
    world = World()
    tight, free = learner(world, max_online_train_ms=1e-3), learner(world)
    for _ in range(60):
        made = planted(world, 3)[0]
        tight.on_cycle(made)
        free.on_cycle(made)
    assert free.summary()["skipped"] == 0
    summary = tight.summary()
    assert summary["skipped"] > 0 and summary["ran"] + summary["skipped"] == summary["due"] and summary["ran_share"] < 1


def test_the_guard_is_an_option() -> None:
    def restored(guard: int) -> float:
        world = World()
        of = learner(world, dvi_guard=guard, dvi_lr=50.0, dvi_batch_size=32)
        for i in range(200):
            of.on_cycle(planted(world, i % 4)[0])
        return of.summary()["restored"]

    assert restored(0) == 0 and restored(48) > 0


def test_debug_prints_count_and_bytes_of_every_block(capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    loud = learner(world, dvi_debug=True)
    loud.on_cycle(planted(world, 2)[0])
    loud.on_cycle(planted(world, 4)[0])
    assert loud.buffer is not None
    size = loud.buffer.bytes_per_slot
    assert capsys.readouterr().err.splitlines() == [
        f"dvi: block 1: 3 states, {3 * size} bytes; 3 held",
        f"dvi: block 2: 4 states, {4 * size} bytes; 7 held",
    ]
    learner(world).on_cycle(planted(world, 2)[0])
    assert capsys.readouterr().err == ""


def test_trees_and_drafters_without_a_head_are_refused() -> None:
    world = World()
    tree = world.drafter()
    tree.nodes = 8
    with pytest.raises(UserError, match="trees"):
        OnlineLearner(tree)
    bare = world.drafter()
    bare.learning = None
    with pytest.raises(UserError, match="--drafter dvi"):
        OnlineLearner(bare)
    with pytest.raises(UserError, match="tree"):
        learner(world).on_cycle(dataclasses.replace(planted(world, 1)[0], parents=[-1, -1, 0, 1]))


def test_it_learns_also_for_whoever_decodes_in_inference_mode() -> None:
    world = World()
    of = learner(world)
    before = lora_state_dict(of.drafter)
    with torch.inference_mode():
        for _ in range(20):
            of.on_cycle(world.cycle(of.drafter))  # type: ignore[arg-type]
    assert of.summary()["ran"] > 0
    assert not all(torch.equal(before[k], v) for k, v in lora_state_dict(of.drafter).items())


def test_a_learner_is_made_where_options_ask_for_one() -> None:
    world = World()
    assert learner_of(world.drafter(LearnOptions())) is None
    bare = world.drafter()
    bare.learning = None
    assert learner_of(bare) is None
    for asked in ({"dvi_online": True}, {"dvi_debug": True}):
        made = learner_of(world.drafter(LearnOptions(**asked)), seed=4)
        assert made is not None and made.seed == 4


def test_policy_figures_are_there_once_an_update_was_made_and_only_with_policy_gradient() -> None:
    world = World()
    of, without = learner(world), learner(world, dvi_pg_lambda_max=0)
    assert of.policy() == {}
    for _ in range(20):
        made = planted(world, 2)[0]
        of.on_cycle(made)
        without.on_cycle(made)
    assert of.policy() == {key: of.last[key] for key in ("policy_mean_advantage", "policy_mean_kl")}
    assert without.policy() == {}
