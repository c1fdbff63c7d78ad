"""`understudy train kangaroo` on a tiny target with the built-in model's tokenizer: what tests of offline runs share."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from transformers import AutoTokenizer

import tiny
from understudy import cli
from understudy.assets import pocket_path
from understudy.cli import offline
from understudy.target.target import Target
from understudy.telemetry.run import read_table


@functools.cache
def target() -> Target:
    model = tiny.build("Qwen3ForCausalLM", "Qwen3Config", vocab_size=4096, eos_token_id=2, max_position_embeddings=256)
    return Target(model, AutoTokenizer.from_pretrained(pocket_path()), "tiny")


def write_rows(path: Path, count: int = 12) -> Path:
    """Short conversations."""
    texts = [f"def f{i}(x):\n    return x + {i}" for i in range(count)]
    path.write_text(
        "".join(
            json.dumps({"conversations": [{"from": "human", "value": f"Write f{i}."}, {"from": "gpt", "value": text}]})
            + "\n"
            for i, text in enumerate(texts)
        )
    )
    return path


BASE = (
    "--max-steps",
    "3",
    "--lr",
    "1e-2",
    "--log-interval",
    "1",
    "--device",
    "cpu",
)
SMALL = ("--eval-num-prompts", "2", "--eval-max-new-tokens", "6", "--eval-interval", "3")


def train(capsys, monkeypatch, rows: Path, *args: str, eval_data: bool = True) -> tuple[int, str, str]:
    monkeypatch.setattr(offline, "load", lambda config: target())
    held_out = ("--eval-data-path", str(rows)) if eval_data else ()
    data = () if "--features" in args else ("--train-data-path", str(rows), "--batch-size", "2")
    if not {"--features", "--overfit"} & set(args):
        data = (*data, "--max-length", "64")
    small = SMALL[2:] if "--overfit" in args else SMALL
    code = cli.main(["train", "kangaroo", *data, *held_out, *BASE, *small, *args])
    out, err = capsys.readouterr()
    return code, out, err


def run(capsys, monkeypatch, rows: Path, folder: Path, *args: str, **how: bool) -> Path:
    code, out, err = train(capsys, monkeypatch, rows, "--output-dir", str(folder), *args, **how)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["run"] == str(folder)
    return folder


def logged(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_table(folder / "metrics" / "training.csv") if row.get(key) is not None]
