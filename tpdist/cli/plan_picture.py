"""A placement as a picture: SVG, written directly. A panel for each node, a row for each device.

A row shows the whole model as a strip of layers, in which the device's own are filled, as high as its part of each; and
its memory as a bar. Between panels stands the link that hidden states cross. Colours follow the reader's light or dark
theme.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from tpdist.cli.plan_bars import SEGMENTS, largest_by_kind, segment_bytes
from tpdist.cli.plan_model import ModelFacts
from tpdist.cli.plan_output import (
    expectations,
    head_counts,
    headline,
    in_one_process,
    layers_of,
    layout_line,
    milliseconds,
    percent,
    rate,
)
from tpdist.cli.sizes import size
from tpdist.plan.placement import DevicePlan, Inventory, Link, Placement

WIDTH, MARGIN, PAD = 1060, 24, 18
TOP, ROW, PANEL_HEAD, GAP = 172, 56, 66, 46
STRIP_LEFT, STRIP_WIDTH, STRIP_HEIGHT = 190, 340, 24
END_WIDTH, END_GAP = 15, 4
BAR_LEFT, BAR_WIDTH = 560, 296
CLASSES = ("weights", "kv", "activations", "rest", "free", "blocked")
STYLE = """
svg{--page:#ffffff;--panel:#f6f7f9;--edge:#d5d9e0;--ink:#1d2430;--soft:#5c6675;--empty:#e6e9ee;--hatch:#b9c0cb;
--weights:#3a6ea5;--deep:#27527f;--kv:#2a9d78;--activations:#e0a030;--rest:#9462a8}
@media (prefers-color-scheme:dark){svg{--page:#14181f;--panel:#1c222c;--edge:#343d4b;--ink:#eef1f6;--soft:#a3adbb;
--empty:#2b3340;--hatch:#4a5566;--weights:#5b96d6;--deep:#82b4ea;--kv:#3fbf95;--activations:#e8b454;--rest:#b48ac6}}
text{font:12px system-ui,'Segoe UI',Helvetica,Arial,sans-serif;fill:var(--ink)}
.page{fill:var(--page)}.panel{fill:var(--panel);stroke:var(--edge)}
.title{font-size:19px;font-weight:600}.figure{font-size:16px;font-weight:600}.name{font-size:14px;font-weight:600}.strong{font-weight:600}
.soft{fill:var(--soft);font-size:11px}
.weights{fill:var(--weights)}.deep{fill:var(--deep)}.kv{fill:var(--kv)}.activations{fill:var(--activations)}
.rest{fill:var(--rest)}.free{fill:var(--empty)}.blocked{fill:url(#hatch)}.empty{fill:var(--empty)}
.edge{fill:none;stroke:var(--edge)}.limit{stroke:var(--ink);stroke-width:1.5}.link{stroke:var(--soft);stroke-width:2}
.arrow{fill:var(--soft)}.hatched{stroke:var(--hatch);stroke-width:2}
""".strip()
HATCH = (
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="free" width="6" height="6"/><line class="hatched" x1="0" y1="0" x2="0" y2="6"/></pattern>'
)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One device. `share`: the part of each of its layers that it holds, as start and stop between 0 and 1."""

    plan: DevicePlan
    heads: str
    share: tuple[float, float]
    num_layers: int
    largest: int

    def draw(self, top: float) -> Iterator[str]:
        yield f"<g><title>{_clean(self.words())}</title>"
        yield from self._label(top)
        yield from self._strip(top)
        yield from self._bar(top)
        yield "</g>"

    def words(self) -> str:
        """The row as a sentence."""
        plan = self.plan
        rank = "" if plan.rank is None else f" (rank {plan.rank})"
        held = f"layers {layers_of(plan.layers)}" if plan.layers.size else "no layers"
        parts = ", ".join(
            f"{name} {size(part)}" for (name, *_), part in zip(SEGMENTS, self._bytes(), strict=True) if part
        )
        return f"{plan.device.node} {plan.device.name}{rank}: {held}; {parts}"

    def _label(self, top: float) -> Iterator[str]:
        plan = self.plan
        yield _text(MARGIN + PAD, top + 11, plan.device.name, kind="strong")
        stage = f"stage {plan.stage}"
        rank = stage if plan.rank is None else f"rank {plan.rank}, {stage}"
        yield _text(MARGIN + PAD, top + 27, rank if plan.layers.size else "no layers", kind="soft")

    def _strip(self, top: float) -> Iterator[str]:
        """Embedding, layers, output layer."""
        plan = self.plan
        left, right = STRIP_LEFT + END_WIDTH + END_GAP, STRIP_LEFT + STRIP_WIDTH - END_WIDTH - END_GAP
        first, last = self.share
        y, height = top + STRIP_HEIGHT * first, STRIP_HEIGHT * (last - first)
        ends = ((STRIP_LEFT, plan.holds_embedding), (right + END_GAP, plan.holds_head))
        for x, held in ends:
            yield _rect("empty", x, top, END_WIDTH, STRIP_HEIGHT)
            if held:
                yield _rect(self._shade, x, y, END_WIDTH, height)
        yield _rect("empty", left, top, right - left, STRIP_HEIGHT)
        width = (right - left) / max(1, self.num_layers)
        gap = min(1.0, width / 4)
        cells = "".join(
            f"M{left + width * layer + gap / 2:.2f} {y:.2f}h{width - gap:.2f}v{height:.2f}h{gap - width:.2f}z"
            for layer in range(*plan.layers)
        )
        if cells:
            yield f'<path class="{self._shade}" d="{cells}"/>'
        if plan.layers.size:
            part = "" if last - first > 0.999 else f", share {100 * (last - first):.0f}%"
            words = f"layers {layers_of(plan.layers)}{part} ({self.heads} heads)"
            yield _text(STRIP_LEFT, top + STRIP_HEIGHT + 15, words, kind="soft")

    @property
    def _shade(self) -> str:
        """Stages that follow each other have different ones."""
        return "deep" if self.plan.stage % 2 else "weights"

    def _bytes(self) -> tuple[int, ...]:
        return segment_bytes(self.plan)

    def _bar(self, top: float) -> Iterator[str]:
        plan = self.plan
        total = max(1, plan.device.total_bytes)
        length = max(24.0, BAR_WIDTH * total / max(1, self.largest))
        left: float = BAR_LEFT
        parts = self._bytes()
        whole = max(total, sum(parts))
        for kind, part in zip(CLASSES, parts, strict=True):
            width = length * part / whole
            if width > 0:
                yield _rect(kind, left, top, width, STRIP_HEIGHT)
            left += width
        yield f'<rect class="edge" x="{BAR_LEFT}" y="{top:.1f}" width="{length:.1f}" height="{STRIP_HEIGHT}"/>'
        limit = BAR_LEFT + length * min(plan.usable_bytes, whole) / whole
        yield _limit(limit, top - 3, top + STRIP_HEIGHT + 3)
        right = WIDTH - MARGIN - PAD
        yield _text(right, top + 11, f"{size(plan.used_bytes)} of {size(total)}", kind="strong", anchor="end")
        usable = f"{percent(plan)}% of {size(plan.usable_bytes)} usable"
        yield _text(right, top + 27, usable, kind="soft", anchor="end")


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One node: its name, the link inside, its rows."""

    name: str
    inside: Link | None
    rows: Sequence[_Row]
    top: float

    @property
    def height(self) -> float:
        return PANEL_HEAD + ROW * len(self.rows)

    def draw(self) -> Iterator[str]:
        yield (
            f'<rect class="panel" x="{MARGIN}" y="{self.top:.1f}" width="{WIDTH - 2 * MARGIN}" '
            f'height="{self.height:.1f}" rx="10"/>'
        )
        yield _text(MARGIN + PAD, self.top + 26, self.name[:60], kind="name")
        count = "1 device" if len(self.rows) == 1 else f"{len(self.rows)} devices"
        linked = f", linked with {link_words(self.inside)}" if self.inside and len(self.rows) > 1 else ""
        yield _text(WIDTH - MARGIN - PAD, self.top + 26, count + linked, kind="soft", anchor="end")
        yield from self._headings()
        for index, row in enumerate(self.rows):
            yield from row.draw(self.top + PANEL_HEAD + ROW * index)

    def _headings(self) -> Iterator[str]:
        y = self.top + PANEL_HEAD - 12
        last = self.rows[0].num_layers - 1
        yield _text(STRIP_LEFT + END_WIDTH + END_GAP, y, "layer 0", kind="soft")
        right = STRIP_LEFT + STRIP_WIDTH - END_WIDTH - END_GAP
        yield _text(right, y, str(last), kind="soft", anchor="end")
        yield _text(STRIP_LEFT + END_WIDTH / 2, y, "E", kind="soft", anchor="middle")
        yield _text(STRIP_LEFT + STRIP_WIDTH - END_WIDTH / 2, y, "H", kind="soft", anchor="middle")
        kinds = len({row.plan.device.kind for row in self.rows})
        yield _text(BAR_LEFT, y, "memory, to scale" if kinds == 1 else "memory, each kind to scale", kind="soft")


def draw(placement: Placement, *, inventory: Inventory, facts: ModelFacts) -> str:
    """The picture as a text of SVG; every device is named in it."""
    panels = list(_panels(placement, inventory, facts))
    bottom = panels[-1].top + panels[-1].height if panels else TOP
    height = round(bottom + MARGIN)
    title = f"{facts.name}: {layout_line(placement)}"
    told = "; ".join(f"{label}: {words}" for label, words in expectations(placement))
    rows = ". ".join(row.words() for panel in panels for row in panel.rows)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{_clean(title)}</title>',
            f'<desc id="desc">{_clean(told)}. {_clean(rows)}.</desc>',
            f"<style>{STYLE}</style>",
            f"<defs>{HATCH}</defs>",
            f'<rect class="page" width="{WIDTH}" height="{height}" rx="12"/>',
            *_header(placement, facts),
            *(line for panel in panels for line in panel.draw()),
            *_links(panels, placement, inventory),
            "</svg>\n",
        ]
    )


def link_words(link: Link) -> str:
    """As in `12.5 GB/s, 30 us`."""
    rate = f"{link.bandwidth / 1e9:.3g} GB/s" if link.bandwidth >= 1e9 else f"{link.bandwidth / 1e6:.3g} MB/s"
    return f"{rate}, {link.latency_s * 1e6:.3g} us"


def _header(placement: Placement, facts: ModelFacts) -> Iterator[str]:
    yield _text(MARGIN, 40, headline(facts, placement), kind="title")
    yield _text(MARGIN, 63, layout_line(placement))
    left: float = MARGIN
    for figure, words in _figures(placement):
        yield _text(left, 96, figure, kind="figure")
        yield _text(left, 113, words, kind="soft")
        left += 250
    left = MARGIN
    for (name, *_), kind in zip(SEGMENTS, CLASSES, strict=True):
        yield _rect(kind, left, 134, 14, 14)
        yield _text(left + 20, 145, name)
        left += 40 + 6.6 * len(name)
    yield _limit(left + 4, 132, 150)
    yield _text(left + 12, 145, "most that may be used")
    yield _text(WIDTH - MARGIN, 145, "E embedding, H output layer", anchor="end")


def _figures(placement: Placement) -> Iterator[tuple[str, str]]:
    """What is predicted: a figure, and what it is."""
    if placement.latency_s > 0:
        whose = "one sequence" if placement.demand.max_batch_size == 1 else "each sequence"
        yield milliseconds(placement.latency_s), f"predicted, a token of {whose}"
    if placement.slowest_stage_s > 0 and not in_one_process(placement):
        busy = ", all stages busy" if placement.pp_size > 1 else ""
        yield f"{rate(1 / placement.slowest_stage_s)} steps/s", f"predicted at most{busy}"
    yield f"{placement.longest_context} tokens", "longest context that fits"
    kv_cache = sum(plan.kv_cache_bytes for plan in placement.devices)
    yield size(kv_cache), "KV cache of all devices"


def _panels(placement: Placement, inventory: Inventory, facts: ModelFacts) -> Iterator[_Panel]:
    heads, largest = head_counts(placement, facts), largest_by_kind(placement)
    by_node: dict[str, list[_Row]] = {}
    for plan, count in zip(placement.devices, heads, strict=True):
        row = _Row(
            plan=plan,
            heads=count,
            share=_share(placement, plan),
            num_layers=facts.num_hidden_layers,
            largest=largest[plan.device.kind],
        )
        by_node.setdefault(plan.device.node, []).append(row)
    top = float(TOP)
    for name, rows in by_node.items():
        panel = _Panel(name=name, inside=inventory.inside.get(name), rows=rows, top=top)
        yield panel
        top += panel.height + GAP


def _share(placement: Placement, plan: DevicePlan) -> tuple[float, float]:
    """The part of each layer that a device holds, between those of the ranks before and behind it."""
    shares = placement.shares[plan.stage] if plan.stage < len(placement.shares) else (1,)
    if plan.tp_rank >= len(shares):
        return 0.0, 1.0
    return sum(shares[: plan.tp_rank]) / sum(shares), sum(shares[: plan.tp_rank + 1]) / sum(shares)


def _links(panels: Sequence[_Panel], placement: Placement, inventory: Inventory) -> Iterator[str]:
    """An arrow between nodes that follow each other, with the speed of their link."""
    for above, below in pairwise(panels):
        link = inventory.across.get((above.name, below.name), inventory.default_across)
        x, start, stop = WIDTH / 2, above.top + above.height, below.top
        yield f'<line class="link" x1="{x}" y1="{start + 4:.1f}" x2="{x}" y2="{stop - 9:.1f}"/>'
        yield f'<path class="arrow" d="M{x - 5} {stop - 11:.1f}h10l-5 8z"/>'
        if placement.pp_size == 1:
            yield f'<path class="arrow" d="M{x - 5} {start + 11:.1f}h10l-5 -8z"/>'
        yield _text(x + 14, (start + stop) / 2 + 4, link_words(link))


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height}"/>'


def _limit(x: float, top: float, bottom: float) -> str:
    """The mark of what may be used at most."""
    return f'<line class="limit" x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<text{chosen} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_clean(text)}</text>'


def _clean(text: str) -> str:
    """Escaped, and without characters that XML cannot hold."""
    return escape("".join(each if each.isprintable() else "?" for each in text))
