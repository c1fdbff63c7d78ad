"""Intervals against literals, and figures: what is drawn is what was given, and labels do not overlap."""

from __future__ import annotations

import math
import struct
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from understudy.core.errors import UserError
from understudy.report.intervals import Interval, align, band, interval, t_quantile
from understudy.report.plots import Series, bars, curves, heatmap, lines, pyplot, spread


# two-sided 95 % points of Student's t, as printed tables give them
@pytest.mark.parametrize(
    ("df", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (40, 2.021), (120, 1.980)],
)
def test_t_quantiles_are_those_of_the_tables(df, expected):
    assert t_quantile(df) == pytest.approx(expected, abs=6e-4)


def test_the_interval_of_three_seeds():
    found = interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 4.302653 / math.sqrt(3), 3), rel=1e-6)


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert interval([0.5]) == Interval(0.5, None, 1)
    assert interval([]) is None


def test_sure_means_that_the_interval_excludes_zero():
    assert Interval(0.2, 0.1, 3).sure
    assert Interval(-0.2, 0.1, 3).sure
    assert not Interval(0.1, 0.2, 3).sure
    assert not Interval(0.2, None, 1).sure


def test_curves_are_aligned_where_all_of_them_are():
    x, y = align([([0, 4], [0.0, 4.0]), ([3, 1], [6.0, 2.0])], points=3)
    assert x.tolist() == [1, 2, 3]
    assert y.tolist() == [[1, 2, 3], [2, 4, 6]]


def test_curves_of_one_point_are_aligned_at_it():
    x, y = align([([2], [5.0]), ([2], [7.0])])
    assert x.tolist() == [2]
    assert y.tolist() == [[5], [7]]


def test_curves_without_a_common_range_are_refused():
    with pytest.raises(UserError, match="one begins at 5, one ends at 1"):
        align([([0, 1], [0, 0]), ([5, 6], [0, 0])])


def test_the_band_is_the_interval_at_each_place():
    values = [[1.0, 4.0], [2.0, 4.0], [3.0, 4.0]]
    x, mean, half = band([([0, 1], y) for y in values], points=2)
    assert x.tolist() == [0, 1]
    assert mean.tolist() == [2, 4]
    assert half is not None
    assert half.tolist() == pytest.approx([interval([1.0, 2.0, 3.0]).half, 0.0])
    assert band([([0, 1], [1, 2])])[2] is None


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12), st.floats(0.01, 20))
def test_spread_labels_keep_their_order_and_distance(wanted, gap):
    places = spread(wanted, gap)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert all(places[b] - places[a] >= gap - 1e-6 for a, b in pairwise(order))
    assert sum(places) == pytest.approx(sum(wanted), abs=1e-6)


def test_labels_that_have_room_stay_where_they_are():
    assert spread([0.0, 10.0, 5.0], 2) == [0.0, 10.0, 5.0]
    assert spread([1.0, 1.0], 2) == [0.0, 2.0]


# --- figures ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    """Fewer dots are drawn faster."""
    monkeypatch.setattr("understudy.report.plots.DPI", 50)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were made, which stay open to be looked at."""
    plt, figures = pyplot(), []
    close = plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    for figure in figures:
        close(figure)


def size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def box(figure, text):
    """The pixels of a label without the line that joins it to its curve."""
    figure.draw_without_rendering()  # saving left places in pixels of the file
    return Text.get_window_extent(text, figure.canvas.get_renderer())


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_lines_have_bands_markers_and_their_names(drawn, tmp_path):
    path = tmp_path / "made" / "lines.png"
    series = {"frozen": Series([0, 1], [0.3, 0.3], [0.1, 0.2]), "online": Series([0, 1], [0.3, 0.5])}
    lines(path, series, "prompts", "acceptance", "Learning", {"pays": 0.4}, "what a band is")
    assert size(path) == (400, 225)
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prompts", "acceptance")
    assert axes.get_title(loc="left") == "Learning"
    assert drawn[0].get_supxlabel() == "what a band is"
    assert texts(axes) == ["pays", "frozen", "online"]
    frozen, online, marker = axes.get_lines()
    assert frozen.get_ydata().tolist() == [0.3, 0.3]
    assert online.get_ydata().tolist() == [0.3, 0.5]
    assert set(marker.get_xdata()) == {0.4}
    (shade,) = axes.collections
    assert shade.get_paths()[0].vertices[:, 1].min() == pytest.approx(0.1)
    assert texts(axes)[1:] == ["frozen", "online"]
    assert axes.texts[1].get_color() == frozen.get_color() != online.get_color()


def test_series_that_end_together_have_labels_apart(drawn, tmp_path):
    lines(tmp_path / "a.png", {name: Series([0, 1], [0, 1]) for name in "abc"}, "x", "y", "t")
    figure = drawn[0]
    heights = sorted((box(figure, text).y0, box(figure, text).y1) for text in figure.axes[0].texts)
    assert all(below[1] <= above[0] + 1 for below, above in pairwise(heights))


def test_every_label_lies_inside_the_figure(drawn, tmp_path):
    lines(tmp_path / "a.png", {"a rather long name of a run": Series([0, 1], [0, 1])}, "x", "y", "t")
    assert box(drawn[0], drawn[0].axes[0].texts[0]).x1 <= drawn[0].bbox.x1


def test_curves_name_their_interval(drawn, tmp_path):
    runs = [([0, 1], [0.0, 1.0]), ([0, 1], [0.0, 2.0]), ([0, 1], [0.0, 3.0])]
    curves(tmp_path / "c.png", {"a": runs, "b": runs[:2]}, "step", "acc@1", "title")
    assert drawn[0].get_supxlabel() == "lines: mean of 2 to 3 seeds; bands: 95% t interval at each step"
    first = drawn[0].axes[0].get_lines()[0].get_ydata()
    assert [first[0], first[-1]] == [0.0, 2.0]
    curves(tmp_path / "d.png", {"a": runs[:1]}, "step", "acc@1", "title")
    assert drawn[1].get_supxlabel() == "one seed"
    assert not drawn[1].axes[0].collections


def test_many_curves_get_a_panel_each(drawn, tmp_path):
    runs = {name: [([0, 1], [0.0, v]), ([0, 1], [0.0, v + 1])] for v, name in enumerate(("a", "b", "c", "d"))}
    curves(tmp_path / "c.png", runs, "step", "acc", "title", {"shift": 0.5}, reference="b")
    panels = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["a", "b", "c", "d"]
    assert all(len(axes.collections) == 1 for axes in panels), "only its own band"
    assert all(len(axes.get_lines()) == 5 for axes in panels), "four means and the marker"
    dashed = [sum(line.get_linestyle() == "--" for line in axes.get_lines()[:4]) for axes in panels]
    assert dashed == [1, 0, 1, 1], "the reference, but in its own panel"
    assert len({axes.get_ylim() for axes in panels}) == 1
    assert drawn[0].get_supxlabel().endswith("grey: the other runs; dashed: b; upright: shift")


def test_bars_have_whiskers_and_values(drawn, tmp_path):
    values = {
        "none": Interval(1.0, None, 1),
        "kangaroo": Interval(1.8, 0.2, 3),
        "lost": None,
        "worse": Interval(-0.5, 0.1, 3),
    }
    bars(tmp_path / "b.png", values, "speed-up", "Speed")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [1.0, 1.8, -0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "kangaroo", "lost", "worse"]
    assert texts(axes) == ["1", "1.8", "-0.5"]
    assert len(axes.containers) == 3 + 2, "three bars, two whiskers"
    assert axes.yaxis_inverted(), "the first is on top"


def test_a_heat_map_writes_every_value_and_frames_the_best(drawn, tmp_path):
    heatmap(tmp_path / "h.png", [[1.0, 2.5], [None, 1.5]], [2, 4], [0.4, 0.6], "E", "threshold", "tau", ".1f")
    (axes,) = drawn[0].axes
    assert texts(axes) == ["1.0", "2.5", "1.5"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.4", "0.6"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "4"]
    (frame,) = axes.patches
    assert round(frame.get_x() + frame.get_width() / 2) == 1
    assert round(frame.get_y() + frame.get_height() / 2) == 0
    assert np.ma.getmaskarray(axes.images[0].get_array()).tolist() == [[False, False], [True, False]]


def test_a_figure_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="x and y"):
        lines(path, {"a": Series([0, 1], [0, 1, 2])}, "x", "y", "t")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert not pyplot().get_fignums(), "nothing stays open"


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'understudy\[train\]'"):
        lines(tmp_path / "a.png", {"a": Series([0, 1], [0, 1])}, "x", "y", "t")
