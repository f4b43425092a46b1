"""Latency against load as a picture: SVG, written directly.

One row for closed loops and one for open ones; in each, time to first token on the left and inter-token latency on the
right, with a line for each percentile. Loads stand at equal distances, so that 1, 4, 16 and 64 are all readable.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from tpdist.bench.load import Loop
from tpdist.bench.report import PointReport, Spread

PANEL_WIDTH, PANEL_HEIGHT = 330, 210
LEFT, TOP, GAP_X, GAP_Y, RIGHT, BOTTOM = 70, 92, 84, 86, 26, 58
SERIES = (("p50", "#1b6ca8"), ("p90", "#e08a1e"), ("p99", "#b8336a"))
LOADS = {Loop.CLOSED: "requests at once", Loop.OPEN: "requests per second"}
STYLE = (
    "text{font:12px system-ui,'Segoe UI',Helvetica,Arial,sans-serif;fill:#333}"
    ".title{font-size:15px;font-weight:600;fill:#111}.panel{font-weight:600}"
    ".grid{stroke:#e4e4e4}.axis{stroke:#888}.line{fill:none;stroke-width:2;stroke-linejoin:round}"
)


@dataclass(frozen=True)
class Panel:
    """One quantity over the loads of one loop. `left` and `top` are the corner of its axes."""

    title: str
    loads: Sequence[float]
    spreads: Sequence[Spread]
    x_title: str
    left: float
    top: float

    def draw(self) -> Iterator[str]:
        """Grid, ticks, titles, lines."""
        unit, scale = ("ms", 1e3) if max(spread.p99 for spread in self.spreads) < 10 else ("s", 1.0)
        ticks = nice_ticks(max(spread.p99 for spread in self.spreads) * scale)
        right, bottom = self.left + PANEL_WIDTH, self.top + PANEL_HEIGHT

        def y_of(seconds: float) -> float:
            return bottom - seconds * scale / ticks[-1] * PANEL_HEIGHT

        yield _text(self.left, self.top - 12, f"{self.title} ({unit})", kind="panel")
        for tick in ticks:
            y = y_of(tick / scale)
            yield f'<line class="grid" x1="{self.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
            yield _text(self.left - 8, y + 4, f"{tick:g}", anchor="end")
        yield f'<line class="axis" x1="{self.left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'
        for index, load in enumerate(self.loads):
            x = self._x_of(index)
            yield f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>'
            yield _text(x, bottom + 18, f"{load:g}", anchor="middle")
        yield _text(self.left + PANEL_WIDTH / 2, bottom + 38, self.x_title, anchor="middle")
        for name, colour in SERIES:
            yield from self._line(name, colour, y_of)

    def _line(self, name: str, colour: str, y_of: Callable[[float], float]) -> Iterator[str]:
        points = [(self._x_of(index), y_of(getattr(spread, name))) for index, spread in enumerate(self.spreads)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline class="line" stroke="{colour}" points="{path}"/>'
        for (x, y), load, spread in zip(points, self.loads, self.spreads, strict=True):
            shown = f"{name} at {load:g} {self.x_title}: {getattr(spread, name) * 1e3:.4g} ms"
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{shown}</title></circle>'

    def _x_of(self, index: int) -> float:
        return self.left + PANEL_WIDTH * (index + 0.5) / len(self.loads)


def draw(points: Sequence[PointReport], *, title: str) -> str:
    """The picture as a text of SVG. Load points without an answer are left out, and those whose answers came all at
    once have no inter-token latency."""
    panels = list(_panels(points))
    rows = len({panel.top for panel in panels})
    width = LEFT + 2 * PANEL_WIDTH + GAP_X + RIGHT
    height = TOP + rows * PANEL_HEIGHT + max(0, rows - 1) * GAP_Y + BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 28, title, kind="title"),
        *_legend(),
        *(line for panel in panels for line in panel.draw()),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def nice_ticks(highest: float) -> list[float]:
    """From 0 to at least `highest`, in four to seven steps of 1, 2 or 5 times a power of ten."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if highest / (factor * power) <= 6)
    return [float(f"{step * index:.12g}") for index in range(math.ceil(highest / step - 1e-9) + 1)]


def _panels(points: Sequence[PointReport]) -> Iterator[Panel]:
    top = float(TOP)
    for loop in Loop:
        chosen = sorted((point for point in points if point.loop == loop.value), key=lambda point: point.load)
        first = [(point.load, point.ttft_s) for point in chosen if point.ttft_s is not None]
        between = [(point.load, point.itl_s) for point in chosen if point.itl_s is not None]
        for title, found, left in (
            ("Time to first token", first, LEFT),
            ("Inter-token latency", between, LEFT + PANEL_WIDTH + GAP_X),
        ):
            if found:
                loads, spreads = zip(*found, strict=True)
                yield Panel(title, loads, spreads, LOADS[loop], left, top)
        if first:
            top += PANEL_HEIGHT + GAP_Y


def _legend() -> Iterator[str]:
    for index, (name, colour) in enumerate(SERIES):
        x = LEFT + index * 64
        yield f'<line class="line" stroke="{colour}" x1="{x}" y1="51" x2="{x + 20}" y2="51"/>'
        yield f'<circle cx="{x + 10}" cy="51" r="3.5" fill="{colour}"/>'
        yield _text(x + 26, 55, name)


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<text{chosen} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
