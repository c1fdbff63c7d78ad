"""The schedule by its formula, and the ablation modes as weights over time."""

from __future__ import annotations

import pytest

from online.fake import World
from understudy.core.errors import UserError
from understudy.drafting.learning import LearnOptions
from understudy.training.online import MODES, OnlineLearner, PiecewiseSchedule


def at(schedule: PiecewiseSchedule, step: int) -> dict[str, float]:
    schedule.step = step
    return schedule.weights()


def test_defaults_by_verify_pass() -> None:
    schedule = PiecewiseSchedule(warmup=1000, kl0=1.0, klmin=0.1, pgmax=0.2)
    start = {"kd": 0.5, "ce": 0.5, "pg": 0.0, "kl": 1.0, "entropy": 0.0}
    assert at(schedule, 0) == at(schedule, 1000) == start
    assert at(schedule, 1500) == pytest.approx({"kd": 0.25, "ce": 0.5, "pg": 0.1, "kl": 0.55, "entropy": 0.0})
    end = {"kd": 0.0, "ce": 0.5, "pg": 0.2, "kl": 0.1, "entropy": 0.0}
    assert at(schedule, 2000) == at(schedule, 10**6) == pytest.approx(end)


def test_without_warm_up_the_last_weights_hold_from_the_start() -> None:
    assert at(PiecewiseSchedule(0, 1.0, 0.1, 0.2), 0) == pytest.approx(
        {"kd": 0, "ce": 0.5, "pg": 0.2, "kl": 0.1, "entropy": 0}
    )


def test_state_goes_on_where_it_was() -> None:
    one, other = PiecewiseSchedule(10, 1.0, 0.1, 0.2), PiecewiseSchedule(10, 1.0, 0.1, 0.2)
    one.step = 17
    other.load_state_dict(one.state_dict())
    assert other.step == 17 and other.weights() == one.weights()
    with pytest.raises(UserError, match="step"):
        other.load_state_dict({"step": "many"})


def of(options: LearnOptions) -> PiecewiseSchedule:
    return OnlineLearner(World().drafter(), options).schedule


@pytest.mark.parametrize(
    ("option", "value", "loss", "step"),
    [
        ("dvi_kd_lambda0", 0.9, "kd", 0),
        ("dvi_kd_lambdamin", 0.3, "kd", 9999),
        ("dvi_ce_lambda", 0.9, "ce", 0),
        ("dvi_pg_lambda_max", 0.9, "pg", 9999),
        ("dvi_kl_lambda0", 0.9, "kl", 0),
        ("dvi_kl_lambdamin", 0.9, "kl", 9999),
        ("dvi_entropy_weight", 0.9, "entropy", 0),
    ],
)
def test_each_weight_has_its_option(option: str, value: float, loss: str, step: int) -> None:
    plain, changed = at(of(LearnOptions()), step), at(of(LearnOptions(**{option: value})), step)
    assert changed[loss] == pytest.approx(value)
    assert {k for k in plain if plain[k] != changed[k]} == {loss}


def test_warm_up_has_its_option() -> None:
    assert at(of(LearnOptions(dvi_warmup_steps=10)), 15)["pg"] == pytest.approx(0.1)


# mode -> losses with a weight at the start, in the middle of the ramp, after it
ON = {
    "full": ({"kd", "ce", "kl"}, {"kd", "ce", "kl", "pg"}, {"ce", "kl", "pg"}),
    "kd_only": ({"kd"},) * 3,
    "ce_only": ({"ce"},) * 3,
    "pg_only": ({"pg"},) * 3,
    "kd+ce": ({"kd", "ce"},) * 3,
    "kd+pg": ({"kd"}, {"kd", "pg"}, {"kd", "pg"}),
}


@pytest.mark.parametrize("mode", list(ON))
def test_modes_switch_losses_and_nothing_else(mode: str) -> None:
    assert list(MODES) == list(ON)
    options = LearnOptions(dvi_online=True, dvi_lr=0.1, **MODES[mode])
    for step, expected in zip((500, 1500, 5000), ON[mode], strict=True):
        assert {name for name, weight in at(of(options), step).items() if weight} == expected
    changed = {name for name, value in options if value != getattr(LearnOptions(), name)} - {"dvi_online", "dvi_lr"}
    assert all("lambda" in name or name == "dvi_warmup_steps" for name in changed)
    assert options.dvi_online and options.dvi_lr == 0.1
