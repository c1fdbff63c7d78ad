"""The offline loop: what a step is, when it looks and saves, and that every option changes something."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

from training import toy
from understudy.core.errors import UserError
from understudy.drafting.objective import Features, StepOutput
from understudy.training.checkpoints import read_state
from understudy.training.distributed import Ranks
from understudy.training.evaluate import Sums, mismatch
from understudy.training.optimizer import learning_rate, total_steps
from understudy.training.options import TrainOptions
from understudy.training.progress import Bar, clock
from understudy.training.step import take_step


def same(a: toy.Toy, b: toy.Toy, atol: float = 0.0) -> bool:
    return all(
        torch.allclose(x, y, rtol=0, atol=atol)
        for x, y in zip(toy.weights(a).values(), toy.weights(b).values(), strict=True)
    )


def oracle(steps: int, per_step: int, options: dict[str, Any], mean_of_means: bool = False) -> toy.Toy:
    """The slow, obvious trainer: all rows of a step one by one, sum of losses over sum of counts, torch's AdamW."""
    objective, rows = toy.Toy(), toy.Rows(size=1)
    settings = TrainOptions(**options)
    flat = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(flat, lr=1.0, betas=settings.betas, weight_decay=0.0)
    stream = iter([batch for _ in range(4) for batch in rows])
    for step in range(steps):
        outputs = [objective(Features(b, {}, toy.TABLE[b.ids])) for b in (next(stream) for _ in range(per_step))]
        if mean_of_means:
            loss = sum(o.loss / o.count for o in outputs) / len(outputs)
        else:
            loss = sum(o.loss for o in outputs) / sum(o.count for o in outputs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flat, settings.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, settings)
        optimizer.step()
    return objective


OPTIONS = {"learning_rate": 0.05, "max_steps": 5, "warmup_steps": 2, "max_grad_norm": 0.3}


@pytest.mark.parametrize(("size", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_a_step_is_the_mean_over_all_its_slots_however_it_is_cut(size, accumulation, tmp_path):
    result, objective, _ = toy.run(tmp_path, **OPTIONS, batch_size=size, gradient_accumulation_steps=accumulation)
    assert result.step == 5 and result.reason == "done"
    assert same(objective, oracle(5, 8, OPTIONS), atol=2e-6)
    assert not same(objective, oracle(5, 8, OPTIONS, mean_of_means=True), atol=2e-3), "rows are too alike to tell"


def gradients(tmp_path: Path, groups: list[int], **toy_options: Any) -> tuple[dict[str, Any], float]:
    """What a step on the first eight rows, cut into `groups`, moves plain SGD of rate 1 by, and the loss that it tells."""
    objective, ranks = toy.Toy(**toy_options), Ranks(TrainOptions(output_dir=tmp_path), "cpu")
    params = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    before, rows = toy.weights(objective), iter(range(8))
    group = [toy.Rows().batch([next(rows) for _ in range(size)]) for size in groups]
    sgd = torch.optim.SGD(params.values(), lr=1.0)
    report = take_step(group, ranks.wrap(objective), toy.features, params, sgd, ranks, 0.0, Sums(), lambda: False)
    return {n: before[n] - p.detach() for n, p in params.items()}, report.loss


@pytest.mark.parametrize("by_tokens", [False, True])
def test_a_loss_is_divided_by_what_the_objective_says(by_tokens, tmp_path):
    """`StepOutput.divisor` summed over the step, like the loss: all tokens here, or the slots where it is None."""
    batch = toy.Rows().batch(list(range(8)))
    out = toy.Toy()(Features(batch, {}, toy.TABLE[batch.ids]))
    divisor = int((batch.documents >= 0).sum()) if by_tokens else int(out.count)
    assert int(out.count) < int((batch.documents >= 0).sum())
    objective = toy.Toy()
    (objective(Features(batch, {}, toy.TABLE[batch.ids])).loss / divisor).backward()
    wanted = {n: p.grad for n, p in objective.named_parameters() if p.requires_grad}
    for groups in ([1] * 8, [8], [3, 1, 4]):
        found, loss = gradients(tmp_path, groups, by_tokens=by_tokens)
        assert loss == pytest.approx(out.loss.item() / divisor, rel=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_held_out_loss_is_divided_alike_and_slots_are_counted_as_ever(tmp_path):
    _, _, log = toy.run(tmp_path, objective=toy.Toy(by_tokens=True), max_steps=1, eval_interval=1, held_out=True)
    rows, objective = list(toy.Rows(8, 2)), toy.Toy().eval()
    outputs = [objective(Features(b, {}, toy.TABLE[b.ids])) for b in rows]
    tokens = sum(int((b.documents >= 0).sum()) for b in rows)
    assert log.of("eval/loss")[0] == pytest.approx(sum(o.loss.item() for o in outputs) / tokens, rel=1e-6)
    first = next(iter(toy.Rows(size=2)))
    assert log.of("train/supervised")[1] == int(first.mask.sum())


def test_the_logged_loss_is_per_slot(tmp_path):
    _, _, log = toy.run(tmp_path, max_steps=1, batch_size=1, gradient_accumulation_steps=4, log_interval=1)
    objective, batches = toy.Toy(), list(toy.Rows(size=1))[:4]
    outputs = [objective(Features(b, {}, toy.TABLE[b.ids])) for b in batches]
    wanted = sum(o.loss.item() for o in outputs) / sum(o.count.item() for o in outputs)
    assert log.of("train/loss")[1] == pytest.approx(wanted, rel=1e-6)
    assert log.of("train/supervised")[1] == sum(int(b.mask.sum()) for b in batches)
    assert log.of("train/tokens")[1] == sum(int((b.documents >= 0).sum()) for b in batches)
    assert log.of("perf/peak_memory_gb")[1] > 0.01 and log.of("perf/tokens_per_s")[1] > 0
    assert log.of("perf/step_s")[1] * log.of("perf/tokens_per_s")[1] == pytest.approx(log.of("train/tokens")[1])


def test_accumulation_goes_on_over_the_end_of_an_epoch(tmp_path):
    rows = toy.Rows(rows=5, size=1)
    result, _, log = toy.run(tmp_path, batches=rows, num_epochs=3, gradient_accumulation_steps=4)
    assert result.step == 4, "15 batches are 3 whole steps and one of 3"
    assert log.of("train/tokens")[4] == 3 * sum(int((toy.Rows().batch([i]).documents >= 0).sum()) for i in range(5))
    assert rows.state_dict() == {"epoch": 3, "position": 0}


# -- batches and steps that supervise nothing, or are not finite


def test_a_step_without_supervision_leaves_everything_as_it_was(tmp_path, capsys):
    everything = tuple(range(16))
    rows = toy.Rows(size=2)
    rows.hooks = {3: lambda: setattr(rows, "empty", everything), 4: lambda: setattr(rows, "empty", ())}
    seen = {}

    class Watch:
        interval = 1

        def __call__(self, step: int) -> None:
            seen[step] = toy.weights(objective)

    objective = toy.Toy()
    _, _, log = toy.run(tmp_path, objective=objective, batches=rows, watchers=[Watch()], weight_decay=0.1)
    assert torch.equal(seen[2]["drafter.head.weight"], seen[3]["drafter.head.weight"])
    assert not torch.equal(seen[3]["drafter.head.weight"], seen[4]["drafter.head.weight"])
    assert all(torch.isfinite(p).all() for p in seen[8].values())
    assert log.of("train/skipped")[8] == 1 and log.of("train/empty_batches")[8] == 1
    assert 3 not in log.of("train/loss"), "no slots, no loss"
    assert log.kinds("empty_batch") == [{"step": 3, "text": "WARNING: Empty loss_mask at step 3!", "batches": 1}]
    assert "WARNING: Empty loss_mask at step 3!" in capsys.readouterr().err


def test_an_empty_batch_inside_a_step_changes_nothing(tmp_path):
    _, with_empty, log = toy.run(tmp_path / "a", batches=toy.Rows(4, 1, empty=(1,)), gradient_accumulation_steps=4)
    _, without, _ = toy.run(tmp_path / "b", batches=toy.Rows(4, 4, empty=(1,)))
    assert same(with_empty, without, atol=1e-6)
    assert log.of("train/empty_batches")[1] == 1 and log.of("train/skipped")[1] == 0


def test_nothing_supervised_at_all_is_an_error(tmp_path):
    with pytest.raises(UserError, match="every loss mask is empty: check chat template"):
        toy.run(tmp_path, batches=toy.Rows(empty=tuple(range(16))))


class Faulty(toy.Toy):
    """Its loss is `value` at the calls in `at`; with `gradient`, only its gradient is."""

    def __init__(self, at: set[int], value: float = math.nan, gradient: bool = False) -> None:
        super().__init__()
        self.at, self.value, self.gradient, self.calls = at, value, gradient, 0

    def forward(self, features: Features) -> StepOutput:
        out = super().forward(features)
        self.calls += 1
        if self.calls in self.at:
            p = self.drafter.head.bias
            out.loss = out.loss + (torch.sqrt(p * 0).sum() if self.gradient else p.sum() * self.value)
        return out


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_counted(gradient, tmp_path):
    objective = Faulty({2, 5}, gradient=gradient)
    _, _, log = toy.run(tmp_path, objective=objective, max_bad_steps=2)
    assert all(torch.isfinite(p).all() for p in toy.weights(objective).values())
    assert log.of("train/skipped")[8] == 2 and [e["step"] for e in log.kinds("not_finite")] == [2, 5]


def test_many_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row, up to step 4: lower --learning-rate"):
        toy.run(tmp_path, objective=Faulty({2, 3, 4, 5}, math.inf), max_bad_steps=3)


# -- optimizer and schedule


def test_clipping_bounds_the_step(tmp_path):
    for most, wanted in ((0.25, 0.25), (0.0, None), (100.0, None)):
        settings = TrainOptions(output_dir=tmp_path)
        objective, ranks = toy.Toy(), Ranks(settings, "cpu")
        params = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        before = toy.weights(objective)
        model = ranks.wrap(objective)
        sgd = torch.optim.SGD(params.values(), lr=1.0)
        report = take_step(list(toy.Rows())[:2], model, toy.features, params, sgd, ranks, most, Sums(), lambda: False)
        moved = math.sqrt(sum(float((before[n] - p.detach()).square().sum()) for n, p in params.items()))
        assert report.grad_norm > 0.3, "nothing would be clipped"
        assert moved == pytest.approx(wanted or report.grad_norm, rel=1e-4)


def one_step(tmp_path: Path, scale: float | None) -> tuple[toy.Toy, Any, Ranks]:
    """A step of SGD on two batches; with `scale`, by the fp16 scaler beginning there."""
    objective, ranks = toy.Toy(), Ranks(TrainOptions(output_dir=tmp_path), "cpu")
    ranks.accelerator.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    params = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    sgd = torch.optim.SGD(params.values(), lr=1.0)
    model = ranks.wrap(objective)
    report = take_step(list(toy.Rows())[:2], model, toy.features, params, sgd, ranks, 0.25, Sums(), lambda: False)
    return objective, report, ranks


def test_the_scale_of_fp16_cancels_and_backs_off(tmp_path):
    plain, one, _ = one_step(tmp_path, None)
    scaled, two, _ = one_step(tmp_path, 2.0**12)
    assert same(plain, scaled, atol=1e-6) and two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    untouched, report, ranks = one_step(tmp_path, 2.0**127)
    assert report.skipped == "fp16 scale" and math.isfinite(report.loss), "no fault of the run"
    assert same(untouched, toy.Toy()) and ranks.accelerator.scaler.get_scale() == 2.0**126


@given(st.integers(1, 300), st.integers(0, 400), st.floats(0, 1))
def test_the_schedule_climbs_and_falls(total, warmup, floor):
    options = TrainOptions(learning_rate=2.0, warmup_steps=warmup, min_lr_ratio=floor)
    rates = [learning_rate(step, total, options) for step in range(total)]
    peak = min(warmup, total) - 1
    assert all(0 < r <= 2.0 for r in rates) and all(r >= 2.0 * floor for r in rates[max(peak, 0) :] if warmup <= total)
    assert all(a < b for a, b in zip(rates[: peak + 1], rates[1 : peak + 1], strict=False))
    assert all(a >= b for a, b in zip(rates[max(peak, 0) :], rates[max(peak, 0) + 1 :], strict=False))


def test_schedule_values():
    options = TrainOptions(learning_rate=1.0, warmup_steps=4, min_lr_ratio=0.1, max_steps=9)
    found = [learning_rate(step, 9, options) for step in range(9)]
    # climbs in quarters; then 0.1 + 0.9 * (1 + cos(pi * i / 6)) / 2 for i = 1 .. 5
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.939711, 0.775, 0.55, 0.325, 0.160289], abs=1e-6)
    by_ratio = TrainOptions(learning_rate=1.0, warmup_ratio=0.25, max_steps=8)
    assert [learning_rate(s, 8, by_ratio) for s in (0, 1)] == [0.5, 1.0]
    none = TrainOptions(learning_rate=1.0, warmup_steps=0, min_lr_ratio=1.0)
    assert [learning_rate(s, 3, none) for s in range(3)] == [1.0, 1.0, 1.0]
    assert learning_rate(2, 3, TrainOptions(learning_rate=1.0, warmup_steps=9)) == pytest.approx(1 / 3)


def test_the_schedule_is_what_the_optimizer_gets(tmp_path):
    _, _, log = toy.run(tmp_path, max_steps=9, warmup_steps=4, learning_rate=1e-3)
    assert list(log.of("train/lr").values())[:5] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 9.39711e-4], abs=1e-9)


def test_how_many_steps_there_are():
    assert total_steps(TrainOptions(), 10) == 10
    assert total_steps(TrainOptions(num_epochs=3, gradient_accumulation_steps=4), 10) == 8
    assert total_steps(TrainOptions(num_epochs=3, max_steps=5), 10) == 5
    assert total_steps(TrainOptions(max_steps=50), 10) == 50, "as many epochs as it takes"
    assert total_steps(TrainOptions(max_steps=50), None) == 50
    with pytest.raises(UserError, match="give --max-steps"):
        total_steps(TrainOptions(num_epochs=3), None)


def test_data_of_unknown_length_ends_with_its_epochs(tmp_path):
    result, *_ = toy.run(tmp_path, batches=toy.Rows(rows=6, size=2, known=False), num_epochs=2, max_steps=100)
    assert (result.step, result.reason) == (6, "done")


def test_masters_are_fp32_and_what_is_served_is_measured_and_saved(tmp_path):
    """Updates far below bf16's resolution add up in the masters; decoding and the saved file see rounded weights."""
    objective, seen = toy.Toy(dtype=torch.bfloat16), []

    def measure() -> dict[str, float]:
        assert not objective.training and not torch.is_grad_enabled()
        seen.append({n: p.clone() for n, p in toy.weights(objective).items()})
        return {"tau": float(len(seen))}

    start = {n: p.float() for n, p in toy.weights(objective).items()}
    result, *_ = toy.run(
        tmp_path,
        objective=objective,
        learning_rate=1e-6,
        min_lr_ratio=1.0,
        num_epochs=4,
        eval_interval=32,
        measure=measure,
    )
    assert {p.dtype for p in seen[-1].values()} == {torch.bfloat16}
    assert {p.dtype for p in toy.weights(objective).values()} == {torch.float32}
    moved = toy.weights(objective)["drafter.head.weight"] - start["drafter.head.weight"]
    assert 1e-5 < moved.abs().max() < 1e-4
    saved = load_file(result.checkpoint / "model.safetensors")
    for name, value in saved.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, seen[-1][f"drafter.{name}"])
    masters = read_state(result.checkpoint).masters
    assert torch.equal(masters["drafter.head.weight"], toy.weights(objective)["drafter.head.weight"])


# -- looking: evaluation, best, early stop, watchers


def test_best_follows_measured_acceptance_and_not_the_loss(tmp_path):
    taus = iter([1.0, 1.2, 1.9, 1.4, 1.5])
    result, _, log = toy.run(
        tmp_path,
        max_steps=8,
        eval_interval=2,
        held_out=True,
        measure=lambda: {"tau": next(taus), "accepted": 3},
        save_interval=2,
    )
    losses = log.of("eval/loss")
    assert min(losses, key=losses.__getitem__) == 8, "the loss falls to the end"
    assert (result.best_tau, result.best_step) == (1.9, 4)
    assert (tmp_path / "best").resolve() == tmp_path / "checkpoints" / "step_000004"
    assert (tmp_path / "latest").resolve() == result.checkpoint == tmp_path / "checkpoints" / "step_000008"
    assert log.of("measured/tau") == {0: 1.0, 2: 1.2, 4: 1.9, 6: 1.4, 8: 1.5}
    assert log.of("measured/accepted")[8] == 3
    assert log.of("measured/tau_gap")[4] == pytest.approx(log.of("eval/tau_sim")[4] - 1.9)


@pytest.mark.parametrize(("patience", "stops_at"), [(2, 8), (3, 10), (0, 16)])
def test_early_stop(patience, stops_at, tmp_path):
    taus = iter([1.0, 1.5, 2.0, 2.0, 1.9] + [1.1] * 9)
    result, *_ = toy.run(
        tmp_path, max_steps=16, eval_interval=2, early_stop=patience, measure=lambda: {"tau": next(taus)}
    )
    assert (result.step, result.reason) == (stops_at, "early_stop" if patience else "done")
    assert result.best_step == 6, "of equal ones the later step, but patience counts from the first"


def test_early_stop_needs_a_measure(tmp_path):
    with pytest.raises(UserError, match="no prompts to measure it on"):
        toy.run(tmp_path, early_stop=1, eval_interval=1)


def test_held_out_loss_is_per_slot_of_all_batches(tmp_path):
    _, _, log = toy.run(tmp_path, max_steps=1, eval_interval=1, held_out=True)
    objective = toy.Toy().eval()
    outputs = [objective(Features(b, {}, toy.TABLE[b.ids])) for b in toy.Rows(8, 2)]
    wanted = sum(o.loss.item() for o in outputs) / sum(o.count.item() for o in outputs)
    assert log.of("eval/loss")[0] == pytest.approx(wanted, rel=1e-6)
    assert log.of("eval/loss")[1] < wanted


def test_looking_leaves_no_trace_in_what_is_learned(tmp_path):
    """Dropout draws from the global stream; measuring and watching draw from it too, and must not shift it."""

    def measure() -> dict[str, float]:
        return {"tau": 1 + torch.rand(()).item()}

    class Watch:
        interval = 3
        steps: list[int] = []  # noqa: RUF012

        def __call__(self, step: int) -> None:
            assert not torch.is_grad_enabled() and not watched.training
            torch.rand(5)
            self.steps.append(step)

    watched = toy.Toy(dropout=0.3)
    _, plain, _ = toy.run(tmp_path / "a", objective=toy.Toy(dropout=0.3))
    toy.run(tmp_path / "b", objective=watched, eval_interval=1, held_out=True, measure=measure, watchers=[Watch()])
    assert same(plain, watched) and Watch.steps == [3, 6]


def test_a_gap_between_simulation_and_measurement_is_named(tmp_path, capsys):
    _, _, log = toy.run(tmp_path, num_epochs=4, eval_interval=32, held_out=True, measure=lambda: {"tau": 1.1})
    event = log.kinds("mismatch")[0]
    assert event["step"] == 32 and event["cause"] == "unknown" and event["measured"] == 1.1
    assert "WARNING: train/serve mismatch, or data that is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("real", "replayed", "simulated", "cause", "says"),
    [
        (2.1, None, 3.0, None, ""),
        (1.0, None, 1.4, None, ""),
        (1.9, None, 3.0, "unknown", "is 3.00 simulated on the held-out data and 1.90 in decoding of the prompts"),
        (1.9, None, None, None, ""),
        (1.9, 1.9, 3.0, "data", "let the target itself answer"),
        (1.9, 1.98, 3.0, "data", "probably the data are not the target's own text"),  # within 5 %
        (1.9, 1.9, 3.0, "data", "if the prompts are of another kind than the data"),
        (1.9, 1.7, 1.9, "serving", "on the very texts that it wrote training says 1.70"),
        (1.9, 2.01, None, "serving", "taps, positions, masks and whether what decodes is a stale checkpoint"),
        (1.2, 3.0, 3.0, "serving", "train/serve mismatch: decoding had an accept length of 1.20"),
        (2.5, 2.5, 2.4, None, ""),
        (1.0, 1.0, None, None, ""),
    ],
)
def test_causes_of_a_mismatch(real, replayed, simulated, cause, says):
    found = mismatch(real, replayed, simulated)
    assert (None if found is None else found[0]) == cause
    assert found is None or says in found[1]


def test_a_replay_that_differs_is_an_event(tmp_path, capsys):
    taus = iter([{"tau": 2.0, "tau_replayed": 2.01}, {"tau": 2.0, "tau_replayed": 2.3}])
    _, _, log = toy.run(tmp_path, max_steps=8, eval_interval=8, measure=lambda: next(taus))
    assert log.of("measured/tau_replayed") == {0: 2.01, 8: 2.3}
    (event,) = log.kinds("mismatch")
    assert event | {"text": ""} == {
        "step": 8, "text": "", "cause": "serving", "measured": 2.0, "replayed": 2.3, "simulated": None
    }  # fmt: skip
    assert event["text"] in capsys.readouterr().err.replace("\n", " ")


# -- options


def test_nothing_to_train(tmp_path):
    with pytest.raises(UserError, match="every parameter of this drafter is frozen"):
        toy.run(tmp_path, objective=toy.Toy().requires_grad_(False))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option",
    [
        {"learning_rate": 0.01},
        {"warmup_steps": 4},
        {"warmup_steps": None, "warmup_ratio": 0.5},
        {"min_lr_ratio": 0.9},
        {"weight_decay": 0.5},
        {"betas": (0.5, 0.6)},
        {"max_grad_norm": 0.01},
        {"mixed_precision": "bf16"},
        {"seed": 5},
        {"batch_size": 4},
        {"gradient_accumulation_steps": 2},
        {"num_epochs": 2},
        {"max_steps": 3},
    ],
    ids=str,
)
def test_options_that_change_what_is_learned(option, tmp_path):
    """The toy has dropout, so that the seed counts; a run without the option is repeated exactly."""
    base = {"batch_size": 2}
    first, again, changed = (
        toy.run(tmp_path / name, objective=toy.Toy(dropout=0.2), **(base | more))[1]
        for name, more in (("a", {}), ("b", {}), ("c", option))
    )
    assert same(first, again) and not same(first, changed)


def test_weight_decay_is_for_matrices(tmp_path):
    _, plain, _ = toy.run(tmp_path / "a", max_steps=1, learning_rate=1e-3)
    _, decayed, _ = toy.run(tmp_path / "b", max_steps=1, learning_rate=1e-3, weight_decay=1.0)
    a, b = toy.weights(plain), toy.weights(decayed)
    assert {n for n in a if not torch.equal(a[n], b[n])} == {"drafter.up.weight", "drafter.head.weight"}


def test_intervals(tmp_path):
    _, _, log = toy.run(tmp_path, log_interval=3, save_interval=4, eval_interval=5, held_out=True, keep=9)
    assert list(log.of("train/loss")) == [3, 6, 8]
    assert list(log.of("eval/loss")) == [0, 5, 8]
    assert [e["step"] for e in log.kinds("checkpoint")] == [4, 8]


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(UserError, match="fp16 does not work on cpu; take bf16"):
        toy.run(tmp_path, mixed_precision="fp16")


def test_fsdp_wants_several_processes(tmp_path):
    with pytest.raises(UserError, match="start it with torchrun"):
        toy.run(tmp_path, fsdp=True)


def test_verbose_says_what_is_trained_and_why_something_is_zero(tmp_path, capsys):
    toy.run(tmp_path / "quiet")
    assert "gradient norm" not in capsys.readouterr().err
    toy.run(tmp_path / "loud", verbose=True, batches=toy.Rows(8, 1, empty=(2,)))
    said = capsys.readouterr().err
    assert "167 trainable weights in 6 tensors, 6 frozen; 8 steps" in said
    assert "zero because the loss mask is empty" in said and "gradient norm" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"betas": (0.9, 1.0)}, "less than 1"),
        ({"betas": (0.9,)}, "must be two numbers"),
        ({"resume": True, "resume_from": Path("x")}, "give one"),
        ({"early_stop": 2, "eval_interval": 0}, "--eval-interval 0 makes none"),
        ({"learning_rat": 1}, "Extra inputs"),
    ],
)
def test_options_that_do_not_go_together(options, says):
    with pytest.raises(pydantic.ValidationError, match=says):
        TrainOptions(**options)


# -- what a person sees


def test_lines_where_there_is_no_terminal(tmp_path):
    out = io.StringIO()
    toy.run(
        tmp_path, log_interval=4, eval_interval=4, held_out=True, measure=lambda: {"tau": 1.5},
        console=Console(file=out, soft_wrap=True),
    )  # fmt: skip
    lines = [line for line in out.getvalue().splitlines() if "/8 " in line]
    assert [line.split("  ")[0] for line in lines] == ["step 4/8", "step 8/8"]
    words = [part.split(" ")[0] for part in lines[1].split("  ")[1:]]
    assert words == ["loss", "lr", "tau_sim", "tau", "tok/s", "eta"]


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    with Bar(10, console=Console(file=out, force_terminal=True, width=140)) as bar:
        bar.show(3, {"train/loss": 1.25, "measured/tau": 2.5, "train/lr": 1e-4})
        bar.say("[a line] above")
        bar.advance(4)
    assert "step 4/10" in out.getvalue() and "loss 1.2500" in out.getvalue() and "[a line] above" in out.getvalue()
    assert clock(59.6) == "1:00" and clock(3723) == "1:02:03"


def test_other_ranks_are_silent():
    out = io.StringIO()
    with Bar(10, enabled=False, console=Console(file=out)) as bar:
        bar.show(3, {"train/loss": 1.25})
        bar.say("nothing")
    assert not out.getvalue().strip()


def test_the_reference_loss_is_the_toys():
    """The oracle above calls the objective; this one does not."""
    batch = toy.Rows().batch([5, 9])
    objective = toy.Toy()
    out = objective(Features(batch, {}, toy.TABLE[batch.ids]))
    d, total = objective.drafter, 0.0
    for b in range(2):
        for t in range(toy.T - 1):
            if batch.mask[b, t + 1]:
                hidden = F.silu(d.up(d.norm(toy.TABLE[batch.ids[b, t]])))
                total -= d.head(hidden).log_softmax(-1)[batch.ids[b, t + 1]].item()
    assert out.loss.item() == pytest.approx(total, rel=1e-5)
