"""Which checkpoint a path means: the folder itself, or one of a run's (`checkpoints/step_000123`, `latest`, `best`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from understudy.core.errors import UserError

_STEP = re.compile(r"step_(\d+)")
_LONGEST = 256  # bytes of a link that is a text file; any other file is longer or more than a line


def find_checkpoint(path: str | Path, prefer: Literal["best", "latest"] = "best") -> Path:
    """The checkpoint folder that `RUN`, `RUN/checkpoints`, `RUN/best`, `RUN/latest` or `RUN/checkpoints/step_N` means.

    A run means its `prefer`red checkpoint, else its latest one. UserError when there is none.
    """
    path = Path(path)
    for candidate in _candidates(path, prefer):
        if (candidate / "config.json").is_file():
            return candidate
    if not path.exists():
        raise UserError(f"no checkpoint: {path} does not exist")
    if path.is_file():
        raise UserError(f"no checkpoint: {path} is a file; give the folder that it is in")
    raise UserError(f"no checkpoint in {path}: neither config.json nor best, latest or checkpoints/step_N is there")


def _candidates(path: Path, prefer: str) -> list[Path]:
    """Where `path` may lead, the most wanted first."""
    if path.is_file():  # a link, where the file system has none
        return [follow(path)]
    path = path.resolve() if path.is_symlink() else path  # the checkpoint itself: `best` may soon mean another one
    run = path.parent if path.name == "checkpoints" else path
    newest = [*reversed(steps_of(run / "checkpoints").values()), follow(run / "latest")]
    return [path, *([follow(run / "best")] if prefer == "best" else []), *newest]


def follow(link: Path) -> Path:
    if link.is_file():
        with link.open("rb") as file:
            text = file.read(_LONGEST).decode(errors="replace").strip()
        return link.parent / text if len(text) < _LONGEST and text.isprintable() else link
    return link.resolve() if link.is_symlink() else link


def steps_of(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in a folder by step, the oldest first."""
    if not folder.is_dir():
        return {}
    found = {int(m[1]): p for p in folder.iterdir() if (m := _STEP.fullmatch(p.name)) and (p / "config.json").is_file()}
    return dict(sorted(found.items()))
