"""From cycles to samples and updates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from online.fake import World, cycle, newest
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.drafting.learning import LearnOptions
from understudy.drafting.lora import lora_state_dict
from understudy.training.online import OnlineLearner, learner_of
from understudy.training.online.buffer import Batch
from understudy.training.online.trainer import WATCH

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
    batch = {name: None if v is None else v.flip(0) for name, v in newest(of.buffer, 9).items()}
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
        heard: list[dict[str, float]] = []
        made = learner_of(world.drafter(LearnOptions(**FAST | {"dvi_online": False} | asked)), 4, heard.append)
        assert made is not None and made.seed == 4
        for _ in range(20):
            made.on_cycle(planted(world, 2)[0])
        assert len(heard) == made.due and bool(heard) == made.options.dvi_online


@pytest.mark.parametrize("asked", [{"save_lora_path": "out"}, {"save_lora_every": 3}])
def test_saving_what_is_not_learned_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    if "save_lora_path" in asked:
        asked = {"save_lora_path": tmp_path / "out"}
    with pytest.raises(UserError, match=r"--save-lora-(path|every): nothing is learned.*--dvi-online true"):
        learner_of(World().drafter(LearnOptions(**asked)))
    assert list(tmp_path.iterdir()) == []
    shown = learner_of(World().drafter(LearnOptions(save_lora_path=tmp_path / "out", dvi_debug=True)))
    assert shown is not None


@pytest.mark.parametrize(("every", "held"), [(1, 2048), (1, 16), (2, 2048), (3, 24)])
def test_the_guard_looks_at_what_no_update_has_seen(every: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    of = learner(world, dvi_guard=64, dvi_update_every=every, dvi_buffer_size=held)
    trained, looked = set[tuple[float, ...]](), list[tuple[float, ...]]()
    update, watch = of.trainer._update, of.trainer.guard.watch

    def rows(batch: Batch) -> list[tuple[float, ...]]:
        return [tuple(row) for row in batch["hk"].tolist()]  # type: ignore[union-attr]

    def updating(batch: Batch) -> dict[str, float]:
        trained.update(rows(batch))
        return update(batch)

    def watching(probe: Batch) -> bool:
        assert rows(probe) and not trained.intersection(rows(probe))
        looked.extend(rows(probe))
        return watch(probe)

    monkeypatch.setattr(of.trainer, "_update", updating)
    monkeypatch.setattr(of.trainer.guard, "watch", watching)
    for i in range(120):
        of.on_cycle(planted(world, i % 5)[0])
    assert len(looked) == len(set(looked)) >= 120 / every / WATCH  # one per look and more, none twice
    assert of.trainer.guard.verdict or len(looked) < 64


def test_policy_figures_are_there_whenever_policy_gradient_is_and_stay_over_skips() -> None:
    world = World()
    of, without, shown = learner(world), learner(world, dvi_pg_lambda_max=0), learner(world, dvi_online=False)
    assert of.policy() == {"policy_mean_advantage": None, "policy_mean_kl": None}
    for _ in range(20):
        made = planted(world, 2)[0]
        for one in (of, without, shown):
            one.on_cycle(made)
    ran = of.last
    assert of.policy() == {key: ran[key] for key in ("policy_mean_advantage", "policy_mean_kl")}
    assert without.policy() == shown.policy() == {}
    of.trainer._paces[0].max_ms, of.trainer._paces[0]._pause = 5.0, 9
    for _ in range(2):
        of.on_cycle(planted(world, 2)[0])
    assert of.last["skipped"] and of.policy() == {key: ran[key] for key in ("policy_mean_advantage", "policy_mean_kl")}
