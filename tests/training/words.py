"""Drafters that learn, on tiny targets that read text: what tests of `train dvi` run on."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

import tiny
from understudy import cli
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafting.spec import build
from understudy.target.target import Target
from understudy.training.rollouts.collect import Rollout, roll_out


class Words:
    """A tokenizer without a chat template: a token per word, of the first twelve."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [5 + zlib.crc32(word.encode()) % (tiny.V - 15) for word in text.split()[:12]]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def target(family: str = "llama") -> Target:
    return Target(tiny.model(family), Words(), name=family)


def drafter(on: Target, shallow_rank: int = 2, noise: float = 0.0, **options: object) -> ExitDrafter:
    """`dvi` at exit layer 3; with `noise` its LoRAs say something."""
    made = build("dvi", on, **{"exit_layer": 3, "threshold": 0.0, "steps": 3, "shallow_rank": shallow_rank, **options})
    assert isinstance(made, ExitDrafter)
    if noise:
        random = torch.Generator().manual_seed(1)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data += noise * torch.randn(parameter.shape, generator=random)
    return made


def prompts(count: int, length: int = 9) -> list[list[int]]:
    return [tiny.prompt(length + i % 3, seed=i) for i in range(count)]


def rolled(on: Target, made: ExitDrafter, count: int = 3, tokens: int = 24, greedy: bool = True) -> list[Rollout]:
    return [roll_out(on, made, p, tokens, greedy, index=i) for i, p in enumerate(prompts(count))]


def weights(made: ExitDrafter) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}


def run(capsys, monkeypatch, *args: str) -> tuple[int, str, str]:
    """`understudy train dvi ARGS` on a tiny target, whatever model is named."""
    from understudy.cli import train_dvi

    monkeypatch.setattr(train_dvi, "load", lambda config: target())
    code = cli.main(["train", "dvi", *args])
    out, err = capsys.readouterr()
    return code, out, err


def write_rows(path: Path, count: int) -> Path:
    """A file of `count` prompts and two lines that hold none."""
    lines = [f'{{"prompt": "please write function number {i} of module m{i % 7}"}}' for i in range(count)]
    path.write_text("\n".join([*lines[:2], "not json", *lines[2:], '{"turns": []}']) + "\n")
    return path
