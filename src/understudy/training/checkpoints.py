"""Checkpoints on disk: whole or not there, whenever the process dies.

    RUN/checkpoints/step_000123/config.json, model.safetensors   what engines load: the objective writes it
                                understudy.json                  what formats cannot say: step, measured accept length, provenance
                                trainer_state/                   what only training needs: fp32 masters, optimizer, RNG, position
    RUN/latest, RUN/best                                         relative links (a text file where links do not work)

A checkpoint is written into a hidden folder beside its place and renamed. What is left of a killed save is never looked at, and
goes with the next save.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.core.checkpoints import follow, steps_of
from understudy.core.errors import UserError
from understudy.core.files import write_json, write_text

if TYPE_CHECKING:  # finding a checkpoint needs no torch
    from torch import Tensor, nn

STATE = "trainer_state"


class Checkpoints:
    """The checkpoints of one run. Only rank 0 has one. `keep` = how many of the newest stay; the best one stays beside them."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep
        self.folder = run / "checkpoints"

    def claim(self) -> None:
        """UserError if a run already saved here: a new one would mix with it."""
        if steps_of(self.folder):
            raise UserError(
                f"{self.run} holds a run: give --resume to continue it, or another --output-dir to start a new one"
            )

    def place(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """`write(folder)` fills the checkpoint of `step`; then it is there, and `latest` points to it."""
        place = self.place(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step_*"):
                shutil.rmtree(left)
            temporary = self.folder / f".{place.name}.new"
            temporary.mkdir()
            write(temporary)
            _sync(temporary)
            os.replace(temporary, place)
            self.point("latest", place)
            self._prune()
        except OSError as error:
            raise UserError(
                f"cannot write the checkpoint {place}: {error.strerror or error}; free space and --resume"
            ) from None
        return place

    def point(self, name: str, place: Path) -> None:
        """Let `RUN/NAME` mean a checkpoint. Readers see the old one or the new one."""
        link, to = self.run / name, os.path.relpath(place, self.run)
        temporary = self.run / f".{name}.new"
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(to, target_is_directory=True)
            os.replace(temporary, link)
        except OSError:
            write_text(link, to + "\n")

    def _prune(self) -> None:
        best = follow(self.run / "best")
        for place in list(steps_of(self.folder).values())[: -self.keep]:
            if place.resolve() != best.resolve():
                shutil.rmtree(place)


def _sync(folder: Path) -> None:
    """Have everything on the disk before the rename: a machine that loses power may otherwise keep the rename only."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(slots=True)
class TrainerState:
    """What exact resume needs beside the data."""

    masters: dict[str, Tensor]  # trained parameters in fp32 and persistent buffers, by their name in the objective
    optimizer: dict[str, Tensor]  # `PARAMETER:KEY`
    rng: list[dict[str, Any]]  # per rank, `training.rng.rng_state`
    loop: dict[str, Any]  # plain values


def write_state(folder: Path, state: TrainerState) -> None:
    """Write `trainer_state/` into a checkpoint folder."""
    import torch
    from safetensors.torch import save_file

    place = folder / STATE
    place.mkdir()
    save_file(state.masters, place / "master.safetensors")
    save_file(state.optimizer, place / "optimizer.safetensors")
    torch.save(state.rng, place / "rng.pt")
    write_loop(folder, state)


def write_loop(folder: Path, state: TrainerState) -> None:
    """The plain values of the state alone, over those that are there."""
    write_json(folder / STATE / "loop.json", state.loop)


def read_state(checkpoint: Path) -> TrainerState:
    """What `write_state` wrote. UserError if it is not there or not whole."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = checkpoint / STATE
    if not place.is_dir():
        raise UserError(f"{checkpoint} has no {STATE}/: training can start from its weights, but not continue")
    try:
        return TrainerState(
            masters=load_file(place / "master.safetensors"),
            optimizer=load_file(place / "optimizer.safetensors"),
            rng=torch.load(place / "rng.pt", weights_only=True),
            loop=json.loads((place / "loop.json").read_text(encoding="utf-8")),
        )
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"cannot read {place}: {str(error).partition(chr(10))[0]}; continue from another checkpoint"
        ) from None


def masters_of(objective: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU of trained parameters and persistent buffers. A collective under FSDP."""
    from understudy.training.optimizer import whole

    every = dict(objective.named_parameters(remove_duplicate=False))
    buffers = {name: x for name, x in objective.state_dict().items() if name not in every}
    return {name: whole(x) for name, x in [*params.items(), *buffers.items()]}


def load_masters(objective: nn.Module, masters: Mapping[str, Tensor], source: Path) -> None:
    """Put weights of `masters_of` into an objective that is not wrapped yet. UserError unless names and shapes agree."""
    import torch

    every = dict(objective.named_parameters(remove_duplicate=False))
    wanted: dict[str, Tensor] = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    wanted |= {name: x for name, x in objective.state_dict().items() if name not in every}
    if differing := sorted(wanted.keys() ^ masters.keys()):
        raise UserError(
            f"{source} trains other weights than this run: {', '.join(differing[:3])} is in only one of them"
        )
    for name, x in wanted.items():
        if x.shape != masters[name].shape:
            raise UserError(f"{source}: {name} is {list(masters[name].shape)} there and {list(x.shape)} in this run")
    with torch.no_grad():
        for name, x in wanted.items():
            x.copy_(masters[name])
