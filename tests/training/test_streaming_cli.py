"""`understudy train dvi --train-data-path FILE`, as a person meets it: what each option changes in what is printed and written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from training import words
from understudy.telemetry.run import read_events, read_table

SMALL = (
    "--exit-layer 3 --train-k-spec 2 --threshold 0 --max-new-tokens 10 --time-prompts 0 --dvi-batch-size 4"
    " --dvi-update-every 2 --max-online-train-ms 0 --dvi-lr 1e-2"
)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run("--num-prompts 3 ...")` -> (what was printed, figures of the last line, run folder)."""
    rows = words.write_rows(tmp_path / "rows.jsonl", 12)
    runs: list[Path] = []

    def go(more: str = "", base: str = SMALL) -> tuple[str, dict, Path]:
        runs.append(tmp_path / f"run{len(runs)}")
        args = shlex.split(f"{base} --train-data-path {rows} --outdir {runs[-1]} {more}")
        code, out, err = words.run(capsys, monkeypatch, *args)
        assert code == 0, err
        return out, json.loads(out.splitlines()[-1]), runs[-1]

    return go


def saved(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "final.pt", weights_only=True)


def test_a_file_is_streamed_through_the_learner(run):
    out, figures, folder = run("--summary-every 20")
    assert {p.name for p in folder.iterdir()} == {"run.yaml", "env.json", "events.jsonl", "metrics", "checkpoints"}
    assert (figures["prompts"], figures["skipped"], figures["ended"]) == (12, 2, "file")
    assert "rows.jsonl:3: not JSON" in out
    blocks = read_table(folder / "metrics" / "acceptance.csv")
    assert len(blocks) == len(read_table(folder / "metrics" / "speed.csv")) == figures["blocks"]
    assert list(blocks[0]) == ["step", "acc@1", "acc@2", "block_acc"]
    updates = read_table(folder / "metrics" / "updates.csv")
    assert len(updates) == figures["learner"]["due"] == figures["learner"]["ran"] > 5
    assert out.count("step 20:") == 1 and 0 < figures["share_learning"] < 1
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    assert settings["dvi_online"] is True and settings["dvi_lr"] == 1e-2 and settings["train_k_spec"] == 2
    assert "lr_exit" not in settings and "rollout" not in settings
    assert saved(folder)["schedule"]["step"] == figures["blocks"]


def test_how_much_of_the_file(run):
    _, whole, _ = run()
    _, few, _ = run("--num-prompts 4")
    _, rest, _ = run("--num-prompts 8 --skip-prompts 4")
    assert (few["prompts"], rest["prompts"]) == (4, 8)
    assert (few["ended"], rest["ended"], run("--num-prompts 13")[1]["ended"]) == ("num_prompts", "num_prompts", "file")
    assert few["tokens"] + rest["tokens"] == whole["tokens"]


def test_a_stream_goes_on_with_all_of_the_learners_state(run):
    _, _, first = run("--num-prompts 4")
    _, _, second = run(f"--load-lora {first} --num-prompts 1 --skip-prompts 4")
    one, two = saved(first), saved(second)
    assert two["schedule"]["step"] > one["schedule"]["step"]
    steps = [next(iter(content["optimizer"]["state"].values()))["step"] for content in (one, two)]
    assert steps[1] > steps[0] > 0


def test_options_of_the_learner_reach_it(run):
    base = saved(run("--num-prompts 4")[2])
    for more in (
        "--dvi-lr 1e-3",
        "--dvi-tau 3",
        "--dvi-ce-lambda 2",
        "--dvi-kd-lambda0 2",
        "--dvi-update-every 3",
        "--dvi-batch-size 3",
        "--dvi-topk 5",
        "--seed 1",
        "--max-new-tokens 12",
        "--train-k-spec 3",
        "--threshold 0.9",
        "--alpha 2",
    ):
        other = saved(run(f"--num-prompts 4 {more}", drop(SMALL, more))[2])
        differs = [not torch.equal(value, base["lora"][name]) for name, value in other["lora"].items()]
        assert any(differs), more
    _, figures, folder = run("--num-prompts 4 --save-lora-every 2 --rank 3")
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert {"latest.pt", "final.pt"} < names and len(names) == 2 + figures["learner"]["ran"] // 2
    assert {value.shape[0] for name, value in saved(folder)["lora"].items() if name.endswith(".A")} == {3}


def test_drafting_stops_as_it_does_elsewhere_unless_told(run):
    _, _, folder = run("--num-prompts 1", drop(SMALL, "--threshold 0"))
    assert yaml.safe_load((folder / "run.yaml").read_text())["threshold"] == 0.6


def drop(base: str, more: str) -> str:
    """`base` without the option that `more` gives another value."""
    words_ = base.split()
    flag = more.split()[0]
    if flag in words_:
        at = words_.index(flag)
        del words_[at : at + 2]
    return " ".join(words_)


def test_a_stream_that_does_not_learn_is_for_comparison(run):
    _, figures, folder = run("--dvi-online false --num-prompts 3")
    assert figures["learner"] is None and figures["share_learning"] == 0
    assert read_table(folder / "metrics" / "updates.csv") == [] and not (folder / "checkpoints").exists()


def test_plain_decoding_is_measured_for_the_speedup(run):
    _, figures, folder = run(
        "--num-prompts 2 --time-prompts 1 --time-max-new-tokens 4", drop(SMALL, "--time-prompts 0")
    )
    assert figures["plain_ms_per_token"] > 0
    assert all(row["speedup"] > 0 for row in read_table(folder / "metrics" / "speed.csv"))
    _, figures, folder = run("--num-prompts 2")
    assert figures["plain_ms_per_token"] is None
    assert all(row["speedup"] is None for row in read_table(folder / "metrics" / "speed.csv"))


def test_telemetry_of_a_stream(run):
    more = "--num-prompts 6 --telemetry-debug 1 --telemetry-max-blocks 25 --telemetry-prints-budget 1"
    out, _, folder = run(more)
    records = [json.loads(p.read_text()) for p in sorted((folder / "telemetry").iterdir())]
    assert len(records) == 25 and {r["phase"] for r in records} == {"train"}
    assert out.count("telemetry train step") == 1
    assert "policy_mean_kl" in records[-1]["diag_extra"], "policy gradient is on by default"
    _, _, folder = run(f"{more} --dvi-pg-lambda-max 0")
    assert all("diag_extra" not in json.loads(p.read_text()) for p in (folder / "telemetry").iterdir())


def test_a_signal_ends_the_stream_well(run, monkeypatch):
    from understudy.training import stops

    answers = iter([None] * 3)
    monkeypatch.setattr(stops.StopRequest, "reason", property(lambda self: next(answers, "SIGTERM")))
    _, figures, folder = run()
    assert (figures["prompts"], figures["ended"]) == (3, "SIGTERM") and saved(folder)["lora"]


def test_a_signal_before_the_first_prompt_ends_the_stream_well(run, monkeypatch):
    from understudy.training import stops

    monkeypatch.setattr(stops.StopRequest, "reason", property(lambda self: "SIGTERM"))
    _, figures, folder = run()
    assert (figures["prompts"], figures["tokens"], figures["ended"]) == (0, 0, "SIGTERM")
    assert read_events(folder / "events.jsonl")[-1]["event"] == "end"


@pytest.mark.parametrize("flag", ["stream", "data", "data-path", "train-data"])
def test_other_names_of_the_file(flag, capsys, monkeypatch, tmp_path):
    rows = words.write_rows(tmp_path / "rows.jsonl", 3)
    code, out, err = words.run(
        capsys, monkeypatch, *shlex.split(f"{SMALL} --{flag} {rows} --outdir {tmp_path / 'run'}")
    )
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["prompts"] == 3


def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path):
    rows = words.write_rows(tmp_path / "rows.jsonl", 3)

    def says(text: str) -> str:
        args = [*shlex.split(text), "--outdir", str(tmp_path / "run")]
        code, out, err = words.run(capsys, monkeypatch, *args)
        assert code == 2 and len(err.strip().splitlines()) == 1, (out, err)
        return err

    assert "there is no such file" in says("--train-data-path nowhere.jsonl")
    assert "--steps (here the number of updates) belongs to training from rollouts" in says(
        f"--stream {rows} --steps 6"
    )
    assert "--lr-exit belongs to training from rollouts" in says(f"--stream {rows} --lr-exit 1")
    assert "--shallow-rank belongs to training from rollouts" in says(f"--stream {rows} --shallow-rank 2")
    assert "there is no prompt to decode" in says(f"--stream {rows} --skip-prompts 99 --time-prompts 0")


@pytest.mark.slow
def test_a_file_on_the_built_in_model(capsys, tmp_path):
    from understudy import cli

    rows = tmp_path / "chat.jsonl"
    turns = [{"from": "human", "value": "Write `def add(a, b)` in module `operator`."}, {"from": "gpt", "value": "no"}]
    rows.write_text((json.dumps({"conversations": turns}) + "\n") * 6)
    args = f"--train-data-path {rows} --exitlayer 4 --max-new-tokens 32 --outdir {tmp_path / 'run'}"
    assert cli.main(["train", "dvi", *args.split()]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["prompts"] == 6 and figures["learner"]["ran"] > 0
