"""Streams of prompts for the learning experiments: code of the standard library, and of other installed packages.

Each prompt asks for one function by signature, place and docstring, as the built-in corpus does. Packages are dependencies of this
project, so that everybody who runs the experiment has them; their versions are in the results.

    python benchmarks/streams.py --count 200 --seed 5 --output runs/packages.jsonl     # a stream as a file, for `understudy ablate dvi`
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sysconfig
from collections.abc import Collection, Sequence
from pathlib import Path

from understudy.core.files import write_text
from understudy.data.conversations import Message
from understudy.data.prompts import render
from understudy.data.stdlib import conversations, held_out
from understudy.target.target import Target

PACKAGES = ("torch", "transformers", "sympy", "numpy")
LONGEST = 256  # tokens of a prompt


def questions(root: Path, only_held_out: bool = False) -> list[str]:
    """First questions of all conversations below `root`."""
    return [
        row["conversations"][0]["value"] for module, row in conversations(root) if not only_held_out or held_out(module)
    ]


def stdlib() -> list[str]:
    """Questions of the modules that no model or drafter here was trained on."""
    return questions(Path(sysconfig.get_paths()["stdlib"]), only_held_out=True)


def packages(names: Sequence[str] = PACKAGES) -> list[str]:
    found = []
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations is not None, name
        found += questions(Path(spec.submodule_search_locations[0]))
    return found


def stream(
    target: Target, asked: Sequence[str], count: int, seed: int, without: Collection[tuple[int, ...]] = ()
) -> list[list[int]]:
    """`count` prompts as token ids, none of `without`, drawn without replacement; the same seed gives the same stream."""
    order = list(dict.fromkeys(asked))
    random.Random(seed).shuffle(order)
    chosen: list[list[int]] = []
    for text in order:
        ids = render(target.tokenizer, [Message("user", text)])
        if len(ids) <= LONGEST and tuple(ids) not in without:
            chosen.append(ids)
        if len(chosen) == count:
            return chosen
    raise SystemExit(f"only {len(chosen)} prompts of at most {LONGEST} tokens, {count} are asked for")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="prompts")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    asked = list(dict.fromkeys(packages()))
    random.Random(arguments.seed).shuffle(asked)
    short = [text for text in asked if len(text) < 3 * LONGEST][: arguments.count]  # a token has three characters or so
    write_text(arguments.output, "".join(json.dumps({"prompt": text}) + "\n" for text in short))


if __name__ == "__main__":
    main()
