"""What one of several processes measured, as a file; and all of them together.

Samples are dealt out by number, so the files of n processes hold together what one process would have counted, and files that were
measured under other settings or on another target are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from understudy.analysis.cost import Cost
from understudy.analysis.tally import Tally
from understudy.core.config import Config
from understudy.core.errors import UserError
from understudy.core.explain import show
from understudy.core.files import write_json

INFORMATION = ("model", "data_path")  # settings that are names: the same thing may be called otherwise elsewhere


class RankFile(Config):
    """One process's part."""

    version: int = 1
    rank: int
    world_size: int
    settings: dict[str, Any]  # what the figures follow from
    tally: dict[str, Any]
    cost: dict[str, Any] | None  # rank 0 times the target
    no_split: str | None  # why its layers cannot run in two parts
    environment: dict[str, Any]

    @property
    def counted(self) -> Tally:
        return Tally.from_json(self.tally)

    @property
    def times(self) -> Cost:
        assert self.cost is not None
        return Cost.from_json(self.cost)


def rank_path(folder: Path, rank: int, world_size: int) -> Path:
    return folder / f"rank-{rank}-of-{world_size}.json"


def write_rank(folder: Path, part: RankFile) -> Path:
    path = rank_path(folder, part.rank, part.world_size)
    write_json(path, part.model_dump())
    return path


def read_rank(path: Path) -> RankFile:
    """UserError if the file cannot be read or is none of ours."""
    try:
        part = RankFile.model_validate_json(path.read_text(encoding="utf-8"))
        _ = part.counted, Cost.from_json(part.cost) if part.cost is not None else None
        return part
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (pydantic.ValidationError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{path} is not what `understudy layers --rank` writes: delete it and run that rank again"
        ) from None


def read_ranks(folder: Path, world_size: int | None = None) -> list[RankFile]:
    """The files of all ranks, in order. `world_size` chooses if there are files of several.

    UserError for a missing rank, by number, and for ranks that do not belong together.
    """
    sizes = sorted({int(path.stem.rpartition("-")[2]) for path in folder.glob("rank-*-of-[0-9]*.json")})
    if world_size is None and len(sizes) > 1:
        raise UserError(
            f"{folder} holds files of --world-size {' and '.join(map(str, sizes))}: say which with --world-size,"
            " or take another folder"
        )
    if not sizes or (world_size is not None and world_size not in sizes):
        of = "" if world_size is None else f" of --world-size {world_size}"
        raise UserError(
            f"{folder} holds no rank's file{of}: run `understudy layers --rank R --world-size N` for each R first"
        )
    world = world_size or sizes[0]
    if missing := [r for r in range(world) if not rank_path(folder, r, world).exists()]:
        named = ", ".join(map(str, missing))
        raise UserError(
            f"{folder} lacks rank{'s' if len(missing) > 1 else ''} {named} of {world}: run `understudy layers --rank"
            f" {missing[0]} --world-size {world}` with the options of the others"
        )
    parts = [read_rank(rank_path(folder, r, world)) for r in range(world)]
    for part in parts[1:]:
        check_same(part.settings, parts[0].settings, f"rank {part.rank}", "rank 0")
    if parts[0].cost is None:
        raise UserError(f"{rank_path(folder, 0, world)} holds no times: run rank 0 again")
    return parts


def check_same(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], who: str, whom: str, ignored: Sequence[str] = INFORMATION
) -> None:
    """UserError that names the first setting in which two differ."""
    for name in [*theirs, *mine]:
        if name in ignored or mine.get(name) == theirs.get(name):
            continue
        if name == "fingerprint":
            raise UserError(f"{who} was measured on another target than {whom}: run it again on the same one")
        raise UserError(
            f"{who} was measured with {name.replace('_', ' ')} {show(mine.get(name))}, {whom} with {show(theirs.get(name))}:"
            " run it again with the same settings"
        )


def merged(parts: Sequence[RankFile]) -> Tally:
    """All samples of all ranks."""
    total = parts[0].counted
    for part in parts[1:]:
        total.merge(part.counted)
    return total
