"""Every command that docs/sources.md says works is run as written, with only the model and the paths replaced."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from understudy import cli

PAGE = Path(__file__).parents[1] / "docs" / "sources.md"
COMMAND = re.compile(r"`understudy ([^`]+)`")


def working_commands() -> list[str]:
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    found = []
    for row in rows:
        if len(row) >= 5 and row[3].strip() == "works" and (match := COMMAND.search(row[2])):
            found.append(match[1])
    return found


def test_the_page_names_working_commands():
    assert len(working_commands()) >= 3


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """What the page leaves open: a model, a file of conversations, a folder of regenerated ones, checkpoints of a head and a drafter."""
    from understudy.assets import pocket_path
    from understudy.drafters.dflash.config import DFlashObjectiveConfig
    from understudy.drafters.dflash.files import write_drafter
    from understudy.drafters.dflash.layout import new_layout
    from understudy.drafters.dflash.start import new_model
    from understudy.drafting.spec import build
    from understudy.target.loading import load_target
    from understudy.training.online import OnlineLearner

    folder = tmp_path_factory.mktemp("sources")
    rows = folder / "rows.jsonl"
    rows.write_text('{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}\n' * 4)
    target = load_target(pocket_path())
    OnlineLearner(build(f"dvi,dvi_online=true,save_lora_path={folder}", target)).close()
    write_drafter(new_model(target, new_layout(target, DFlashObjectiveConfig())), folder / "drafter")
    data = folder / "data"
    regenerate = ["data", "regenerate", "--data-path", str(rows), "--max-new-tokens", "8", "--output-dir", str(data)]
    assert cli.main([*regenerate, "--max-repeat-share", "1"]) == 0
    found = {"M": "pocket", "FILE": rows, "LORA": folder / "final.pt", "DIR": data, "DRAFTER": folder / "drafter"}
    return {name: str(place) for name, place in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("command", working_commands())
def test_a_mapped_command_runs(command, places, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = re.sub(r"\b(M|FILE|LORA|DIR|DRAFTER)\b", lambda found: places[found[0]], command)
    args = shlex.split(command.replace("runs/", f"{tmp_path}/runs/"))
    if args[0] == "bench" and "--num-samples" not in args:
        args += ["--num-prompts", "2"]  # how many prompts is left open by the documents
    if args[0] == "bench":
        args += ["--repeats", "1"]  # and so is how often
    if args[0] == "train" and args[1] in ("eagle3", "dflash"):
        args += ["--max-steps", "2"]  # four rows, ten times over, show no more
    assert cli.main(args) == 0, capsys.readouterr().err
