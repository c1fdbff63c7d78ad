"""Figures for people, as PNG files: curves over repeats, series with bands and marks, bars, heat maps.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; series are labelled where they end, so that no legend has to
be matched. Nothing is drawn on a screen, and a figure replaces its file atomically.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from understudy.core.errors import UserError
from understudy.core.files import replacing
from understudy.report.intervals import CONFIDENCE, Array, Curve, Interval, band

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)))  # the next colours again come dashed, then dotted
INK, FAINT = "#333333", "#DDDDDD"
SIZE, DPI = (8.0, 4.5), 150  # inches, dots per inch
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
}


class Series(NamedTuple):
    """One line: x [P], y [P] and, where there is a band, its half width [P]."""

    x: Sequence[float] | Array
    y: Sequence[float] | Array
    half: Sequence[float] | Array | None = None


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files only. UserError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'understudy[train]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


@contextmanager
def _figure(
    path: str | Path,
    title: str,
    note: str = "",
    size: tuple[float, float] = SIZE,
    panels: tuple[int, int] = (1, 1),
) -> Iterator[tuple[Any, Any]]:
    """Figure and axes, of several panels an array of them; saved when the block ends well."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(*panels, figsize=size, layout="constrained", sharex=True, sharey=True)
        try:
            if panels == (1, 1):
                axes.set_title(title)
            else:
                figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
            if note:
                figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#666666")
            yield figure, axes
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
        finally:
            plt.close(figure)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places near the wanted ones, in the same order and at least `gap` apart; runs that would overlap are centred."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []

    def middle(group: list[int]) -> float:
        return sum(wanted[i] for i in group) / len(group)

    for i in order:
        groups.append([i])
        while (
            len(groups) > 1 and middle(groups[-1]) - middle(groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    out = [0.0] * len(wanted)
    for group in groups:
        for rank, i in enumerate(group):
            out[i] = middle(group) + gap * (rank - (len(group) - 1) / 2)
    return out


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


def _draw(axes: Any, one: Series, i: int, **settings: Any) -> None:
    """A line over its band. A single point gets a dot: a line through it would not be seen."""
    x, y = np.asarray(one.x, dtype=np.float64), np.asarray(one.y, dtype=np.float64)
    if one.half is not None:
        half = np.asarray(one.half, dtype=np.float64)
        axes.fill_between(x, y - half, y + half, color=_look(i)["color"], alpha=0.2, linewidth=0, **settings)
    axes.plot(x, y, linewidth=1.8, marker="o" if len(x) == 1 else None, **_look(i), **settings)


def _label_ends(figure: Any, axes: Any, series: Mapping[str, Series]) -> None:
    """Each name at the right of its line, in the line's colour, joined to its end by a hair line where it had to move."""
    figure.draw_without_rendering()  # the scales are final
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / figure.dpi * 72  # points
    ends = [float(s.y[int(np.argmax(s.x))]) for s in series.values()]
    places = spread(ends, 12.5 / height * (high - low))
    for i, (name, one) in enumerate(series.items()):
        axes.annotate(
            name,
            xy=(float(np.max(one.x)), ends[i]),
            xytext=(1.03, (places[i] - low) / (high - low)),
            textcoords="axes fraction",
            color=_look(i)["color"],
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": _look(i)["color"],
                "lw": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )
    axes.set_ylim(low, high)


def lines(
    path: str | Path,
    series: Mapping[str, Series],
    xlabel: str,
    ylabel: str,
    title: str,
    markers: Mapping[str, float] | None = None,
    note: str = "",
) -> None:
    """Series in one figure. markers: label -> x of a vertical line. note: one small line beneath, e.g. what a band is."""
    assert series, "a figure shows something"
    with _figure(path, title, note) as (figure, axes):
        for i, one in enumerate(series.values()):
            _draw(axes, one, i)
        axes.margins(x=0.01)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        for label, place in (markers or {}).items():
            axes.axvline(place, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
            axes.annotate(
                label, (place, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points",
                va="top", fontsize=8.5,
            )  # fmt: skip
        _label_ends(figure, axes, series)


def curves(
    path: str | Path,
    repeats: Mapping[str, Sequence[Curve]],
    xlabel: str,
    ylabel: str,
    title: str,
    markers: Mapping[str, float] | None = None,
    reference: str | None = None,
) -> None:
    """Mean and 95 % t interval of repeated curves: label -> one (x [n], y [n]) per seed, aligned on x by interpolation.

    Bands of more than three labels would hide one another: each then gets a panel of its own, before the others' means in grey and
    that of `reference` dashed.
    """
    series = {}
    for label, runs in repeats.items():
        x, mean, half = band(runs)
        series[label] = Series(x, mean, half)
    counts = sorted({len(runs) for runs in repeats.values()})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"lines: mean of {seeds} seeds; bands: {CONFIDENCE:.0%} t interval at each {xlabel}"
    note = "one seed" if counts == [1] else note
    if len(series) <= 3 or counts == [1]:
        lines(path, series, xlabel, ylabel, title, markers, note)
        return
    note += "; grey: the other runs" + (f"; dashed: {reference}" if reference in series else "")
    note += f"; upright: {', '.join(markers)}" if markers else ""
    _panels(path, series, xlabel, ylabel, title, markers or {}, note, reference)


def _panels(
    path: str | Path,
    series: Mapping[str, Series],
    xlabel: str,
    ylabel: str,
    title: str,
    markers: Mapping[str, float],
    note: str,
    reference: str | None,
) -> None:
    """One panel per series, three in a row, on common axes."""
    height = -(-len(series) // 3)
    with _figure(path, title, note, (3.2 * 3, 2.5 * height + 0.7), (height, 3)) as (_, axes):
        for i, (panel, (name, one)) in enumerate(zip(axes.flat, series.items(), strict=False)):
            for other, (x, y, _half) in series.items():
                if other == reference and other != name:
                    panel.plot(x, y, color=INK, linewidth=1.1, linestyle=(0, (3, 1.5)), zorder=2.5)
                elif other != name:
                    panel.plot(x, y, color="#BBBBBB", linewidth=0.8)
            _draw(panel, one, i, zorder=3)
            for place in markers.values():
                panel.axvline(place, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
            panel.set_title(name, color=COLOURS[i % len(COLOURS)])
            panel.margins(x=0.01)
            panel.label_outer()
        for panel in axes.flat[len(series) :]:
            panel.set_visible(False)
        for i, panel in enumerate(axes.flat[: len(series)]):
            if i + 3 >= len(series):  # the lowest of its column
                panel.set_xlabel(xlabel)
                panel.tick_params(labelbottom=True)
            if i % 3 == 0:
                panel.set_ylabel(ylabel)


def bars(path: str | Path, values: Mapping[str, Interval | None], xlabel: str, title: str, note: str = "") -> None:
    """One horizontal bar per label, the first on top, with its interval as a whisker; None leaves the place empty."""
    assert values, "a figure shows something"
    with _figure(path, title, note, (SIZE[0], 1.3 + 0.38 * len(values))) as (_, axes):
        for i, found in enumerate(values.values()):
            if found is None:
                continue
            axes.barh(i, found.mean, height=0.62, color=COLOURS[0])
            if found.half is not None:
                axes.errorbar(found.mean, i, xerr=found.half, color=INK, linewidth=1.2, capsize=3)
            end = found.mean + (found.half or 0.0) if found.mean >= 0 else found.mean - (found.half or 0.0)
            side = 1 if found.mean >= 0 else -1
            axes.annotate(
                f"{found.mean:.3g}", (end, i), xytext=(5 * side, 0), textcoords="offset points", fontsize=9,
                va="center", ha="left" if side > 0 else "right",
            )  # fmt: skip
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.margins(x=0.12)
        axes.set_xlabel(xlabel)


def heatmap(
    path: str | Path,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[Any],
    columns: Sequence[Any],
    ylabel: str,
    xlabel: str,
    title: str,
    form: str = ".2f",
    note: str = "",
) -> None:
    """values [len(rows)][len(columns)], each written in its cell (`form`); None is an empty cell. The best of all is framed."""
    data = np.array([[np.nan if v is None else float(v) for v in row] for row in values], dtype=np.float64)
    assert data.shape == (len(rows), len(columns)) and np.isfinite(data).any()
    with _figure(path, title, note, (2.2 + 0.85 * len(columns), 1.6 + 0.55 * len(rows))) as (_, axes):
        axes.imshow(data, cmap="cividis", aspect="auto")
        low, high = np.nanmin(data), np.nanmax(data)
        for i, j in np.argwhere(np.isfinite(data)):
            dark = data[i, j] < (low + high) / 2
            axes.text(j, i, format(data[i, j], form), ha="center", va="center", color="white" if dark else "black")
        i, j = np.unravel_index(np.nanargmax(data), data.shape)
        axes.add_patch(
            pyplot().Rectangle((j - 0.47, i - 0.44), 0.94, 0.88, fill=False, edgecolor=COLOURS[1], linewidth=2.2)
        )
        axes.set_xticks(range(len(columns)), [str(c) for c in columns])
        axes.set_yticks(range(len(rows)), [str(r) for r in rows])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
