"""The scripts of recipes/ run as they are, here with options that make them short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.slow
def test_dflash_from_layers_to_evaluation(tmp_path):
    def run(script: str, *options: str) -> str:
        env = os.environ | {"UNDERSTUDY": f"{sys.executable} -m understudy", "RUN": str(tmp_path / "run")}
        command = ["bash", str(RECIPES / "dflash" / script), *options]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run("1_layers.sh", "--num-samples", "2", "--max-length", "128")
    assert (tmp_path / "run/layers/cosine.png").exists()
    short = ("--max-new-tokens", "24", "--max-repeat-share", "1")
    train, held_out = map(json.loads, run("2_data.sh", "--num-samples", "6", *short).splitlines())
    assert train["rows"] >= 3 and held_out["rows"] >= 3
    few = ("--max-steps", "2", "--max-length", "128", "--anchors", "16")
    trained = run("3_train.sh", *few, "--eval-num-prompts", "2", "--eval-max-new-tokens", "8")
    last = json.loads(trained.splitlines()[-1])
    assert last["step"] == 2 and last["best_tau"] >= 1
    card = json.loads((tmp_path / "run/train/best/understudy.json").read_text())
    proposed = json.loads((tmp_path / "run/layers/layers.json").read_text())["taps"][0]["taps"]
    assert card["taps"] == proposed, "the training script takes what the first script measured"
    table = run("4_evaluate.sh", "--num-prompts", "1", "--max-new-tokens", "8", "--repeats", "1")
    assert "Standard" in table and "Speedup" in table
    assert (tmp_path / "run/bench/results.json").exists()
