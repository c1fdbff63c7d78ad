"""Ablations: grid files, what is run and what is not run again, and the table that comes out."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from understudy import cli
from understudy.assets import prompts_path
from understudy.bench.ablate import Running, ablate, locked
from understudy.bench.endstate import end_mean, markdown, read_curve, summarise
from understudy.bench.grid import Grid, Metrics, cells, chosen, find, read_grid, shipped
from understudy.bench.places import Place
from understudy.cli.train_dvi import TrainDviConfig
from understudy.core.errors import UserError
from understudy.drafting.learning import LearnOptions
from understudy.report.intervals import np
from understudy.training.online.modes import MODES

# A command that writes a run folder as ours do: it refuses one that has content. acc is 1/10 of its step, plus gain and seed / 100.
FAKE = """
import argparse, os, pathlib, signal, sys, time
options = argparse.ArgumentParser()
for name in ("--gain", "--seed", "--once", "--do"):
    options.add_argument(name, default="0")
options.add_argument("--output-dir", type=pathlib.Path)
args = options.parse_args()
folder = args.output_dir
with (folder.parents[1] / "calls").open("a") as calls:
    calls.write(f"{folder.parent.name} {folder.name}\\n")
if folder.exists() and any(folder.iterdir()):
    sys.exit(f"{folder} holds a run")
(folder / "metrics").mkdir(parents=True)
table = folder / "metrics" / "acceptance.csv"
first = args.once == "0" or sum(f"{folder.parent.name} {folder.name}" in line for line in open(folder.parents[1] / "calls")) == 1
if first and args.do == "die":
    table.write_text("half a")
    os.kill(os.getpid(), signal.SIGKILL)
if first and args.do == "fail":
    print("working")
    sys.exit("error: no luck")
if first and args.do == "interrupt":
    table.write_text("half a")
    (folder.parents[1] / "pid").write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
if first and args.do == "nothing":
    sys.exit(0)
rows = [f"{step},{step / 10 + float(args.gain) + int(args.seed) / 100}" for step in range(11)]
table.write_text("\\n".join(["step,acc", *rows]) + "\\n")
print({"stop": '{"ended": "SIGTERM"}', "reason": '{"reason": "SIGTERM"}', "full": '{"reason": "max_steps"}'}.get(args.do, "done"))
"""


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return [sys.executable, "-I", "-S", str(path)]


@pytest.fixture
def grid(fake):
    """A grid of the fake command; keys given replace those here."""

    def make(**keys) -> Grid:
        settings = {
            "name": "tiny",
            "command": fake,
            "runs": {"plain": {}, "better": {"gain": 0.5}},
            "seeds": [0, 1],
            "metrics": {"file": "metrics/acceptance.csv", "y": ["acc"]},
        }
        return Grid.model_validate(settings | keys)

    return make


@pytest.fixture
def drawing() -> None:
    """For tests whose figures are drawn; those of all others are only named, which is much faster."""


@pytest.fixture(autouse=True)
def _no_drawing(request, monkeypatch):
    if "drawing" not in request.fixturenames:
        monkeypatch.setattr("understudy.bench.ablate.draw_curves", lambda path, *_, **__: path.write_text("a figure"))


@pytest.fixture
def run(tmp_path):
    """Run a grid under tmp_path / "out": (results, what failed just now, what was printed)."""

    def go(grid: Grid, only=(), jobs: int = 1, force: bool = False):
        out = io.StringIO()
        console = Console(file=out, width=500)
        results, failed = ablate(grid, tmp_path / "out", chosen(grid, list(only)), jobs, force, console)
        return results, failed, out.getvalue()

    return go


def calls(tmp_path) -> list[str]:
    path = tmp_path / "out" / "tiny" / "calls"
    return path.read_text().splitlines() if path.exists() else []


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return path


GOOD = "name: g\ncommand: bench\nruns: {a: {}}\nmetrics: {file: m.csv, y: [acc]}\n"


# --- grid files -----------------------------------------------------------------------------------------------------------------


def test_every_combination_of_every_run_with_the_last_axis_fastest(grid):
    made = grid(runs={"a": {"x": 1}, "b": {}}, grid={"exit_layer": [1, 2], "greedy": [True, False]}, seeds=[7, 3])
    names = [f"{run}+exit_layer={e}+greedy={g}" for run in "ab" for e in (1, 2) for g in ("true", "false")]
    assert [(cell.seed, cell.name) for cell in cells(made)] == [(7, n) for n in names] + [(3, n) for n in names]
    assert cells(made)[1].flags() == ["--x=1", "--exit-layer=1", "--greedy=false", "--seed=7"]


def test_axes_without_runs(grid):
    assert [name for name, _ in grid(runs={}, grid={"dir": ["a/b", "c"]}).variants()] == ["dir=a_b", "dir=c"]


def test_a_run_wins_over_what_is_fixed(grid):
    made = grid(fixed={"a-b": 1, "c": 2}, runs={"r": {"a_b": 5}})
    assert cells(made)[0].flags() == ["--a-b=5", "--c=2", "--seed=0"]


def test_lists_are_repeated_and_null_is_left_out(grid):
    made = grid(runs={"r": {"stop": ["x y", "-z"], "load": None, "lr": "5e-5", "on": True}})
    argv = cells(made)[0].argv(Path("out"))
    assert argv[4:] == ["--stop=x y", "--stop=-z", "--lr=5e-5", "--on=true", "--seed=0", "--output-dir=out"]


def test_text_is_an_understudy_command_and_a_list_is_any_program(grid):
    assert cells(grid(command="train dvi"))[0].command == (sys.executable, "-m", "understudy", "train", "dvi")
    assert cells(grid(command=["make", "it"]))[0].command == ("make", "it")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("fixd: {a: 1}", "unknown key 'fixd'; did you mean 'fixed'?"),
        ("zzz: 1", "unknown key 'zzz'; the keys are name, command, "),
        ("metrics: {file: m.csv, yy: [acc], y: [acc]}", "unknown key 'metrics.yy'; did you mean 'y'?"),
        ("metrics: {file: m.csv}", "'metrics.y' is missing"),
        ("metrics: {file: m.csv, y: [a], last: 2}", "metrics.last: must be less than or equal to 1 (got 2)"),
        ("metrics: {file: m.csv, y: [a, a]}", "metrics: a column stands twice in y"),
        ("runs: {a: {b: {c: 1}}}", "runs.a.b: must be"),
        ("runs: {a/b: {}}", "runs: 'a/b' cannot name a folder"),
        ("runs: {}", "it names no run: give `runs` or `grid`"),
        ("name: a/b", "name: String should match"),
        ("fixed: {seed: 1}", "fixed: 'seed' is set for each run by `ablate` itself"),
        ("runs: {a: {output-dir: x}}", "'output-dir' is set for each run by `ablate` itself"),
        ("fixed: {a-b: 1, a_b: 2}", "fixed: 'a_b' stands twice"),
        ("fixed: {e: 1}\ngrid: {e: [1, 2]}", "'e' stands in grid and in fixed; one would be ignored"),
        ("grid: {e: []}", "grid.e: List should have at least 1 item"),
        ("grid: {e: [1, 1]}", "two runs get the same name"),
        ("seeds: [1, 1]", "seeds: one stands twice"),
        ("seeds: []", "seeds: List should have at least 1 item"),
        ("baseline: b", "baseline 'b' is no run of it; the runs are a"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(tmp_path, change, says):
    kept = [
        line for line in GOOD.splitlines() if line.split(":")[0] not in [c.split(":")[0] for c in change.split("\n")]
    ]
    path = write(tmp_path, "\n".join([*kept, change]))
    with pytest.raises(UserError) as error:
        read_grid(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert says in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "is not valid YAML: line 1"),
        ("- a", "must hold `key: value` lines, not a list"),
        ("name: a\nname: b", "is not valid YAML: line 2: 'name' stands twice"),
        ("name: a\nruns: {x: {}, x: {}}", "'x' stands twice"),
    ],
)
def test_what_is_no_grid_is_said_in_a_line(tmp_path, text, says):
    with pytest.raises(UserError) as error:
        read_grid(write(tmp_path, text))
    assert says in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*no\.yaml: No such file"):
        read_grid(tmp_path / "no.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a text file in UTF-8"):
        read_grid(tmp_path / "bytes.yaml")


def test_a_grid_is_found_by_file_or_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_grid(find("dvi")).name == "dvi"
    write(tmp_path, GOOD)
    assert read_grid(find("grid.yaml")).name == "g"
    with pytest.raises(UserError, match="no grid 'dvy': give a YAML file, or one that comes with the package: dvi"):
        find("dvy")


def test_set_adds_to_what_is_fixed(grid):
    made = grid(fixed={"n": 5}, required=["train-data-path"]).with_options({"train-data-path": "a.jsonl", "n": "2"})
    assert cells(made)[0].flags() == ["--n=2", "--train-data-path=a.jsonl", "--seed=0"]
    some = grid(runs={"a": {}, "b": {"n": 0}}).with_options({"n": "2"})
    assert [cell.flags()[0] for cell in cells(some)][:2] == ["--n=2", "--n=0"], "a run keeps what it has for itself"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "grid tiny needs --set data=VALUE"),
        ({"data": "d", "gain": "1"}, "--set gain would be ignored: every run of grid tiny has its own"),
        ({"data": "d", "e": "1"}, "--set e would be ignored"),
        ({"data": "d", "seed": "1"}, "--set: 'seed' is set for each run"),
    ],
)
def test_set_that_cannot_be(grid, given, says):
    with pytest.raises(UserError) as error:
        grid(required=["data"], runs={"a": {"gain": 1}, "b": {"gain": 2}}, grid={"e": [1, 2]}).with_options(given)
    assert says in str(error.value)


def test_only_names_runs(grid):
    assert [cell.title for cell in chosen(grid(), ["better"])] == ["better seed 0", "better seed 1"]
    with pytest.raises(UserError, match="--only beter: grid tiny has no such run; did you mean 'better'"):
        chosen(grid(), ["beter"])


def test_the_digest_is_that_of_what_is_run(grid):
    def digest(**keys):
        return cells(grid(**keys))[0].digest

    base = digest(fixed={"a": 1, "b": True})
    assert digest(fixed={"b": "true", "a": "1"}) == base
    assert digest(fixed={"a": 1, "b": True, "c": None}) == base
    assert digest(fixed={"a": 2, "b": True}) != base
    assert digest(fixed={"a": 1, "b": True}, seeds=[5]) != base
    assert digest(fixed={"a": 1, "b": True}, command="bench") != base


# --- the shipped grid -----------------------------------------------------------------------------------------------------------


def test_every_shipped_option_is_one_of_its_command():
    for name in shipped():
        made = read_grid(find(name))
        for _, options in made.variants():
            assert options.keys() <= TrainDviConfig.model_fields.keys()
            TrainDviConfig.model_validate({**options, "train_data_path": "x.jsonl"})


def test_the_shipped_modes_are_those_of_the_library():
    made = read_grid(find("dvi"))
    variants = dict(made.variants())
    assert list(variants) == list(MODES)
    weights = [name for name in LearnOptions.model_fields if "lambda" in name or name.startswith("dvi_entropy")]
    assert len(weights) == 7
    for name, options in variants.items():
        spelled = LearnOptions.model_validate({k: v for k, v in options.items() if k in LearnOptions.model_fields})
        expected = LearnOptions.model_validate(MODES[name])
        for field in [*weights, "dvi_warmup_steps"]:
            assert getattr(spelled, field) == getattr(expected, field), (name, field)


def test_the_shipped_grid_is_one_cadence_one_stream_three_seeds():
    made = read_grid(find("dvi"))
    assert made.seeds == [0, 1, 2]
    assert made.baseline == "kd_only"
    assert made.required == ["train_data_path"]
    assert made.fixed["max_online_train_ms"] == 0, "updates must not depend on time"
    varied = {key for run in made.runs.values() for key in run}
    assert not varied & {"dvi_update_every", "dvi_batch_size", "num_prompts", "max_new_tokens", "exit_layer", "dvi_lr"}


# --- running --------------------------------------------------------------------------------------------------------------------


def test_runs_have_folders_logs_and_records(drawing, grid, run, tmp_path):
    made = grid()
    results, failed, out = run(made)
    root = tmp_path / "out" / "tiny"
    assert not failed
    assert calls(tmp_path) == ["plain seed_0", "better seed_0", "plain seed_1", "better seed_1"]
    assert (root / "better" / "seed_1.log").read_text() == "done\n"
    record = json.loads((root / "better" / "seed_1.json").read_text())
    assert record["state"] == "finished"
    assert record["options"] == {"gain": 0.5}
    assert f"[4/4] better seed 1: {shlex.join(record['argv'])}\n" in out
    assert "better seed 1: finished after 0:0" in out
    assert results["finished"] == {"plain": [0, 1], "better": [0, 1]}
    assert json.loads((root / "results.json").read_text()) == results
    assert (root / "table.md").read_text() == markdown(results)
    assert (root / "acc.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_finished_is_not_run_again(grid, run, tmp_path):
    run(grid(), only=["plain"])
    results, _, out = run(grid())
    assert calls(tmp_path) == ["plain seed_0", "plain seed_1", "better seed_0", "better seed_1"]
    assert "2 of 4 runs are finished already\n[1/2] better seed 0: " in out
    assert results["finished"] == {"plain": [0, 1], "better": [0, 1]}
    before = calls(tmp_path)
    run(grid())
    assert calls(tmp_path) == before


def test_a_run_whose_folder_is_gone_is_run_again(grid, run, tmp_path):
    made = grid(seeds=[0])
    run(made)
    for path in sorted((tmp_path / "out/tiny/plain/seed_0").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "out/tiny/plain/seed_0").rmdir()
    run(made)
    assert calls(tmp_path) == ["plain seed_0", "better seed_0", "plain seed_0"]


def test_a_killed_run_loses_itself_only_and_begins_anew(grid, run, tmp_path):
    made = grid(runs={"a": {}, "dies": {"do": "die", "once": 1}, "b": {}}, seeds=[0])
    results, failed, out = run(made)
    assert list(failed) == ["dies seed 0"]
    assert "it printed nothing (signal 9; " in failed["dies seed 0"]
    assert results["finished"] == {"a": [0], "dies": [], "b": [0]}
    assert results["failed"] == failed
    assert "dies seed 0: FAILED: " in out
    results, failed, _ = run(made)
    assert not failed
    assert calls(tmp_path) == ["a seed_0", "dies seed_0", "b seed_0", "dies seed_0"]
    assert results["finished"] == {"a": [0], "dies": [0], "b": [0]}


def test_when_the_ablation_itself_was_killed_the_run_begins_anew(grid, run, tmp_path):
    made = grid(seeds=[0])
    place = Place(cells(made)[0], tmp_path / "out" / "tiny")
    (place.folder / "metrics").mkdir(parents=True)
    place.write("unfinished")
    assert place.state() == "unfinished"
    assert run(made)[0]["finished"]["plain"] == [0]


@pytest.mark.parametrize(
    ("do", "says"),
    [
        ("fail", "no luck (exit code 1; "),
        ("nothing", "no metrics/acceptance.csv in "),
        ("stop", "stopped by SIGTERM before its end"),
        ("reason", "stopped by SIGTERM before its end"),
    ],
)
def test_a_run_without_an_end_is_a_failure(grid, run, do, says):
    made = grid(runs={"bad": {"do": do}, "good": {}}, seeds=[0])
    results, failed, _ = run(made)
    assert says in failed["bad seed 0"]
    assert list(results["failed"]) == ["bad seed 0"]
    assert results["finished"]["good"] == [0]
    assert run(made, only=["good"])[1] == {}, "an old failure is in the report, but nothing failed now"


def test_a_run_that_says_another_reason_is_finished(grid, run):
    results, failed, _ = run(grid(runs={"plain": {"do": "full"}}, seeds=[0]))
    assert not failed and results["finished"]["plain"] == [0]


def test_a_program_that_is_not_there(grid, run):
    with pytest.raises(UserError, match="cannot run no-such-program: No such file"):
        run(grid(command=["no-such-program"]))


def test_changed_settings_are_refused_unless_forced(grid, run, tmp_path):
    run(grid(seeds=[0]))
    changed = grid(seeds=[0], runs={"plain": {}, "better": {"gain": 0.7}})
    with pytest.raises(UserError) as error:
        run(changed)
    assert "better seed 0 is finished with other settings (gain was 0.5, is 0.7)" in str(error.value)
    assert "--force" in str(error.value)
    assert len(calls(tmp_path)) == 2
    results, _, _ = run(changed, only=["plain"])
    assert results["missing"] == ["better seed 0"], "what was run with other settings is not compared"
    results, _, _ = run(changed, force=True)
    assert calls(tmp_path)[2:] == ["better seed_0"], "plain has not changed"
    assert results["metrics"]["acc"]["runs"]["better"]["end"]["mean"] == pytest.approx(1.65)


def test_a_foreign_folder_is_not_touched(grid, run, tmp_path):
    other = tmp_path / "out/tiny/plain/seed_0/thesis.txt"
    other.parent.mkdir(parents=True)
    other.write_text("precious")
    with pytest.raises(UserError, match="is no run of an ablation: move it"):
        run(grid(), force=True)
    assert other.read_text() == "precious"
    assert not calls(tmp_path)


def test_a_damaged_record_is_said(grid, run, tmp_path):
    run(grid())
    (tmp_path / "out/tiny/plain/seed_0.json").write_text("{")
    with pytest.raises(UserError, match=r"seed_0.json is damaged; remove it and .* to run plain seed 0 anew"):
        run(grid())


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_what_runs_and_keeps_what_is_finished(grid, run, tmp_path):
    made = grid(runs={"a": {}, "waits": {"do": "interrupt", "once": 1}}, seeds=[0])
    with pytest.raises(KeyboardInterrupt):
        run(made)
    child = int((tmp_path / "out/tiny/pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _, failed, _ = run(made)
    assert not failed
    assert calls(tmp_path) == ["a seed_0", "waits seed_0", "waits seed_0"]


def test_jobs_run_at_the_same_time(grid, run, tmp_path):
    # each waits until the other has begun
    code = (
        "import pathlib, sys, time; out = pathlib.Path(sys.argv[-1].partition('=')[2]); root = out.parents[1];"
        "(root / out.parent.name / 'here').touch(); end = time.time() + 20\n"
        "while len(list(root.glob('*/here'))) < 2 and time.time() < end: time.sleep(0.01)\n"
        "(out / 'metrics').mkdir(parents=True); n = len(list(root.glob('*/here')));"
        "(out / 'metrics/acceptance.csv').write_text(f'step,acc\\n1,{n}\\n')"
    )
    made = grid(command=[sys.executable, "-I", "-S", "-c", code], seeds=[0])
    results, failed, _ = run(made, jobs=2)
    assert not failed
    assert [row["end"]["mean"] for row in results["metrics"]["acc"]["runs"].values()] == [2, 2]


def test_two_ablations_cannot_share_a_folder(grid, run, tmp_path):
    root = tmp_path / "out" / "tiny"
    with locked(root), pytest.raises(UserError, match="another ablation is at work in"):
        run(grid())
    run(grid(seeds=[0]))


def test_a_run_that_outlives_its_ablation_holds_the_folder(grid, tmp_path):
    root = tmp_path / "out" / "tiny"
    place = Place(cells(grid(command=[sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]))[0], root)
    with locked(root) as lock:
        left = Running(place, lock)
    try:
        with pytest.raises(UserError, match="or a run that it left"), locked(root):
            pass
    finally:
        left.process.kill()
        left.process.wait()
    with locked(root):
        pass


# --- the table ------------------------------------------------------------------------------------------------------------------


def table(folder: Path, text: str) -> Path:
    (folder / "m.csv").write_text(text)
    return folder


def test_a_curve_leaves_out_what_is_no_number(tmp_path):
    x, y = read_curve(table(tmp_path, "step,a\n1,0.5\n2,\n3,nan\n4,0.7\n"), Metrics(file="m.csv", y=["a"]), "a")
    assert x.tolist() == [1, 4]
    assert y.tolist() == [0.5, 0.7]


@pytest.mark.parametrize(
    ("text", "says"),
    [("step,b\n1,2\n", "has no column a; it has step, b"), ("step,a\n1,\n", "has no numbers in step and a")],
)
def test_a_table_without_the_column_or_numbers(tmp_path, text, says):
    with pytest.raises(UserError) as error:
        read_curve(table(tmp_path, text), Metrics(file="m.csv", y=["a"]), "a")
    assert says in str(error.value)


def test_the_end_is_a_share_of_the_range():
    x, y = np.array([0.0, 5.0, 9.0, 10.0]), np.array([1.0, 2.0, 3.0, 5.0])
    assert end_mean(x, y, 0.1) == 4.0
    assert end_mean(x, y, 0.5) == pytest.approx(10 / 3)
    assert end_mean(x, y, 1.0) == 2.75
    assert end_mean(x, y, 0.01) == 5.0


def test_the_figure_leaves_out_the_first_share(grid, run, monkeypatch):
    drawn = {}
    monkeypatch.setattr("understudy.bench.ablate.draw_curves", lambda path, repeats, *_, **__: drawn.update(repeats))
    metrics = {"file": "metrics/acceptance.csv", "y": ["acc"], "first": 0.25}
    results, _, _ = run(grid(seeds=[1], metrics=metrics | {"last": 1.0}))
    ((x, y),) = drawn["plain"]
    assert x.tolist() == list(range(3, 11))
    assert y.tolist() == pytest.approx([step / 10 + 0.01 for step in range(3, 11)])
    assert results["metrics"]["acc"]["runs"]["plain"]["end"]["mean"] == pytest.approx(0.51), "the table has it all"


def test_differences_are_taken_seed_by_seed():
    # the seeds lie far apart, and the gain is the same in all: only pairs show it
    ends = {"base": {0: 0.1, 1: 0.5, 2: 0.9}, "new": {0: 0.2, 1: 0.6, 2: 1.1}, "lone": {7: 1.0}}
    out = summarise(ends, "base")
    assert out["base"]["difference"] is None
    assert out["base"]["end"]["mean"] == pytest.approx(0.5)
    assert out["base"]["end"]["interval"] == pytest.approx(
        [0.5 - 0.993655, 0.5 + 0.993655], abs=1e-5
    )  # 4.302653 * 0.4 / sqrt(3)
    assert out["new"]["difference"]["mean"] == pytest.approx(0.4 / 3)
    half = 4.302653 * 0.0577350 / 3**0.5
    assert out["new"]["difference"]["interval"] == pytest.approx([0.4 / 3 - half, 0.4 / 3 + half], abs=1e-6)
    assert out["new"]["by_seed"] == {"0": 0.2, "1": 0.6, "2": 1.1}
    assert out["lone"] == {
        "end": {"mean": 1.0, "interval": None, "seeds": 1},
        "by_seed": {"7": 1.0},
        "difference": None,
    }


def test_the_table_says_it_all(grid):
    made = grid(
        command="train dvi",
        fixed={"num_prompts": 9, "dvi_online": True},
        baseline="plain",
        runs={"plain": {}, "new": {}, "lost": {}},
    )
    ends = {"plain": {0: 0.1, 1: 0.2, 2: 0.3}, "new": {0: 0.41, 1: 0.52, 2: 0.60}, "lost": {}}
    results = {
        "grid": made.model_dump(mode="json"),
        "finished": {"plain": [0, 1, 2], "new": [0, 1, 2], "lost": []},
        "failed": {"lost seed 0": "no luck"},
        "missing": ["lost seed 1", "lost seed 2"],
        "metrics": {
            "acc": {"x": "step", "last": 0.1, "plot": "acc.png", "runs": summarise(ends, "plain")},
            "speed": {
                "x": "step",
                "last": 0.5,
                "plot": None,
                "runs": summarise({"plain": {0: 2.0}, "new": {0: 1.5}}, "plain"),
            },
        },
    }
    assert (
        markdown(results)
        == """\
# Ablation tiny

| run | seeds | acc | acc − plain | speed | speed − plain |
|---|--:|--:|--:|--:|--:|
| plain | 3 | 0.20 ± 0.25 | (baseline) | 2 | (baseline) |
| new | 3 | 0.51 ± 0.24 | **+0.310 ± 0.025** | 1.5 | -0.5 |
| lost | 0 | - | - | - | - |

Of each run the mean over the last 10% of step (acc); the last 50% of step (speed). Means over seeds ± half of the 95% t interval. \
Differences to plain seed by seed; bold where the interval excludes 0 (not corrected for their number).

- command: `understudy train dvi`; fixed: num_prompts=9, dvi_online=true
- failed: lost seed 0: no luck
- not run: lost seed 1, lost seed 2

![acc](acc.png)
"""
    )


def test_a_table_without_a_baseline_has_no_differences(grid, run):
    text = markdown(run(grid(seeds=[0]))[0])
    assert text.splitlines()[2:6] == [
        "| run | seeds | acc |",
        "|---|--:|--:|",
        "| plain | 1 | 0.95 |",
        "| better | 1 | 1.45 |",
    ]
    assert "Differences" not in text


# --- the command ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def understudy(monkeypatch, capsys, tmp_path, grid):
    """`understudy ablate` on the tiny grid: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def go(*argv: str, **keys):
        Path("grid.yaml").write_text(yaml.safe_dump(grid(**keys).model_dump(), sort_keys=False))
        code = cli.main(["ablate", *argv])
        return code, *capsys.readouterr()

    return go


def test_the_command_ends_with_the_table_and_a_line_of_json(understudy):
    code, out, err = understudy("grid.yaml", "--output-dir", "out", "--only", "plain,better", "--jobs", "2")
    assert code == 0, err
    assert out.startswith("# Ablation tiny\n")
    assert json.loads(out.splitlines()[-1]) == {"folder": "out/tiny", "finished": 4, "failed": {}, "missing": []}
    assert "[4/4] better seed 1: " in err


def test_a_failed_run_makes_the_exit_code_1(understudy):
    code, out, err = understudy("grid.yaml", "--set", "do=fail", "--output-dir", "out")
    assert code == 1
    assert err.splitlines()[-4].startswith("FAILED plain seed 0: no luck (exit code 1; out/tiny/plain/seed_0.log)")
    assert len(json.loads(out.splitlines()[-1])["failed"]) == 4


def test_a_dry_run_prints_a_script_and_runs_nothing(understudy, tmp_path):
    code, out, _ = understudy("grid.yaml", "--dry-run", "--set", "once=0")
    assert code == 0
    assert not Path("runs").exists()
    assert out.splitlines()[2] == "# better seed 0: new"
    argv = shlex.split(out.splitlines()[3])
    folder = "runs/ablations/tiny/better/seed_0"
    assert argv[4:] == ["--once=0", "--gain=0.5", "--seed=0", f"--output-dir={folder}"]
    subprocess.run(["sh", "-c", "mkdir -p runs/ablations/tiny\n" + out], check=True, capture_output=True)
    assert len(list(Path("runs").rglob("acceptance.csv"))) == 4


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"command": "bench", "runs": {"a": {"repeets": 1}}}, "a seed 0: no such option '--repeets'; did you mean"),
        (
            {"command": "bench", "runs": {"a": {"preset": "big"}}},
            "a seed 0: --preset must be one of 'pocket' (got big)",
        ),
        ({"command": "benhc"}, "grid tiny: there is no command 'understudy benhc'"),
        ({"command": "bench this"}, "grid tiny: there is no command 'understudy bench this'"),
    ],
)
def test_options_that_the_command_lacks_are_found_before_anything_runs(understudy, keys, says):
    code, _, err = understudy("grid.yaml", **keys)
    assert code == 2
    assert says in err
    assert not Path("runs").exists()


def test_switches_and_negative_numbers_reach_our_commands(understudy):
    code, _, err = understudy(
        "grid.yaml", "--dry-run", command="bench", runs={"a": {"compare": True, "ignore_eos": False}}
    )
    assert code == 0, err


def test_the_dvi_grid_passes_the_command_line(understudy):
    code, out, err = understudy("dvi", "--set", "train_data_path=x.jsonl", "--dry-run")
    assert code == 0, err
    assert out.count("understudy train dvi") == 18


@pytest.mark.slow
def test_two_modes_of_dvi_are_run_and_compared(drawing, understudy):
    small = ("--set", "num_prompts=4", "--set", "max_new_tokens=24", "--set", "dvi_batch_size=8", "--set", "threads=1")
    data = ("--set", f"train_data_path={prompts_path()}", "--only", "full,kd_only", "--output-dir", "out")
    code, out, err = understudy("dvi", *data, *small)
    assert code == 0, err
    last = json.loads(out.splitlines()[-1])
    assert (last["finished"], len(last["missing"])) == (6, 12)
    results = json.loads(Path("out/dvi/results.json").read_text())
    for metric in results["metrics"].values():
        gain = metric["runs"]["full"]["difference"]
        assert gain["seeds"] == 3
        assert gain["interval"][0] <= gain["mean"] <= gain["interval"][1]
    assert Path("out/dvi/acc@1.png").stat().st_size > 10_000
    assert "6 of 6 runs are finished already" in understudy("dvi", *data, *small)[2]
