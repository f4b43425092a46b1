"""The picture of latency against load: well formed, and its points where the figures are."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bench_report import record_of

from tpdist.bench.load import Load, Loop
from tpdist.bench.plot import PANEL_HEIGHT, draw, nice_ticks
from tpdist.bench.report import PointReport, summarise

SVG = "{http://www.w3.org/2000/svg}"


def point(load: float, *, scale: float = 1.0, loop: Loop = Loop.CLOSED) -> PointReport:
    records = [record_of((scale, 1), (2 * scale, 1)), record_of((3 * scale, 1), (5 * scale, 1))]
    return summarise(Load(loop, load), records, max_tokens=2)


def failed(load: float) -> PointReport:
    record = record_of(ended_s=1.0, answer=None, error="no")
    return summarise(Load(Loop.CLOSED, load), [record], max_tokens=2)


def texts(drawing: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in drawing.iter(f"{SVG}text")]


def lines(drawing: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The points of each line, in the order of panels and percentiles."""
    found = [element.attrib["points"] for element in drawing.iter(f"{SVG}polyline")]
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in each.split())] for each in found]


def test_each_loop_has_two_panels_with_three_lines() -> None:
    points = [point(1), point(4), point(16), point(0.5, loop=Loop.OPEN)]
    drawing = ElementTree.fromstring(draw(points, title="tiny"))
    assert [len(line) for line in lines(drawing)] == [3] * 6 + [1] * 6
    shown = texts(drawing)
    assert shown[:4] == ["tiny", "p50", "p90", "p99"]
    assert shown.count("Time to first token (ms)") == shown.count("Inter-token latency (ms)") == 2
    assert {"1", "4", "16", "0.5", "requests at once", "requests per second"} <= set(shown)


def test_points_stand_by_their_load_and_as_high_as_their_latency() -> None:
    drawing = ElementTree.fromstring(draw([point(4, scale=2.0), point(1)], title="tiny"))
    (low, high), *_ = lines(drawing)
    assert low[0] < high[0]
    assert low[1] > high[1]
    top = nice_ticks(5.96 * 1e3)[-1] / 1e3
    assert low[1] - high[1] == pytest.approx(2.0 / top * PANEL_HEIGHT, abs=0.2)


def test_everything_stays_inside_the_picture() -> None:
    drawing = ElementTree.fromstring(draw([point(1), point(2, loop=Loop.OPEN, scale=99.0)], title="tiny"))
    width, height = float(drawing.attrib["width"]), float(drawing.attrib["height"])
    assert all(0 <= x <= width and 0 <= y <= height for line in lines(drawing) for x, y in line)
    for element in drawing.iter(f"{SVG}text"):
        assert 0 <= float(element.attrib["x"]) <= width
        assert 0 < float(element.attrib["y"]) <= height


def test_a_title_is_text_whatever_it_holds() -> None:
    title = "a<b>&c \"d\" 'e'"
    drawing = ElementTree.fromstring(draw([point(1)], title=title))
    assert texts(drawing)[0] == title


def test_loads_without_an_answer_are_left_out() -> None:
    drawing = ElementTree.fromstring(draw([point(1), failed(4)], title="tiny"))
    assert [len(line) for line in lines(drawing)] == [1] * 6
    assert lines(ElementTree.fromstring(draw([failed(4)], title="tiny"))) == []


def test_a_load_whose_answers_have_one_token_has_a_time_to_first_token() -> None:
    single = summarise(Load(Loop.CLOSED, 4), [record_of((3.0, 1))], max_tokens=1)
    drawing = ElementTree.fromstring(draw([point(1), single], title="tiny"))
    assert [len(line) for line in lines(drawing)] == [2] * 3 + [1] * 3
    alone = ElementTree.fromstring(draw([single], title="tiny"))
    assert [len(line) for line in lines(alone)] == [1] * 3
    assert "Inter-token latency (ms)" not in texts(alone)


@given(st.floats(1e-6, 1e9))
def test_ticks_reach_the_highest_value_and_are_few(highest: float) -> None:
    ticks = nice_ticks(highest)
    assert ticks[0] == 0
    assert ticks == sorted(ticks)
    assert ticks[-1] >= highest * (1 - 1e-9)
    assert 4 <= len(ticks) <= 8
    assert ticks[-2] < highest


def test_ticks_of_nothing_are_ticks() -> None:
    assert nice_ticks(0) == [0, 1]
