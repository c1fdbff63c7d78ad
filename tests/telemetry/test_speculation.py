"""Rolling acceptance and speed: the tables against a slow recomputation from a list of cycles."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from contract.runs import MAKERS, Listener, decoded
from understudy.core.errors import UserError
from understudy.core.records import Cycle, Needs, Rows
from understudy.decoding.stats import Stats
from understudy.telemetry.run import read_table
from understudy.telemetry.speculation import SpeculationMetrics
from understudy.telemetry.stopwatch import SECTIONS

K = 4


@dataclass
class Made:
    """A cycle's counts and times before it is one."""

    drafted: int
    accepted: int
    cut: int = 0  # committed tokens lost at a stop
    times: dict[str, float] = field(default_factory=dict)
    learn: float = 0.0  # added to `listen` after all listeners have run
    prefill: bool = False

    @property
    def committed(self) -> int:
        return max(1, self.accepted + 1 - self.cut)

    @property
    def wall(self) -> float:
        return sum(self.times.values()) + self.learn


def cycle_of(made: Made) -> Cycle:
    rows = Rows(0, torch.zeros(1, dtype=torch.int64), None, {}, None, None, None)
    seconds = {**dict.fromkeys(SECTIONS, 0.0), **made.times}
    index = 0 if made.prefill else 1
    return Cycle(
        index, [1] * made.committed, made.accepted, [2] * made.drafted, None, [], rows, None, False, {}, {}, 0, seconds
    )


def feed(metrics: SpeculationMetrics, cycles: list[Made]) -> None:
    """As the engine does it: what listeners cost is added to a cycle once they have all run."""
    for made in cycles:
        cycle = cycle_of(made)
        metrics.on_cycle(cycle)
        cycle.seconds["listen"] += made.learn


def rows_of(cycles: list[Made], window: int, plain: float | None) -> list[dict[str, Any]]:
    """The definitions, written out."""
    blocks = [made for made in cycles if not made.prefill]
    rows = []
    for n, block in enumerate(blocks, 1):
        last = blocks[max(0, n - window) : n]
        row: dict[str, Any] = {"step": n}
        for k in range(1, K + 1):
            row[f"acc@{k}"] = len([b for b in last if b.drafted >= k and b.accepted >= k]) / len(last)
        drafted = sum(b.drafted for b in last)
        row["block_acc"] = sum(b.accepted for b in last) / drafted if drafted else None
        row["wall_ms"] = 1000 * block.wall
        row["speedup"] = None if plain is None or not block.wall else block.committed * plain / (1000 * block.wall)
        row["drafter_ms"], row["verifier_ms"] = 1000 * block.times["draft"], 1000 * block.times["verify"]
        rows.append(row)
    return rows


def check(got: list[dict[str, Any]], want: list[dict[str, Any]], columns: list[str]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert list(one) == columns
        for name in columns:
            expected = other[name]
            assert one[name] == (None if expected is None else pytest.approx(expected, rel=1e-7, abs=1e-9)), name


ACCEPTANCE = ["step", "acc@1", "acc@2", "acc@3", "acc@4", "block_acc"]
SPEED = ["step", "wall_ms", "speedup", "drafter_ms", "verifier_ms"]

SECONDS = st.floats(0, 0.5, allow_subnormal=False)


@st.composite
def made_cycles(draw) -> Made:
    drafted = draw(st.integers(0, K))
    accepted = draw(st.integers(0, drafted))
    times = {name: draw(SECONDS) for name in ("draft", "verify", "sample", "cache", "listen", "other")}
    return Made(drafted, accepted, draw(st.integers(0, 1)), times, draw(SECONDS), draw(st.integers(0, 5)) == 0)


@settings(max_examples=60, deadline=None)
@given(
    cycles=st.lists(made_cycles(), max_size=25),
    window=st.integers(1, 8),
    plain=st.one_of(st.none(), st.floats(0.1, 50)),
    split=st.integers(0, 25),
)
def test_tables_are_what_the_definitions_say_whole_and_resumed(tmp_path_factory, cycles, window, plain, split):
    want = rows_of(cycles, window, plain)
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    metrics = SpeculationMetrics(whole, K, window, 0, plain, metrics_out=whole / "out.csv")
    feed(metrics, cycles)
    metrics.close()
    check(read_table(whole / "metrics/acceptance.csv"), want, ACCEPTANCE)
    check(read_table(whole / "metrics/speed.csv"), want, SPEED)
    check(read_table(whole / "out.csv"), want, ACCEPTANCE + SPEED[1:])
    # a run that is killed after its checkpoint and resumed there
    first = SpeculationMetrics(parts, K, window, 0, plain, metrics_out=parts / "out.csv")
    feed(first, cycles[:split])
    state = first.state_dict()
    feed(first, cycles[split : split + 3])
    second = SpeculationMetrics(parts, K, window, 0, plain, metrics_out=parts / "out.csv", state=state)
    feed(second, cycles[split:])
    second.close()
    for name in ("metrics/acceptance.csv", "metrics/speed.csv", "out.csv"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def timed(drafted: int, accepted: int, ms: float = 10.0, learn_ms: float = 0.0) -> Made:
    return Made(drafted, accepted, times={"draft": ms / 4000, "verify": 3 * ms / 4000}, learn=learn_ms / 1000)


def test_literal_rows(tmp_path):
    metrics = SpeculationMetrics(tmp_path, 2, window=2, plain_ms_per_token=8.0)
    feed(metrics, [timed(2, 2), timed(1, 1), timed(2, 0, ms=15, learn_ms=5), timed(0, 0)])
    metrics.close()
    assert (tmp_path / "metrics/acceptance.csv").read_text().splitlines() == [
        "step,acc@1,acc@2,block_acc",
        "1,1,1,1",
        "2,1,0.5,1",  # the second block had one draft: it has no first two that were accepted
        "3,0.5,0,0.333333333",
        "4,0,0,0",  # one of the two blocks drafted nothing
    ]
    assert (tmp_path / "metrics/speed.csv").read_text().splitlines() == [
        "step,wall_ms,speedup,drafter_ms,verifier_ms",
        "1,10,2.4,2.5,7.5",
        "2,10,1.6,2.5,7.5",
        "3,20,0.4,3.75,11.25",  # listeners took a quarter of it
        "4,10,0.8,2.5,7.5",
    ]


def test_a_table_that_is_being_written_parses_and_lags_one_block(tmp_path):
    metrics = SpeculationMetrics(tmp_path, K)
    for n in range(5):
        feed(metrics, [timed(4, 2)])
        for name in ("acceptance", "speed"):
            with (tmp_path / "metrics" / f"{name}.csv").open(newline="") as file:
                assert len(list(csv.DictReader(file))) == n
    metrics.close()
    assert len(read_table(tmp_path / "metrics/speed.csv")) == 5


def test_resuming_without_a_state_goes_on_after_the_last_row_that_both_tables_have(tmp_path):
    metrics = SpeculationMetrics(tmp_path, K)
    feed(metrics, [timed(4, 1)] * 4)
    metrics.close()
    speed = tmp_path / "metrics/speed.csv"
    speed.write_text("".join(speed.read_text().splitlines(keepends=True)[:-1]) + "4,1")  # killed between the two
    again = SpeculationMetrics(tmp_path, K)
    feed(again, [timed(4, 3)])
    again.close()
    for name in ("acceptance", "speed"):
        rows = read_table(tmp_path / "metrics" / f"{name}.csv")
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["wall_ms"] == 10


def test_metrics_out_is_written_anew_and_needs_no_folder(tmp_path):
    out = tmp_path / "benchmark" / "metrics.csv"
    for count, depth in ((3, 4), (2, 1)):
        metrics = SpeculationMetrics(None, depth, metrics_out=out)
        feed(metrics, [timed(4, 1)] * count)
        metrics.close()
        rows = read_table(out)
        assert len(rows) == count
        assert list(rows[0]) == [*ACCEPTANCE[: depth + 1], "block_acc", *SPEED[1:]]
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        SpeculationMetrics(None, K, metrics_out=tmp_path / "file" / "m.csv")


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    metrics = SpeculationMetrics(None, 2, every=2, summary=lines.append)
    feed(metrics, [timed(2, 1)] * 5)
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4", "step 5"]


def test_the_summary_says_the_windows_figures(tmp_path):
    lines: list[str] = []
    reported: list[tuple[int, dict[str, float]]] = []
    metrics = SpeculationMetrics(
        None, 2, window=2, every=4, plain_ms_per_token=12.0, summary=lines.append, learns=True,
        report=lambda step, figures: reported.append((step, figures)),
    )  # fmt: skip
    feed(metrics, [timed(2, 0), timed(2, 0), timed(2, 2), timed(2, 1, ms=20, learn_ms=10)])
    metrics.close()
    assert lines == [
        "step 4: acc@1 1.00, acc@2 0.50, block_acc 0.75, tau 2.50, 125.0 tokens/s, speedup 1.50x, "
        "learning and telemetry 25.0% of the time"
    ]
    ((step, figures),) = reported
    assert step == 4
    assert figures == pytest.approx(
        {
            "acc@1": 1,
            "acc@2": 0.5,
            "block_acc": 0.75,
            "tau": 2.5,
            "tokens_per_s": 125,
            "speedup": 1.5,
            "listening": 0.25,
        }
    )


def test_every_0_is_silent_and_what_was_not_measured_is_not_said():
    lines: list[str] = []
    for every in (0, 1):
        metrics = SpeculationMetrics(None, 1, every=every, summary=lines.append)
        feed(metrics, [timed(0, 0)])
        metrics.close()
        metrics.close()
    assert lines == ["step 1: acc@1 0.00, tau 1.00, 100.0 tokens/s"]


@pytest.mark.parametrize("name", ["ragged", "ragged-tree", "none-0"])
def test_on_real_decoding_the_tables_agree_with_the_sums(name, tmp_path):
    stats = Stats()
    cycles: list[Cycle] = []
    metrics = SpeculationMetrics(tmp_path, 5, window=1000, plain_ms_per_token=1.0)
    run = decoded("qwen3", MAKERS[name], tiny.prompt(), listeners=[metrics, Listener(cycles.append)])
    metrics.close()
    for cycle in run.cycles:
        stats.add(cycle)
    last = read_table(tmp_path / "metrics/acceptance.csv")[-1]
    assert last["step"] == stats.cycles
    reached = [last[f"acc@{k}"] for k in range(1, 6)]
    assert reached[: len(stats.acc_at)] == pytest.approx(stats.acc_at)
    assert 1 + sum(reached) == pytest.approx(stats.tau)
    assert last["block_acc"] == (pytest.approx(stats.acceptance_rate) if stats.drafted else None)
    speed = read_table(tmp_path / "metrics/speed.csv")
    assert sum(row["wall_ms"] for row in speed) == pytest.approx(1000 * stats.decode_s)
    assert sum(row["speedup"] * row["wall_ms"] for row in speed) == pytest.approx(stats.tokens)
    assert sum(row["verifier_ms"] for row in speed) == pytest.approx(1000 * stats.seconds["verify"])


def test_what_other_listeners_cost_is_in_wall_ms(tmp_path):
    def learn(cycle: Cycle) -> None:
        import time

        time.sleep(0.01)

    for order in (0, 1):
        folder = tmp_path / str(order)
        metrics = SpeculationMetrics(folder, 4)
        listeners: list[Any] = [metrics, Listener(learn)]
        decoded("qwen3", MAKERS["ragged"], tiny.prompt(), listeners=listeners[:: -1 if order else 1], max_new_tokens=8)
        metrics.close()
        assert all(row["wall_ms"] > 10 for row in read_table(folder / "metrics/speed.csv"))


def test_it_asks_for_nothing_and_keeps_no_tensor():
    assert SpeculationMetrics.needs == Needs()
    metrics = SpeculationMetrics(None, K)
    feed(metrics, [timed(4, 2)])
    assert not any(isinstance(value, Cycle | Rows) for value in vars(metrics).values())


def test_an_unwritable_folder_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        SpeculationMetrics(Path(tmp_path / "file"), K)
