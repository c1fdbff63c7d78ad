"""The cost model against counting by hand, and measured times against a clock that counts rows of layers."""

from __future__ import annotations

import json
import random
import time
from statistics import fmean

import pytest
import torch

import tiny
from understudy.analysis import clock, cost
from understudy.analysis.clock import medians
from understudy.analysis.cost import Cost, Exit, depths, expected_tau, measure_cost
from understudy.core.errors import UserError
from understudy.target.target import Target

CPU = torch.device("cpu")
F, LAYER, HEAD = 3.0, 2.0, 0.5  # of a pass, of a layer per pass, of the head per row


def linear(layers: int = 10, first: tuple[int, ...] = (1, 5, 9)) -> Cost:
    """Ten layers; a layer costs as much for many rows as for one, the head does not."""
    whole = {w: F + layers * LAYER + HEAD * w for w in (1, 2, 4, 8)}
    return Cost(layers, 100, whole, {w: HEAD * w for w in whole}, {e: F + LAYER * e for e in first})


@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_tau_is_the_sum_over_prefixes(agreement, steps):
    assert expected_tau(agreement, steps) == pytest.approx(sum(agreement**k for k in range(steps + 1)))


def test_tau_of_drafts_that_are_right_by_chance():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(20_000, 4, generator=generator) < 0.6
    taus = 1 + right.cumprod(1).sum(1)
    assert fmean(taus.tolist()) == pytest.approx(expected_tau(0.6, 4), abs=0.03)


def test_a_pass_is_what_is_fixed_and_its_layers():
    found = linear()
    assert found.fixed == pytest.approx(F)
    for width in (1, 2, 3, 6, 8):  # 3 and 6 lie between measured widths
        assert found.rows(width) == pytest.approx(F + 10 * LAYER + HEAD * width)
        assert found.some(4, width) == pytest.approx(F + 4 * LAYER)
    assert linear(first=()).fixed == 0


def test_an_exit_cycle_counts_what_the_engine_runs():
    # 4 drafts at E = 3: 5 rows one by one through 3 layers, 4 heads, then 5 rows through 7 layers and the head
    want = 5 * (F + 3 * LAYER) + 4 * HEAD + (F + 7 * LAYER) + 5 * HEAD
    assert linear().exit_cycle(3, 4) == pytest.approx(want)


def test_the_best_number_of_drafts():
    found = linear().best_exit(1, 0.9)
    by_steps = {k: expected_tau(0.9, k) * linear().rows(1) / linear().exit_cycle(1, k) for k in range(1, 8)}
    assert by_steps[found.steps] == max(by_steps.values()) == found.speedup
    assert found == Exit(1, 0.9, found.steps, expected_tau(0.9, found.steps), found.cycle, found.speedup)
    assert found.speedup == pytest.approx(found.tau * linear().rows(1) / found.cycle)
    assert 1 < found.steps < 8 and linear().best_exit(1, 0.1).steps == 1
    assert linear().best_exit(1, 1.0).steps == 7  # one row is the last committed token's; 8 were timed


def test_a_block_pays_from_its_breakeven_on():
    found = linear().block(2, 4)
    assert found.draft == pytest.approx(F + 2 * LAYER + 4 * HEAD)
    assert found.verify == pytest.approx(linear().rows(4))
    assert found.breakeven * linear().rows(1) == pytest.approx(found.draft + found.verify)
    assert linear().block(3, 4).breakeven > found.breakeven


def test_files_keep_it():
    again = Cost.from_json(json.loads(json.dumps(linear().as_json())))
    assert again.exit_cycle(3, 4) == pytest.approx(linear().exit_cycle(3, 4)) and again.context == 100


def test_depths_lie_inside_the_target():
    assert depths(12) == [1, 3, 6, 11]
    assert depths(2) == [1] and depths(1) == []
    assert all(0 < depth < layers for layers in range(2, 40) for depth in depths(layers))


def counting(monkeypatch, layers: int = 6) -> Target:
    """A target with a clock: a layer takes 1 s per row, the head 0.25 s per row."""
    model = tiny.fresh_model("qwen3", num_hidden_layers=layers)
    spent = [0.0]

    def spend(each: float):
        return lambda _, args, out: spent.__setitem__(0, spent[0] + each * args[0].shape[-2])

    for layer in model.get_decoder().layers:
        layer.register_forward_hook(spend(1.0))
    model.lm_head.register_forward_hook(spend(0.25))
    for name in ("now", "busy"):
        monkeypatch.setattr(cost, name, lambda device: spent[0])
    return Target(model)


@pytest.mark.parametrize("text", [list(range(5, 40)), [7, 8, 9]])
def test_what_is_timed_is_what_it_is_called(monkeypatch, text):
    found, refused = measure_cost(counting(monkeypatch), text, seconds=1.0)
    assert refused is None and found.layers == 6 and found.context == cost.CONTEXT
    assert found.passes == pytest.approx({w: 6.25 * w for w in cost.WIDTHS})
    assert found.heads == pytest.approx({w: 0.25 * w for w in cost.WIDTHS})
    assert found.first == pytest.approx({depth: float(depth) for depth in depths(6)})
    assert found.exit_cycle(2, 3) == pytest.approx(4 * 2 + 3 * 0.25 + 4 * 4 + 4 * 0.25)


def test_the_time_for_timing_is_kept(monkeypatch):
    calls = []
    monkeypatch.setattr(cost, "medians", lambda parts, tries, *rest: calls.append(tries) or medians(parts, 1, *rest))
    once = sum(6.5 * w for w in cost.WIDTHS) + sum(depths(6))
    for seconds in (0.0, 20.5 * once, 1e9):
        measure_cost(counting(monkeypatch), [5, 6], seconds)
    assert calls[2::3] == [5, 20, 101]


def test_a_target_that_cannot_be_split_has_no_exits(monkeypatch):
    def refuse(target, feature, exit_layer=None):
        raise UserError(f"no {feature}")

    monkeypatch.setattr(cost, "probe", refuse)
    found, refused = measure_cost(counting(monkeypatch), [5, 6, 7], seconds=1.0)
    assert refused == "no split" and not found.first and found.passes[4] == pytest.approx(25)


def test_medians_are_of_each_part_alone():
    spent, log = [0.0], []
    costs = {"a": iter([1, 9, 2]), "b": iter([5, 4, 30])}

    def part(name):
        log.append(name)
        spent[0] += next(costs[name])

    def undo():
        log.append("undo")
        spent[0] += 100

    found = medians(
        {"a": lambda: part("a"), "b": lambda: part("b")}, 3, CPU, {"a": undo}, clock=lambda device: spent[0]
    )
    assert found == {"a": 2, "b": 5}
    assert log == ["a", "undo", "b"] * 3


def test_parts_come_in_changing_order():
    log: list[str] = []
    parts = {name: (lambda name=name: log.append(name)) for name in "abcd"}
    medians(parts, 12, CPU, shuffle=random.Random(0))
    rounds = [tuple(log[i : i + 4]) for i in range(0, 48, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds) and len(set(rounds)) > 6


def test_waiting_counts_only_where_other_threads_may_work():
    def waited() -> float:
        began = clock.busy(CPU)
        time.sleep(0.05)
        return clock.busy(CPU) - began

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert waited() < 0.04
        torch.set_num_threads(2)
        assert waited() > 0.04
    finally:
        torch.set_num_threads(threads)
