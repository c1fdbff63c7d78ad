"""Grid files: which runs of one command an ablation consists of.

    name: exits
    command: train dvi             # an understudy command that writes a run folder; a list is the argv of any program
    fixed: {num_prompts: 100}      # options of every run
    required: [train_data_path]    # options that whoever starts the grid adds: --set train_data_path=FILE
    runs:                          # named variants; their options win over fixed ones
      plain: {}
      kd_only: {dvi_ce_lambda: 0}
    grid: {exit_layer: [2, 4]}     # every combination, of every variant
    seeds: [0, 1, 2]
    baseline: plain                # the differences in the table are to this run
    metrics: {file: metrics/acceptance.csv, x: step, y: [acc@1, block_acc], last: 0.1}

A run gets every option as `--option=value` (a list: once per value, null: not at all), and `--seed` and `--output-dir` besides.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import pydantic

from understudy.core.config import Config, option
from understudy.core.errors import UserError
from understudy.core.strict_yaml import read_yaml

Scalar: TypeAlias = bool | int | float | str | None
Value: TypeAlias = Scalar | list[Scalar]
OURS = ("seed", "output_dir")
WORD = r"[\w.+=@-]+"  # of names that become folders
NO_NAME = re.compile(r"[^\w.+@-]")  # of a value, in the name of its run
GRIDS = Path(str(resources.files("understudy.assets").joinpath("grids")))


def _spelled(options: Any) -> Any:
    """Option names with underscores, and each once: hyphens mean the same."""
    if not isinstance(options, Mapping):
        return options
    out: dict[str, Any] = {}
    for name, value in options.items():
        key = str(name).removeprefix("--").replace("-", "_")
        if key in OURS:
            raise ValueError(f"'{name}' is set for each run by `ablate` itself (seeds: gives the seeds)")
        if key in out:
            raise ValueError(f"'{name}' stands twice")
        out[key] = value
    return out


Options = Annotated[dict[str, Value], pydantic.BeforeValidator(_spelled)]
Axes = Annotated[
    dict[str, Annotated[list[Value], pydantic.Field(min_length=1)]],
    pydantic.BeforeValidator(_spelled),
]


class Metrics(Config):
    """A table that every run writes, and what is drawn and compared of it."""

    file: str = option(..., "CSV table in the run folder", min_length=1)
    x: str = option("step", "column of the horizontal axis", min_length=1)
    y: list[str] = option(..., "columns to draw and compare", min_length=1)
    first: float = option(0.0, "the figure leaves out this first share of the range of x", ge=0, lt=1)
    last: float = option(0.1, "end state: the mean over this last share of the range of x", gt=0, le=1)


class Grid(Config):
    """One grid file."""

    name: str = option(..., "folder of the results, beneath --output-dir", pattern=rf"^{WORD}$")
    command: str | list[str] = option(
        ..., "words of an understudy command, or the whole argv of a program", min_length=1
    )
    fixed: Options = option({}, "options of every run")
    required: list[str] = option([], "options that have to be given with --set")
    runs: dict[str, Options] = option({}, "named variants, each with its options")
    grid: Axes = option({}, "options with several values: every combination is run")
    seeds: Annotated[list[int], pydantic.Field(min_length=1)] = option([0], "seeds of every variant")
    baseline: str | None = option(None, "run to which the table gives differences")
    metrics: list[Metrics] = option(..., "tables that are drawn and compared: one, or a list", min_length=1)

    @pydantic.field_validator("metrics", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, Mapping) else value

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Grid:
        if not self.runs and not self.grid:
            raise ValueError("it names no run: give `runs` or `grid`")
        if bad := [name for name in self.runs if not re.fullmatch(WORD, name)]:
            raise ValueError(f"runs: '{bad[0]}' cannot name a folder; use letters, digits and _ . + = @ -")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one stands twice")
        for place, options in {"fixed": self.fixed, **{f"runs.{name}": run for name, run in self.runs.items()}}.items():
            if both := sorted(options.keys() & self.grid.keys()):
                raise ValueError(f"'{both[0]}' stands in grid and in {place}; one would be ignored")
        columns = [column for table in self.metrics for column in table.y]
        if len(set(columns)) < len(columns):
            raise ValueError("metrics: a column stands twice in y")
        names = [name for name, _ in self.variants()]
        if len(set(names)) < len(names):
            raise ValueError("two runs get the same name; a value stands twice in grid")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline '{self.baseline}' is no run of it; the runs are {', '.join(names)}")
        return self

    def variants(self) -> Iterator[tuple[str, dict[str, Value]]]:
        """(name, options) of every run but for its seed. Variants in order; within one, the last axis of `grid` changes fastest."""
        for name, run in (self.runs or {"": {}}).items():
            for point in itertools.product(*self.grid.values()):
                axes = dict(zip(self.grid, point, strict=True))
                words = [name] if name else []
                words += [f"{key}={NO_NAME.sub('_', text_of(value))}" for key, value in axes.items()]
                yield "+".join(words), {**self.fixed, **run, **axes}

    def with_options(self, given: Mapping[str, str]) -> Grid:
        """The grid with further fixed options; runs win over them. What every run decides for itself would be ignored: UserError."""
        try:
            added = _spelled(given)
        except ValueError as error:
            raise UserError(f"--set: {error}") from None
        for key in added:
            if key in self.grid or (self.runs and all(key in run for run in self.runs.values())):
                raise UserError(
                    f"--set {key} would be ignored: every run of grid {self.name} has its own; change the file"
                )
        if missing := [key for key in self.required if key.replace("-", "_") not in {**self.fixed, **added}]:
            raise UserError(f"grid {self.name} needs --set {missing[0]}=VALUE")
        return Grid.model_validate({**self.model_dump(), "fixed": {**self.fixed, **added}})


def text_of(value: Value) -> str:
    """A value as it is typed after `--option=`."""
    if isinstance(value, list):
        return ",".join(map(text_of, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Cell:
    """One run of a grid: one variant with one seed."""

    name: str
    seed: int
    command: tuple[str, ...]  # without its options
    options: Mapping[str, Value]

    @property
    def title(self) -> str:
        return f"{self.name} seed {self.seed}"

    def flags(self) -> list[str]:
        """The options as they are typed, `--seed` last."""
        out = []
        for key, value in {**self.options, "seed": self.seed}.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    out.append(f"--{key.replace('_', '-')}={text_of(one)}")
        return out

    def argv(self, folder: Path) -> list[str]:
        """The exact command that writes its run to `folder`."""
        return [*self.command, *self.flags(), f"--output-dir={folder}"]

    @property
    def digest(self) -> str:
        """SHA-256 of what is run. The order of options, the interpreter and the folder are no part of it."""
        words = ["python" if word == sys.executable else word for word in self.command]
        return hashlib.sha256(json.dumps([words, sorted(self.flags())]).encode()).hexdigest()


def cells(grid: Grid) -> list[Cell]:
    """Every run of a grid, a seed of all variants before the next: stopped early, it has compared all of them."""
    if isinstance(grid.command, str):
        command = (sys.executable, "-m", "understudy", *shlex.split(grid.command))
    else:
        command = tuple(grid.command)
    variants = list(grid.variants())
    return [Cell(name, seed, command, options) for seed in grid.seeds for name, options in variants]


def chosen(grid: Grid, only: list[str]) -> list[Cell]:
    """The runs named by `only`, which takes names of runs; all without one."""
    every = cells(grid)
    names = list(dict.fromkeys(cell.name for cell in every))
    for name in only:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the runs are {', '.join(names)}"
            raise UserError(f"--only {name}: grid {grid.name} has no such run; {hint}")
    return [cell for cell in every if not only or cell.name in only]


def shipped() -> list[str]:
    """Names of the grids that come with the package."""
    return sorted(path.stem for path in GRIDS.glob("*.yaml"))


def find(text: str) -> Path:
    """The file that `GRID.yaml` or the name of a shipped grid means."""
    if text in shipped():
        return GRIDS / f"{text}.yaml"
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    raise UserError(f"no grid '{text}': give a YAML file, or one that comes with the package: {', '.join(shipped())}")


def read_grid(path: Path) -> Grid:
    """A grid file. Every mistake is one UserError that names the file and the key."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(content).__name__}")
    try:
        return Grid.model_validate(content)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {'; '.join(_explain(error))}") from None


def _explain(error: pydantic.ValidationError) -> list[str]:
    """One clause per key that is wrong. A value that could be several things gives one error for each: the first counts."""
    clauses: dict[str, str] = {}
    for item in error.errors(include_url=False):
        where = [part for part in item["loc"] if isinstance(part, str)]
        fields = Metrics.model_fields if where[:1] == ["metrics"] else Grid.model_fields
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where[-1], fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the keys are {', '.join(fields)}"
            clauses.setdefault(".".join(where), f"unknown key '{'.'.join(where)}'; {hint}")
            continue
        depth = {"runs": 3, "fixed": 2, "grid": 2, "metrics": 2}.get(where[0], 1) if where else 0
        key = ".".join(where[:depth])
        if item["type"] == "missing":
            says = f"'{key}' is missing"
        elif item["type"] == "value_error":
            says = f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
        else:
            says = f"{key}: {item['msg'].replace('Input should', 'must')} (got {item['input']!r})"
        clauses.setdefault(key, says)
    return list(clauses.values())
