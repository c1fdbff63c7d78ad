"""`understudy bench` on tiny models: every mode, every field, the last line, the files it writes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import tiny
from understudy.bench import efficiency
from understudy.bench import run as running
from understudy.bench.config import BASELINES, BenchConfig
from understudy.bench.efficiency import alone
from understudy.bench.huggingface import HuggingFaceMode, _stats
from understudy.bench.modes import EngineMode
from understudy.bench.run import bench
from understudy.cli import main
from understudy.drafters.dflash.config import DFlashObjectiveConfig
from understudy.drafters.dflash.files import write_drafter
from understudy.drafters.dflash.layout import new_layout
from understudy.drafters.dflash.start import new_model
from understudy.drafting.spec import build, specs
from understudy.target.params import SamplingParams
from understudy.target.target import Target

FIELDS = {
    *("name", "tokens", "total_s", "prefill_s", "decode_s", "tokens_per_s", "speedup_vs_none", "speedup_vs_hf", "tau"),
    *("acceptance_rate", "acc_at", "accept_hist", "repeat_share", "efficiency", "breakdown", "overhead", "identical"),
    *("rejected_drafts", "divergences"),
}
PLACE = TemporaryDirectory()


def block_drafter() -> str:
    """A DFlash drafter with random weights for the tiny target, on disk: no built-in one is made for it."""
    target = tiny.target("qwen3")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DFlashObjectiveConfig(taps=[1, 3], block_size=5, mask_token_id=90)
        write_drafter(new_model(target, new_layout(target, config)), Path(PLACE.name))
    return f"dflash:{PLACE.name}"


BLOCKS = block_drafter()
DRAFTERS = ("prompt-lookup", "early-exit,exit_layer=1,threshold=0.3", BLOCKS)
PROMPTS = [tiny.prompt(length, seed) for seed, length in enumerate((9, 14, 11))]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(efficiency, "TRIES", 2)
    monkeypatch.setattr(efficiency, "STATES", 12)


@cache
def everything() -> dict[str, Any]:
    config = BenchConfig(
        drafter=list(DRAFTERS), baselines=list(BASELINES), steps=4, max_new_tokens=20, repeats=2, check=True
    )
    return bench(config, tiny.target("qwen3"), PROMPTS)[0]


def test_every_mode_has_every_field_and_the_same_output():
    rows = {row["name"]: row for row in everything()["modes"]}
    assert list(rows) == [*BASELINES, *DRAFTERS]
    for row in rows.values():
        assert set(row) >= FIELDS
        assert (row["tokens"], row["identical"], row["divergences"]) == (60, True, [])
        assert row["total_s"] == pytest.approx(row["prefill_s"] + row["decode_s"])
        assert row["tokens_per_s"] == pytest.approx(row["decode_tokens"] / row["decode_s"])
        assert row["speedup_vs_none"] == pytest.approx(row["tokens_per_s"] / rows["none"]["tokens_per_s"])
        assert row["speedup_vs_hf"] == pytest.approx(row["tokens_per_s"] / rows["hf"]["tokens_per_s"])
        accepted = sum(int(k) * n for k, n in row["accept_hist"].items())
        assert row["tau"] == pytest.approx(1 + accepted / sum(row["accept_hist"].values()), rel=0.05)
    assert everything()["check"]["passed"]
    json.dumps(everything())


def test_what_is_known_of_ours_and_not_of_transformers():
    rows = {row["name"]: row for row in everything()["modes"]}
    for name in ("null", *DRAFTERS):
        row = rows[name]
        assert sum(part["share"] for part in row["breakdown"].values()) == pytest.approx(1)
        assert row["efficiency"] > 0
        assert 0 < row["overhead"] < 1
        assert row["rejected_drafts"] > 0
    assert rows["null"]["acceptance_rate"] < 0.1
    assert rows["null"]["tau"] < 1.1
    for name in BASELINES[2:]:
        assert (rows[name]["breakdown"], rows[name]["acceptance_rate"], rows[name]["rejected_drafts"]) == (
            None,
            None,
            None,
        )
    assert rows["hf"]["tau"] == 1
    assert rows["hf-early-exit"]["tau"] > 1


def test_check_warns_when_few_drafts_were_rejected():
    assert any("null had only" in warning for warning in everything()["check"]["warnings"])


class Wrong(EngineMode):
    """The negative control: a mode that answers with another token once."""

    def turn(self, prompt, index, limit):
        turn = super().turn(prompt, index, limit)
        if index == 1 and len(turn.output) > 3:
            turn.output[3] = (turn.output[3] + 1) % tiny.V
        return turn


def test_a_mode_whose_output_differs_is_caught(monkeypatch):
    target = tiny.target("qwen3")
    wrong = Wrong("null", target, build("null", target))
    plain = EngineMode("none", target, build("none", target))
    monkeypatch.setattr(running, "line_up", lambda config, target: [plain, wrong])
    results, _ = bench(BenchConfig(max_new_tokens=6, repeats=1, check=True), target, PROMPTS)
    row = results["modes"][1]
    assert row["identical"] is False
    assert [(d["prompt"], d["position"]) for d in row["divergences"]] == [(1, 3)]
    assert not results["check"]["passed"]
    assert results["check"]["failures"][0].startswith("null: 1 outputs differ")


def test_at_a_temperature_nothing_is_called_identical():
    config = BenchConfig(
        drafter=["prompt-lookup"], baselines=["hf"], temperature=1.0, seed=5, max_new_tokens=8, repeats=1, check=True
    )
    results, turns = bench(config, tiny.target("qwen3"), PROMPTS)
    assert {row["identical"] for row in results["modes"]} == {None}
    assert results["check"] is None
    assert any("drawn" in note for note in results["notes"])
    assert results["valid"] is None  # null did not run
    again = bench(config, tiny.target("qwen3"), PROMPTS)[1]
    other = bench(config.model_copy(update={"seed": 6}), tiny.target("qwen3"), PROMPTS)[1]
    outputs = [[t.output for t in run["hf"][0] + run["prompt-lookup"][0]] for run in (turns, again, other)]
    assert outputs[0] == outputs[1] != outputs[2]


def hf(name: str = "hf", target: Target | None = None, stop: tuple[int, ...] = (), **sampling: Any) -> HuggingFaceMode:
    return HuggingFaceMode(
        name,
        target or tiny.target("qwen3"),
        SamplingParams(**sampling),
        stop,
        ["early-exit,exit_layer=3", f"{BLOCKS},any_target=true"],
        steps=4,
    )


def test_transformers_is_asked_for_the_same_law():
    prompt, params = PROMPTS[0], SamplingParams(repetition_penalty=1.6, logit_bias={7: 2.0})
    want = tiny.reference("qwen3", prompt, 12, params)
    assert want != tiny.reference("qwen3", prompt, 12)
    for name in BASELINES[2:]:
        mode = hf(name, repetition_penalty=1.6, logit_bias={7: 2.0})
        assert mode.turn(prompt, 0, 12).output == want
    assert hf(temperature=1.0, top_k=1).turn(prompt, 0, 12).output == tiny.reference("qwen3", prompt, 12)


def test_transformers_stops_where_we_do_and_its_model_is_left_as_it_was():
    prompt = PROMPTS[0]
    whole = tiny.reference("qwen3", prompt, 20)
    stop = next(token for i, token in enumerate(whole) if i > 5 and token not in whole[:i])
    model = tiny.fresh_model("qwen3")
    model.generation_config.eos_token_id = stop
    own, target = model.generation_config, Target(model)
    for name in BASELINES[2:]:
        turn = hf(name, target, (stop,)).turn(prompt, 0, 20)
        assert turn.output == whole[: whole.index(stop) + 1]
        ignoring = hf(name, target).turn(prompt, 0, 20)
        assert ignoring.output == whole
        # the first pass is prefill's, however many tokens it brought
        assert ignoring.stats.tokens + ignoring.stats.cycles >= ignoring.decoded > 0
    assert model.generation_config is own
    assert model.config.num_hidden_layers == tiny.LAYERS


def test_tokens_of_transformers_are_counted_per_pass():
    stats = _stats([3, 1, 5, 2], 10)  # the last pass brought two tokens, the second of them after the stop
    assert (stats.tokens, stats.cycles, stats.accepted) == (7, 3, 5)
    assert dict(stats.accept_hist) == {0: 1, 4: 1, 1: 1}
    assert _stats([3], 2).tokens == 0


@pytest.mark.parametrize(
    ("name", "runs"), [("null", False), ("prompt-lookup", False), ("early-exit", True), ("small-model", True)]
)
def test_whether_drafting_runs_a_model_is_seen(name, runs):
    target = tiny.target("qwen3")
    mode = EngineMode(name, target, specs()[name].tiny(target)[0])
    turns = [mode.turn(prompt, i, 12) for i, prompt in enumerate(PROMPTS)]
    parts = alone(mode, PROMPTS, turns, 12)
    assert parts.runs_model is runs
    assert parts.states >= 3
    assert min(parts.one, parts.verify) > 0
    after = [mode.turn(prompt, i, 12) for i, prompt in enumerate(PROMPTS)]
    assert [t.output for t in after] == [t.output for t in turns]


def test_every_timed_draft_does_what_the_loop_did(monkeypatch):
    """Rows that a commit leaves to the next draft are written in every try, not in the first alone."""
    target = tiny.target("qwen3")
    mode = EngineMode("dflash", target, build(BLOCKS, target))
    turns = [mode.turn(prompt, i, 12) for i, prompt in enumerate(PROMPTS)]
    waiting, propose = list[int](), efficiency._propose

    def watched(draft, sequence):
        waiting.append(sum(map(len, draft.waiting)))
        return propose(draft, sequence)

    monkeypatch.setattr(efficiency, "_propose", watched)
    parts = alone(mode, PROMPTS, turns, 12)
    assert len(waiting) == 2 * parts.states and min(waiting) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer of one word per token, as a folder, and a prompts file."""
    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(tiny.V)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    tiny.fresh_model("qwen3").save_pretrained(path)
    rows = [{"prompt": " ".join(f"w{token}" for token in prompt)} for prompt in PROMPTS]
    rows[1] = {"turns": [rows[1]["prompt"], "w5"]}
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(folder: Path, *more: str) -> list[str]:
    base = ["bench", "--model", str(folder), "--prompts", str(folder / "prompts.jsonl"), "--device", "cpu"]
    return [*base, "--max-new-tokens", "8", "--repeats", "1", *more]


def test_the_command_prints_a_table_and_one_json_line_and_writes_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--drafter", "prompt-lookup", "--num-samples", "2", "--compare", "--check", "--output-dir", str(out)]
    assert main(command(folder, *arguments, "--output", str(tmp_path / "x.json"))) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)
    assert json.loads((out / "results.json").read_text()) == json.loads((tmp_path / "x.json").read_text()) == results
    assert [row["name"] for row in results["modes"]] == ["none", "null", "hf", "prompt-lookup"]
    assert results["env"]["prompts"]["count"] == 2
    assert len(results["env"]["prompts"]["sha256"]) == 64
    assert any("later turns" in note for note in results["notes"])
    assert max(map(len, lines[: len(results["modes"]) + 1])) <= 120
    text = "\n".join(lines)
    for word in ("Standard", "Avg acceptance length", "Target verify", "Tokens/sec"):
        assert word in text
    readme = (out / "README.md").read_text()
    for word in ("- command: `", "- versions: ", "torch 2", "runtime", "## Sample tokens", "| prompt-lookup |"):
        assert word in readme


def test_verbose_prints_every_draft(folder, capsys):
    assert main(command(folder, "--drafter", "null,steps=3", "--num-prompts", "1", "--verbose")) == 0
    lines = capsys.readouterr().out.splitlines()
    drafts = [line for line in lines if line.startswith("null,steps=3 prompt 0 cycle")]
    assert len(drafts) == sum(json.loads(lines[-1])["modes"][1]["accept_hist"].values())
    assert any("0/3 accepted ['w" in line for line in lines)


def test_an_invalid_run_says_so_and_a_failed_check_is_exit_code_1(folder, capsys, monkeypatch):
    monkeypatch.setattr(running, "validity", lambda rows: (False, "null gains"))
    assert main(command(folder, "--drafter", "null,steps=2")) == 0
    out = capsys.readouterr().out
    assert "INVALID RUN: null gains" in out
    assert json.loads(out.splitlines()[-1])["valid"] is False
    monkeypatch.setattr(running, "verdict", lambda *_: {"passed": False, "failures": ["x: differs"], "warnings": []})
    assert main(command(folder, "--drafter", "null,steps=2", "--check")) == 1
    assert "CHECK FAILED: x: differs" in capsys.readouterr().out


def test_dtype_is_used(folder, capsys):
    assert main(command(folder, "--drafter", "null", "--dtype", "bfloat16", "--num-prompts", "1")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["env"]["dtype"] == "bfloat16"
    assert torch.get_default_dtype() == torch.float32
