"""What finished runs of a grid say: curves, and the mean over the end of each with its interval over seeds."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from understudy.bench.grid import Grid, Metrics, text_of
from understudy.core.errors import UserError
from understudy.report.intervals import CONFIDENCE, Array, Interval, interval
from understudy.telemetry.run import read_table

Curves: TypeAlias = Mapping[str, Mapping[int, tuple[Array, Array]]]  # run -> seed -> x, y


def read_curve(folder: Path, table: Metrics, column: str) -> tuple[Array, Array]:
    """x [n] and y [n] of one run; rows where either is empty or no finite number are left out. UserError if none is left."""
    path = folder / table.file
    if not path.exists():
        raise UserError(f"no {table.file} in {folder}")
    rows = read_table(path)
    for name in (table.x, column):
        if rows and name not in rows[0]:
            raise UserError(f"{path} has no column {name}; it has {', '.join(rows[0])}")
    pairs = [(row[table.x], row[column]) for row in rows]
    numbers = [(x, y) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]
    both = np.array(numbers, dtype=np.float64).reshape(-1, 2)
    both = both[np.isfinite(both).all(axis=1)]
    if not len(both):
        raise UserError(f"{path} has no numbers in {table.x} and {column}")
    return both[:, 0], both[:, 1]


def check_tables(folder: Path, grid: Grid) -> None:
    """UserError where a run lacks what the grid compares."""
    for table in grid.metrics:
        for column in table.y:
            read_curve(folder, table, column)


def without_first(x: Array, y: Array, first: float) -> tuple[Array, Array]:
    """The curve without this first share of the range of x, in which a rolling window is not full yet."""
    kept = x >= x.min() + first * (x.max() - x.min())
    return x[kept], y[kept]


def end_mean(x: Array, y: Array, last: float) -> float:
    """Mean of y over the last share of the range of x, which holds at least the last point."""
    return float(y[x >= x.max() - last * (x.max() - x.min())].mean())


def _json(found: Interval | None) -> dict[str, Any] | None:
    if found is None:
        return None
    ends = None if found.half is None else [found.mean - found.half, found.mean + found.half]
    return {"mean": found.mean, "interval": ends, "seeds": found.n}


def summarise(ends: Mapping[str, Mapping[int, float]], baseline: str | None) -> dict[str, Any]:
    """One metric: run -> mean and interval over its seeds, its value per seed, and its difference to the baseline.

    Differences are taken seed by seed, over the seeds that both have: a seed gives both runs the same start, and what it does to both
    is no difference between them.
    """
    base = ends.get(baseline, {}) if baseline is not None else {}
    out = {}
    for name, values in ends.items():
        gains = [value - base[seed] for seed, value in values.items() if seed in base]
        out[name] = {
            "end": _json(interval(list(values.values()))),
            "by_seed": {str(seed): value for seed, value in values.items()},
            "difference": _json(interval(gains)) if name != baseline else None,
        }
    return out


def _read(found: dict[str, Any] | None) -> Interval | None:
    if found is None:
        return None
    ends = found["interval"]
    return Interval(found["mean"], None if ends is None else (ends[1] - ends[0]) / 2, found["seeds"])


def _number(found: Interval | None, sign: str = "") -> str:
    """`0.512 ± 0.013`: two digits of the interval, the mean as far. A difference that is told from 0 stands in bold. `-`: none."""
    if found is None:
        return "-"
    if not found.half:
        return f"{found.mean:{sign}.4g}"
    digits = min(max(0, 1 - math.floor(math.log10(found.half))), 6)
    text = f"{found.mean:{sign}.{digits}f} ± {found.half:.{digits}f}"
    return f"**{text}**" if sign and found.sure else text


def markdown(results: Mapping[str, Any]) -> str:
    """`table.md` of `results.json`."""
    grid, metrics = results["grid"], results["metrics"]
    baseline = grid["baseline"]
    head = ["run", "seeds"]
    for column in metrics:
        head += [column] + ([f"{column} − {baseline}"] if baseline is not None else [])
    lines = [f"# Ablation {grid['name']}", "", f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for name, seeds in results["finished"].items():
        cells = [name, str(len(seeds))]
        for metric in metrics.values():
            row = metric["runs"].get(name, {"end": None, "difference": None})
            cells.append(_number(_read(row["end"])))
            if baseline is not None:
                cells.append("(baseline)" if name == baseline else _number(_read(row["difference"]), "+"))
        lines.append(f"| {' | '.join(cells)} |")
    ends = {column: f"the last {metric['last']:.0%} of {metric['x']}" for column, metric in metrics.items()}
    said = ends.values() if len(set(ends.values())) == 1 else (f"{text} ({column})" for column, text in ends.items())
    lines += [
        "",
        f"Of each run the mean over {'; '.join(dict.fromkeys(said))}. Means over seeds ± half of the {CONFIDENCE:.0%} t interval.",
    ]
    if baseline is not None:
        lines[-1] += (
            f" Differences to {baseline} seed by seed; bold where the interval excludes 0 (not corrected for their number)."
        )
    command = grid["command"] if isinstance(grid["command"], list) else ["understudy", *shlex.split(grid["command"])]
    fixed = ", ".join(f"{key}={text_of(value)}" for key, value in grid["fixed"].items())
    lines += ["", f"- command: `{shlex.join(command)}`; fixed: {fixed or 'nothing'}"]
    lines += [f"- failed: {title}: {says}" for title, says in results["failed"].items()]
    if results["missing"]:
        lines.append(f"- not run: {', '.join(results['missing'])}")
    lines += ["", *(f"![{column}]({metric['plot']})" for column, metric in metrics.items() if metric["plot"])]
    return "\n".join(lines).rstrip() + "\n"
