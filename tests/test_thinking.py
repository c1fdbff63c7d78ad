"""The thinking mode, from what the target wrote to what is decoded: prompts, captured features, cards, warnings."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tiny
import understudy
from understudy import cli
from understudy.assets import pocket_path
from understudy.bench import run as running
from understudy.bench.config import BenchConfig
from understudy.cli import data_capture
from understudy.cli import generate as generating
from understudy.core.errors import UserError
from understudy.core.hashes import template_hash, tokenizer_hash
from understudy.data.prompts import thinking_variables
from understudy.drafters.dflash.config import DFlashObjectiveConfig
from understudy.drafters.dflash.files import write_drafter
from understudy.drafters.dflash.layout import new_layout
from understudy.drafters.dflash.start import new_model
from understudy.drafting.spec import specs
from understudy.features.store import read_manifest
from understudy.target.fingerprint import fingerprint
from understudy.target.target import Target
from understudy.training.datasets import OfflineOptions, ShardData
from understudy.training.distributed import Ranks
from understudy.training.offline import _card

THINK, QUICK = 90, 91  # what the template ends a prompt with
SWITCH = "{% if enable_thinking is defined %}{{ ' w90' if enable_thinking else ' w91' }}{% endif %}"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} w7 {% endfor %}"
ENDS = [("on", [THINK]), ("off", [QUICK]), ("default", [])]
PROMPT = [11, 12, 13, 14]
TEXT = " ".join(f"w{token}" for token in PROMPT)
WARNED = "it was trained on answers with thinking off, and prompts are rendered with thinking"


def tokenizer(template: str | None) -> Any:
    """One word per token; the chat template puts token 7 behind every message."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(tiny.V)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    made.chat_template = template
    return made


def target(template: str | None = TEMPLATE + SWITCH) -> Target:
    return Target(tiny.model("qwen3"), tokenizer(template), "tiny")


@cache
def random_drafter() -> Any:
    """A DFlash model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DFlashObjectiveConfig(taps=[1, 3], block_size=4, mask_token_id=89)
        return new_model(tiny.target("qwen3"), new_layout(tiny.target("qwen3"), config))


def drafter(folder: Path, thinking: str = "off") -> str:
    """A drafter on disk whose card names a thinking mode."""
    write_drafter(random_drafter(), folder)
    text = {
        "tokenizer": tokenizer_hash(target().tokenizer),
        "chat_template": template_hash(target().tokenizer),
        "thinking": thinking,
    }
    card = {"drafter": "dflash", "target": {"fingerprint": fingerprint(target())}, "text": text}
    (folder / "understudy.json").write_text(json.dumps(card))
    return f"dflash:{folder}"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": TEXT}) + "\n")
    return path


@pytest.fixture
def model(monkeypatch) -> Target:
    """What `understudy generate` loads."""
    made = target()
    monkeypatch.setattr(generating, "load", lambda config: made)
    return made


@pytest.mark.parametrize(("thinking", "end"), ENDS)
def test_bench_renders_prompts_in_the_mode(prompts, monkeypatch, thinking, end):
    given: list[list[int]] = []

    def measured(config: Any, on: Any, ids: list[list[int]], **defaults: Any) -> Any:
        given.extend(ids)
        raise KeyboardInterrupt  # the measuring itself is tested elsewhere

    monkeypatch.setattr(running, "bench", measured)
    with pytest.raises(KeyboardInterrupt):
        running.run(BenchConfig(prompts=prompts, thinking=thinking), target())
    assert given == [[*PROMPT, 7, *end]]


@pytest.mark.parametrize(("thinking", "end"), ENDS)
def test_generate_renders_prompts_in_the_mode(model, monkeypatch, capsys, thinking, end):
    seen = prefilled(monkeypatch)
    args = ["generate", "--drafter", "none", "--max-new-tokens", "2", "--thinking", thinking]
    assert cli.main([*args, "--prompt", TEXT]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXT}\n"))
    assert cli.main([*args, "--interactive"]) == 0
    assert seen == [[*PROMPT, 7, *end]] * 2
    capsys.readouterr()


def prefilled(monkeypatch) -> list[list[int]]:
    from understudy.decoding.sequence import DecodeSequence

    seen: list[list[int]] = []
    plain = DecodeSequence.prefill
    monkeypatch.setattr(DecodeSequence, "prefill", lambda self, ids: (seen.append(list(ids)), plain(self, ids))[1])
    return seen


@pytest.mark.parametrize(("thinking", "end"), [*ENDS, (None, [])])
def test_the_library_renders_prompts_in_the_mode(thinking, end):
    engine = understudy.load(tiny.model("qwen3"), "none", tokenizer=target().tokenizer, thinking=thinking)
    assert engine.ids(TEXT) == [*PROMPT, 7, *end]
    assert understudy.load(engine.target, "null").ids(TEXT) == [*PROMPT, 7, *end], "the target keeps it"


def test_modes_that_cannot_be_are_refused(prompts, model, capsys):
    for template in (TEMPLATE, None):
        with pytest.raises(UserError, match="--thinking off: the model's chat template has no enable_thinking"):
            running.run(BenchConfig(prompts=prompts, thinking="off"), target(template))
        with pytest.raises(UserError, match="has no enable_thinking"):
            understudy.load(tiny.model("qwen3"), "none", tokenizer=tokenizer(template), thinking="off")
    with pytest.raises(UserError, match="thinking is on, off or default"):
        understudy.load(tiny.model("qwen3"), "none", tokenizer=target().tokenizer, thinking="maybe")
    with pytest.raises(UserError, match="a loaded target stays as it is: thinking goes with"):
        understudy.load(target(), "none", thinking="off")
    assert thinking_variables(None, "default") == {}
    args = ["generate", "--drafter", "none", "--prompt", TEXT, "--thinking", "off"]
    assert cli.main([*args, "--raw"]) == 2 and "--raw leaves the chat template out" in capsys.readouterr().err
    model.tokenizer.chat_template = TEMPLATE
    assert cli.main(args) == 2
    assert "has no enable_thinking" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trained", "thinking", "warned"),
    [("off", "off", False), ("off", "on", True), ("off", "default", True), ("template default", "on", False)],
)
def test_a_drafter_of_another_mode_is_warned_of(tmp_path, model, capsys, trained, thinking, warned):
    text = drafter(tmp_path / "drafter", trained)
    args = ("--prompt", TEXT, "--max-new-tokens", "3", "--thinking", thinking)
    assert cli.main(["generate", "--drafter", text, *args]) == 0
    err = capsys.readouterr().err
    assert [WARNED in line for line in err.splitlines() if line.startswith("warning")] == [True] * warned
    understudy.load(tiny.model("qwen3"), text, tokenizer=target().tokenizer, thinking=thinking)
    assert (f"{WARNED} {thinking}" in capsys.readouterr().err) == warned
    understudy.load(target(), text)  # nobody said how prompts are rendered: by the template's default
    assert (f"{WARNED} default" in capsys.readouterr().err) == (trained == "off")


def test_raw_text_is_of_no_mode(tmp_path, model, capsys):
    args = ("--prompt", TEXT, "--max-new-tokens", "3", "--raw")
    assert cli.main(["generate", "--drafter", drafter(tmp_path / "drafter"), *args]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("thinking", "warned"), [("off", 0), ("default", 1)])
def test_bench_warns_of_a_drafter_of_another_mode(tmp_path, prompts, capsys, thinking, warned):
    config = BenchConfig(
        prompts=prompts,
        drafter=[drafter(tmp_path / "drafter")],
        baselines=[],
        repeats=1,
        max_new_tokens=6,
        thinking=thinking,
    )
    results, _ = running.run(config, target())
    assert results["env"]["settings"]["thinking"] == thinking
    assert capsys.readouterr().err.count(WARNED) == warned


def writer() -> Target:
    """A target with the built-in tokenizer, whose template has answers in it, and the switch."""
    made = AutoTokenizer.from_pretrained(pocket_path())
    ending = "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
    assert ending in made.chat_template
    made.chat_template = made.chat_template.replace(ending, ending + SWITCH)
    return Target(tiny.model("qwen3"), made, "tiny")


def captured(tmp_path: Path, monkeypatch, on: Target, *modes: str) -> Path:
    """Features of rows as `understudy data regenerate` writes them, in these modes."""
    row: dict[str, Any] = {"input_ids": list(range(8, 28)), "loss_mask": [0] * 10 + [1] * 10}
    made = [{"target": fingerprint(on), "thinking": mode} for mode in modes]
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "stored"
    rows.write_text("".join(json.dumps(row | {"made": said}) + "\n" for said in made))
    monkeypatch.setattr(data_capture, "load", lambda config: on)
    args = ("--data", rows, "--output", folder, "--max-length", 32, "--batch-size", 1)
    assert cli.main(["data", "capture", *map(str, args)]) == 0
    return folder


@pytest.mark.parametrize(("thinking", "end"), [("on", " w90"), ("off", " w91"), ("default", "")])
def test_captured_features_keep_the_mode_of_their_data(tmp_path, prompts, monkeypatch, thinking, end):
    """`data regenerate` -> `data capture` -> `train --features`: prompts that are measured, and the card."""
    on = writer()
    folder = captured(tmp_path, monkeypatch, on, thinking, thinking)
    assert read_manifest(folder).thinking == thinking
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    assert ("thinking" in settings) == (thinking != "default"), "older folders go on: they name none"
    config = OfflineOptions(features=folder, eval_prompts=prompts, output_dir=tmp_path / "run")
    data = ShardData(config, on, Ranks(config, "cpu"))
    assert on.tokenizer.decode(data.prompts()[0]).endswith(f"<|assistant|>\n{end}")
    objective: Any = type("Objective", (), {"needs": data.stored.needs, "servable": lambda self: {}})()
    said = _card(specs()["dflash"], on, objective, data.thinking)["text"]["thinking"]
    assert said == ("template default" if thinking == "default" else thinking)


def test_captured_features_of_several_modes_name_none(tmp_path, monkeypatch):
    assert read_manifest(captured(tmp_path, monkeypatch, writer(), "on", "off")).thinking == "default"
