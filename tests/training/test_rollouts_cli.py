"""`understudy train dvi` from rollouts, as a person meets it: what each option changes in what is printed and written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from training import words
from understudy import cli
from understudy.data.conversations import Skipped
from understudy.drafters.early_exit.saved import read_saved
from understudy.telemetry.run import read_events, read_table
from understudy.training.rollouts.prompts import EndlessPrompts

SMALL = (
    "--exit-layer 3 --steps 2 --rollout 2 --train-k-spec 2 --max-new-tokens 8 --eval-every 0 --eval-num-prompts 2 --spec-k-max 1"
    " --shallow-rank 2 --time-prompts 0 --spec-train-greedy"
)


@pytest.fixture
def train(capsys, monkeypatch, tmp_path):
    """`train("--steps 3 ...")` -> (what was printed, figures of the last line, run folder)."""
    rows = words.write_rows(tmp_path / "rows.jsonl", 9)
    runs: list[Path] = []

    def run(more: str = "", base: str = SMALL) -> tuple[str, dict, Path]:
        runs.append(tmp_path / f"run{len(runs)}")
        args = shlex.split(f"{base} --prompts {rows} --outdir {runs[-1]} {more}")
        code, out, err = words.run(capsys, monkeypatch, *args)
        assert code == 0, err
        return out, json.loads(out.splitlines()[-1]), runs[-1]

    return run


def refused(capsys, monkeypatch, *args: str) -> str:
    code, out, err = words.run(capsys, monkeypatch, *args)
    assert code == 2, (out, err)
    assert len(err.strip().splitlines()) == 1, err
    return err


def lora(run: Path) -> dict[str, torch.Tensor]:
    content = torch.load(run / "checkpoints" / "final.pt", weights_only=True)
    return {**content["lora"], **content.get("shallow", {})}


def test_a_run_writes_its_folder(train):
    out, figures, run = train("--time-prompts 1 --time-max-new-tokens 6 --eval-every 1")
    assert {p.name for p in run.iterdir()} == {"run.yaml", "env.json", "events.jsonl", "metrics", "checkpoints"}
    settings = yaml.safe_load((run / "run.yaml").read_text())
    assert settings["telemetry_debug"] is False and settings["telemetry_max_blocks"] == 12
    assert (settings["exit_layer"], settings["train_k_spec"], settings["shallow_rank"]) == (3, 2, 2)
    assert settings["threshold"] == 0.0, "every draft length that is asked for is drafted"
    assert settings["steps"] == 2 and settings["output_dir"] == str(run)
    assert "dvi_lr" not in settings, "options of the other way are no settings of this run"
    updates = read_table(run / "metrics" / "train.csv")
    assert [row["update"] for row in updates] == [1, 2] and all(row["positions"] > 0 for row in updates)
    assert [row["update"] for row in read_table(run / "metrics" / "eval.csv")] == [0, 1, 2]
    timing = read_table(run / "metrics" / "timing.csv")[0]
    assert timing["prompts"] == timing["same"] == 1 and timing["tokens"] == 5
    assert figures["updates"] == 2 and figures["ended"] == "steps" and figures["timing"]["speedup"] > 0
    assert "update 1: loss" in out and "timing: plain" in out
    assert [e["event"] for e in read_events(run / "events.jsonl")] == ["begin", *["evaluated"] * 3, "end"]


def test_steps_rollout_batch_and_draft_length(train):
    _, _, run = train("--steps 3 --batch-size 4")
    assert [row["positions"] for row in read_table(run / "metrics" / "train.csv")] == [4, 4, 4]
    _, one, _ = train("--rollout 1")
    _, three, _ = train("--rollout 3")
    assert three["rollout_tokens"] > 2 * one["rollout_tokens"]
    _, _, run = train("--train-k-spec 1 --steps 1 --rollout 1 --batch-size 99")
    first = read_table(run / "metrics" / "train.csv")[0]
    assert first["tau"] <= 2.0 and first["positions"] <= 7


@pytest.mark.slow
def test_options_of_training_change_what_is_learned(train):
    base = lora(train()[2])
    again = lora(train()[2])
    assert all(torch.equal(base[name], again[name]) for name in base), "one command, one result"
    for more in (
        "--lr-exit 1e-3",
        "--lr-lora 1e-3",
        "--seed 1",
        "--max-new-tokens 12",
        "--kl-beta0 3",
        "--kl-beta-min 0.9",
        "--kl-anneal-steps 1",
        "--ce-weight 1",
        "--use-policy-grad",
        "--alpha 2",
        "--shallow-alpha 2",
        "--threshold 0.9",
        "--exit-layer 2",
        "--batch-size 3",
    ):
        other = lora(train(more)[2])
        assert any(
            other[name].shape != base[name].shape or not torch.equal(other[name], base[name]) for name in base
        ), more
    drawn = lora(train("", SMALL.replace(" --spec-train-greedy", ""))[2])
    assert any(not torch.equal(drawn[name], base[name]) for name in base)
    grad = lora(train("--use-policy-grad")[2])
    for more in ("--rl-weight 4", "--pg-baseline-ema 0.1"):
        other = lora(train(f"--use-policy-grad {more}")[2])
        assert any(not torch.equal(other[name], grad[name]) for name in grad), more


def test_ranks(train):
    none, four = lora(train("--shallow-rank 0 --steps 1")[2]), lora(train("--shallow-rank 4 --rank 3 --steps 1")[2])
    assert all(name.endswith((".proj.A", ".proj.B")) for name in none)
    assert {t.shape[0] for name, t in four.items() if "lora_A" in name} == {4}
    assert [t.shape[0] for name, t in four.items() if name.endswith(".proj.A")] == [3]
    base = SMALL.replace("--shallow-rank 2", "")
    assert {t.shape[0] for name, t in lora(train("--steps 1", base)[2]).items() if "lora_A" in name} == {8}


def test_evaluations(train, tmp_path):
    out, _, run = train("--steps 4 --eval-every 2 --spec-k-max 3")
    rows = read_table(run / "metrics" / "eval.csv")
    assert [(row["update"], row["k"]) for row in rows] == [(u, k) for u in (0, 2, 4) for k in (1, 2, 3)]
    assert out.count("CTAR@K") == 3 and "eval after update" not in out
    out, quiet, _ = train("--quiet-eval --steps 1")
    assert out.count("eval after update") == 2 and "CTAR@K" not in out
    other = words.write_rows(tmp_path / "other.jsonl", 3)
    _, held_out, _ = train(f"--quiet-eval --steps 1 --eval-data-path {other}")
    assert held_out["first"] != quiet["first"]
    _, more, _ = train("--steps 1 --eval-num-prompts 3")
    assert more["first"][0]["tokens"] > quiet["first"][0]["tokens"]


def test_timing(train):
    timing = "--steps 1 --time-prompts 2 --time-max-new-tokens 5"
    _, figures, _ = train(f"{timing} --time-repeats 2")
    found = figures["timing"]
    assert (found["prompts"], found["repeats"], found["tokens"], found["greedy"]) == (2, 2, 8, False)
    assert train(f"{timing} --timing-greedy")[1]["timing"]["greedy"] is True
    assert train("--steps 1")[1]["timing"] is None


def test_telemetry_of_every_phase(train):
    more = "--time-prompts 1 --telemetry-debug 1 --telemetry-prints-budget 3 --telemetry-max-blocks 6"
    out, _, run = train(more)
    assert sum(line.startswith("telemetry ") for line in out.splitlines()) == 3
    files = sorted((run / "telemetry").iterdir())
    assert len(files) == 6 and all(file.name.startswith("run0_") for file in files)
    assert {file.name.split("_")[1] for file in files} == {"train", "eval", "timing"}
    steps = [int(file.stem[-4:]) for file in files]
    assert len(set(steps)) == 6, "blocks are counted through all phases"
    assert all("diag_extra" not in json.loads(file.read_text()) for file in files)
    assert yaml.safe_load((run / "run.yaml").read_text())["telemetry_save_dir"] == str(run / "telemetry")


def test_budgets_of_telemetry_are_never_exceeded(train):
    """What cannot be divided goes to the earlier phases; a phase may come several times."""
    out, _, run = train("--eval-every 1 --telemetry-debug --telemetry-max-blocks 3 --telemetry-prints-budget 1")
    phases = sorted(file.name.split("_")[1] for file in (run / "telemetry").iterdir())
    assert phases == ["eval", "train", "train"]
    assert [line.split()[1] for line in out.splitlines() if line.startswith("telemetry ")] == ["train"]
    assert list(train()[2].glob("telemetry")) == []


def test_telemetry_options(train, tmp_path):
    dumps = tmp_path / "dumps"
    on = f"--telemetry-debug --telemetry-save-dir {dumps} --telemetry-max-blocks 4 --telemetry-prints-budget 0"
    train(f"{on} --telemetry-dump-tensors 1 --telemetry-auto-offset 1 --use-policy-grad")
    assert len(list(dumps.glob("*.json"))) == len(list(dumps.glob("*.pt"))) == 4
    records = [json.loads(file.read_text()) for file in sorted(dumps.glob("*.json"))]
    assert all("accept_len_best" in record["diag"] for record in records)
    names = {"eta", "prefix_hist", "policy_mean_advantage", "policy_mean_kl"}
    assert all(record["diag_extra"].keys() == names for record in records)


def test_a_run_goes_on_from_another(train):
    _, _, first = train("--save-lora-every 1")
    names = {p.name for p in (first / "checkpoints").iterdir()}
    assert names == {"step_00000001.pt", "step_00000002.pt", "latest.pt", "final.pt"}
    _, figures, run = train(f"--load-lora {first} --steps 1", SMALL.replace("--shallow-rank 2", ""))
    assert figures["updates"] == 3
    assert read_saved(run / "checkpoints" / "final.pt").settings["shallow_rank"] == 2
    assert any(not torch.equal(a, lora(first)[name]) for name, a in lora(run).items())


def test_a_run_that_goes_on_reads_on_where_the_other_stopped(train):
    """Drawn rollouts, over more than a round of the file: prompts and random streams are those of a run that never stopped."""
    drawn = SMALL.replace(" --spec-train-greedy", "").replace("--steps 2", "")
    _, _, whole = train("--steps 8", drawn)
    _, _, first = train("--steps 3", drawn)
    _, _, second = train(f"--steps 5 --load-lora {first}", drawn)
    expected, found = lora(whole), lora(second)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    stands = [
        torch.load(run / "checkpoints" / "final.pt", weights_only=True)["trainer"]["prompts"] for run in (whole, second)
    ]
    assert stands[0] == stands[1] and stands[0]["given"] == 16


def test_prompts_of_another_order_begin_at_their_beginning(tmp_path):
    target, rows = words.target(), words.write_rows(tmp_path / "rows.jsonl", 9)

    def prompts(path=rows, seed=0) -> EndlessPrompts:
        return EndlessPrompts([path], target, Skipped(), seed)

    one = prompts()
    given = [next(one) for _ in range(22)]
    assert sorted(given[:9]) == sorted(given[9:18]) and given[:9] != given[9:18], "each round has an order of its own"
    for count in (0, 4, 9, 13, 20):
        begun, other = prompts(), prompts()
        for _ in range(count):
            next(begun)
        other.go_on(begun.state())
        assert [next(other), next(other)] == given[count : count + 2] and other.given == count + 2
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows.read_bytes())
    other = prompts(moved)
    other.go_on(one.state())
    assert other.given == 22 and next(other) == next(one)
    fewer = words.write_rows(tmp_path / "fewer.jsonl", 8)
    for make in (lambda: prompts(seed=1), lambda: prompts(fewer)):
        fresh, other = make(), make()
        other.go_on(one.state())
        assert other.given == 0 and [next(other) for _ in range(8)] == [next(fresh) for _ in range(8)]


def test_a_round_that_goes_on_with_bad_lines_only_is_no_empty_file(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "please write a function"}\n' + "not json\n" * 5)
    one = EndlessPrompts([rows], words.target(), Skipped())
    text = next(one)
    other = EndlessPrompts([rows], words.target(), Skipped())
    other.go_on(one.state())
    assert [next(other) for _ in range(3)] == [text] * 3 and other.given == 4


def test_checkpoints_where_they_are_wanted(train, tmp_path):
    _, figures, run = train(f"--save-lora-path {tmp_path / 'kept'}")
    assert Path(figures["checkpoint"]) == tmp_path / "kept" / "final.pt" and not (run / "checkpoints").exists()


def test_trackers_get_the_figures(train):
    pytest.importorskip("tensorboard")
    _, _, run = train("--report-to tensorboard --steps 1")
    assert list(run.rglob("events.out.tfevents*"))


def test_a_signal_ends_the_run_well(train, monkeypatch):
    from understudy.training import stops

    monkeypatch.setattr(stops.StopRequest, "reason", property(lambda self: "SIGTERM"))
    out, figures, run = train("--steps 50 --time-prompts 1")
    assert figures["updates"] == 1 and figures["ended"] == "SIGTERM" and figures["timing"] is None
    assert (run / "checkpoints" / "final.pt").exists() and "stopped after update 1" in out
    events = [e["event"] for e in read_events(run / "events.jsonl")]
    assert events == ["begin", "evaluated", "end"], "whoever is asked to stop does not begin an evaluation"
    assert figures["last"] == figures["first"]


def test_a_signal_in_the_last_evaluation_ends_the_run_before_it_is_timed(train, monkeypatch):
    from understudy.training import stops

    answers = iter([None] * 2)
    monkeypatch.setattr(stops.StopRequest, "reason", property(lambda self: next(answers, "SIGTERM")))
    _, figures, _ = train("--steps 2 --time-prompts 1")
    assert (figures["updates"], figures["ended"], figures["timing"]) == (2, "SIGTERM", None)


def test_what_was_learned_is_saved_before_it_is_evaluated(train, monkeypatch, tmp_path):
    from understudy.training.rollouts import run as module

    real, saved = module.evaluate, []

    def evaluate(*args):
        saved.append(bool(list(tmp_path.glob("run*/checkpoints/final.pt"))))
        return real(*args)

    monkeypatch.setattr(module, "evaluate", evaluate)
    train()
    assert saved == [False, True]


def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path):
    rows = words.write_rows(tmp_path / "rows.jsonl", 3)

    def says(text: str) -> str:
        return refused(capsys, monkeypatch, *shlex.split(text), "--outdir", str(tmp_path / "run"))

    assert "--kl-beta-min 2 is above --kl-beta0 1" in says("--kl-beta-min 2")
    assert "--dvi-lr belongs to streaming a file" in says("--dvi-lr 1e-3")
    assert "--num-prompts belongs to streaming a file" in says("--num-prompts 3")
    assert "--rl-weight goes with --use-policy-grad" in says("--rl-weight 3")
    assert "--pg-baseline-ema goes with --use-policy-grad" in says("--pg-baseline-ema 0.5")
    assert "no such option '--eval-prompts'" in says("--eval-prompts 2")
    assert "--rollout must be at least 1" in says("--rollout 0")
    assert "no drafter here has it" in says("--drafter none --exit-layer 2")
    assert "needs a drafter whose head learns" in says("--drafter early-exit --exit-layer 2")
    assert "leaves nothing to verify with" in says("--exit-layer 9")
    assert "holds no checkpoint" in says(f"--load-lora {tmp_path}")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("[]\n")
    assert "holds no prompt" in says(f"--eval-data-path {empty} --prompts {rows}")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    assert "is not empty and holds no run" in refused(capsys, monkeypatch, "--outdir", str(tmp_path / "used"))
    line = refused(capsys, monkeypatch, *shlex.split(SMALL), "--prompts", str(empty), "--outdir", str(tmp_path / "r"))
    assert "holds no prompt" in line


COMMAND = """
  --model-id pocket \
  --early-layer 4 \
  --steps 60 --rollout 2 --batch-size 64 \
  --lr-exit 5e-4 --lr-lora 5e-5 \
  --train-k-spec 2 --spec-train-greedy \
  --outdir runs/k2_telemetry \
  --eval-every 30 \
  --spec-k-max 2 \
  --time-prompts 16 --time-max-new-tokens 64 --time-repeats 1 \
  --timing-greedy --quiet-eval \
  --telemetry-debug 1 \
  --telemetry-prints-budget 6 \
  --telemetry-dump-tensors 0 \
  --telemetry-max-blocks 12 \
  --telemetry-save-dir runs/k2_telemetry/align_dumps \
  --telemetry-auto-offset 0
"""


@pytest.mark.slow
def test_the_documents_command_runs_as_written(capsys, tmp_path):
    """On the built-in model and corpus, with fewer updates and fewer prompts to look at."""
    text = COMMAND.replace("runs/", f"{tmp_path}/runs/") + " --eval-num-prompts 2"
    text = text.replace("--steps 60", "--steps 3").replace("--time-prompts 16", "--time-prompts 2")
    assert cli.main(["train", "dvi", *shlex.split(text)]) == 0
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    run = tmp_path / "runs" / "k2_telemetry"
    files = list((run / "align_dumps").glob("k2_telemetry_*_step*.json"))
    assert len(files) == 12 and figures["updates"] == 3
    assert not any("accept_len_best" in json.loads(file.read_text())["diag"] for file in files)
    assert sum(line.startswith("telemetry ") for line in out.splitlines()) == 6
    assert out.count("eval after update") == 2
