"""A chart's SVG is well formed, its marks stand where the values are, and no name breaks out of it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from backbench.reports.page.axes import linear
from backbench.reports.page.chart import Band, Chart, Dots, Ghosts, Line, Point, Shade, shared_paths
from backbench.reports.page.rows import Row, Rows
from backbench.reports.page.style import RunStyle

HOSTILE = "</text><script>alert(1)</script>\"'&\x00\u202e"
STYLE = RunStyle(HOSTILE, "--run-0", "#111111", "#eeeeee", "dash", 1)
X, Y = linear("Time (s)", [0, 10]), linear("Rate (output tok/s)", [0, 100])


def parse(body: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<svg>{body}</svg>")


def test_a_line_goes_through_its_points_and_stops_where_there_is_none() -> None:
    line = Line(np.array([0.0, 5, 6, 10]), np.array([0.0, 50, np.nan, 100]), STYLE)
    assert line.path(X, Y) == "M0 1000L500 500M1000 0"


def test_steps_go_right_and_then_up() -> None:
    line = Line(np.array([0.0, 10]), np.array([0.0, 100]), STYLE, steps=True)
    assert line.path(X, Y) == "M0 1000H1000V0"


def test_every_mark_is_well_formed_and_inert() -> None:
    x, y = np.array([1.0, 9]), np.array([10.0, 90])
    marks = (
        Shade(2, 8, HOSTILE, style=STYLE),
        Band(x, y - 5, y + 5, STYLE),
        Dots(x, y, STYLE),
        Line(x, y, STYLE, markers=True),
        Point(5, 50, STYLE, HOSTILE, (4, 6), (40, 60), HOSTILE),
    )
    body = Chart(X, Y, marks, HOSTILE, STYLE).body()
    found = parse(body)
    assert "<script" not in body
    assert "\x00" not in body
    (point,) = [each for each in found.iter("g") if each.get("class") == "point"]
    assert (point.get("data-tip") or "").startswith("</text><script>")
    (shade,) = [each for each in found.iter("rect") if each.get("class") == "shade"]
    assert (shade.get("x"), shade.get("width")) == ("20.00%", "60.00%")
    whiskers = list(point.iter("line"))
    assert [(each.get("x1"), each.get("x2")) for each in whiskers] == [
        ("40.00%", "60.00%"),
        ("50.00%", "50.00%"),
    ]
    assert [(each.get("y1"), each.get("y2")) for each in whiskers] == [
        ("50.00%", "50.00%"),
        ("60.00%", "40.00%"),
    ]


def test_both_axes_say_their_unit() -> None:
    texts = [each.text for each in parse(Chart(X, Y, ()).body()).iter("text")]
    assert {"Time (s)", "Rate (output tok/s)", "0", "10", "100"} <= set(texts)
    titled = [each.text for each in parse(Chart(X, Y, (), titled=True).body()).iter("text")]
    assert "output tok/s" in titled


def test_the_script_can_turn_a_place_back_into_a_value() -> None:
    data = Chart(X, Y, ()).data()
    assert re.findall(r"[\d.]+, [\d.]+, false", data) == ["0.0, 10.0, false", "0.0, 100.0, false"]


def test_shared_paths_are_written_once() -> None:
    line = Line(np.array([0.0, 10]), np.array([0.0, 100]), STYLE, id="a-0")
    group = shared_paths("a", [line], X, Y)
    body = Chart(X, Y, (Ghosts("a"), line)).body()
    assert group.count("M0 1000") == 1
    assert "M0 1000" not in body
    assert 'href="#a"' in body
    assert 'href="#a-0"' in body


def test_a_bar_is_as_long_as_its_value() -> None:
    rows = Rows(X, (Row(STYLE, 5.0, (4.0, 6.0), "5 s (4–6)", HOSTILE),))
    found = parse(rows.body())
    (bar,) = found.iter("rect")
    assert bar.get("width") == "50.00%"
    ends = {each.get("x1") for each in found.iter("line")}
    assert ends == {"40.00%", "60.00%"}
    assert not list(found.iter("script"))


@pytest.mark.parametrize("interval", [None, (4.0, 6.0)])
def test_a_bar_has_a_whisker_only_with_an_interval(interval: tuple[float, float] | None) -> None:
    found = parse(Rows(X, (Row(STYLE, 5.0, interval, "5 s"),)).body())
    assert bool(list(found.iter("line"))) is (interval is not None)
