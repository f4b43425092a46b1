"""What two or more pipeline stages do when: a picture of some steps, and how much of the time all of them were busy.

    python tests/bench/timeline.py [--runs 5] [--svg timeline.svg]

Claims: the part of the time in which every stage computes, of a stretch from the middle of the decodes.

Runs the model of the benchmarks with one rank a stage and `--trace-folder`, and draws what each rank computed. A stage
is busy while it computes; it is idle while it waits for hidden states or for a plan.
"""

import argparse
import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from xml.sax.saxutils import escape

from measuring import Figure, LoadGenerator, model_folder, parser, show

from tpdist.bench.in_process import running_model
from tpdist.bench.plot import nice_ticks
from tpdist.settings import Settings

PROMPT_TOKENS = 16
WIDTH, LEFT, RIGHT, TOP, ROW, BAR, BOTTOM = 1000, 96, 20, 84, 62, 40, 46
COLOURS = ("#1b6ca8", "#e08a1e", "#2f855a", "#b8336a")
STYLE = (
    "text{font:13px system-ui,'Segoe UI',Helvetica,Arial,sans-serif;fill:#333}.title{font-size:16px;font-weight:600}"
    ".soft{fill:#667}.step{fill:#fff;font-size:12px}.idle{fill:#eef0f3}.axis{stroke:#99a}"
)


@dataclass(frozen=True)
class Busy:
    """A rank computed for one step, from `begin` to `end` in seconds."""

    rank: int
    step: int
    begin: float
    end: float


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--stages", type=int, default=2, metavar="N", help="default: 2")
    options.add_argument("--clients", type=int, default=8, metavar="N", help="default: 8")
    options.add_argument("--tokens", type=int, default=32, metavar="N", help="of each answer (default: 32)")
    options.add_argument("--steps", type=int, default=12, metavar="N", help="that are drawn (default: 12)")
    options.add_argument("--svg", type=Path, metavar="FILE", help="where the picture goes")
    arguments = options.parse_args()
    busy = []
    with model_folder(arguments) as folder:
        for _ in range(arguments.runs):
            shown = measure(folder, arguments)
            busy.append(all_busy(shown, num_ranks=arguments.stages))
    if arguments.svg is not None:
        title = f"{arguments.stages} stages, {arguments.clients} clients: all stages busy {busy[-1]:.0%} of the time"
        arguments.svg.write_text(draw(shown, title=title, num_ranks=arguments.stages), encoding="utf-8")
    name = f"{arguments.stages} stages, {arguments.clients} clients: part of the time with all busy"
    show([Figure(name, busy)], as_json=arguments.json)


def measure(folder: Path, arguments: argparse.Namespace) -> list[Busy]:
    """A stretch of one run."""
    with TemporaryDirectory() as traces:
        asyncio.run(run(folder, Path(traces), arguments))
        events = [event for file in Path(traces).glob("rank-*.jsonl") for event in read(file)]
    return stretch(events, num_steps=arguments.steps, num_ranks=arguments.stages)


async def run(folder: Path, traces: Path, arguments: argparse.Namespace) -> None:
    options = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": arguments.stages,
        "threads": max(1, arguments.threads // arguments.stages),
        "kv_cache_memory_bytes": "512MiB",
        "log_level": "WARNING",
        "trace_folder": traces,
    }
    async with running_model(Settings.load(options), str(folder), environ=os.environ) as running:
        generator = LoadGenerator(running.target, vocab_size=running.config.vocab_size)
        clients = arguments.clients
        load = {"concurrency": clients, "num_requests": clients, "prompt_tokens": PROMPT_TOKENS}
        await running.measure(generator.measure(**load, max_tokens=arguments.tokens))


def read(file: Path) -> Iterator[Busy]:
    """Forward pass and sampling of a step count as one; waiting does not count."""
    spans: dict[int, list[tuple[float, float]]] = {}
    for line in file.read_text().splitlines():
        event = json.loads(line)
        if event["name"] in ("forward", "sample") and event["step"]:
            spans.setdefault(event["step"], []).append((event["begin"], event["end"]))
    rank = int(file.stem.partition("-")[2])
    for step, parts in spans.items():
        yield Busy(rank, step, min(begin for begin, _ in parts), max(end for _, end in parts))


def stretch(events: Sequence[Busy], *, num_steps: int, num_ranks: int) -> list[Busy]:
    """The middle steps, and of the time before and after them what the first and the last of them do not touch."""
    last = max(event.step for event in events)
    first = max(1, (last - num_steps) // 2)
    chosen = [event for event in events if first <= event.step < first + num_steps]
    begin = min(event.begin for event in chosen if event.rank == num_ranks - 1)
    end = max(event.end for event in chosen if event.rank == 0)
    cut = [Busy(e.rank, e.step, max(e.begin, begin), min(e.end, end)) for e in events]
    return [event for event in cut if event.end > event.begin]


def all_busy(events: Sequence[Busy], *, num_ranks: int) -> float:
    """The part of the time in which every rank computes."""
    edges = sorted([(event.begin, 1) for event in events] + [(event.end, -1) for event in events])
    together, running, since = 0.0, 0, edges[0][0]
    for at, change in edges:
        together += (at - since) * (running == num_ranks)
        running, since = running + change, at
    return together / (edges[-1][0] - edges[0][0])


def draw(events: Sequence[Busy], *, title: str, num_ranks: int) -> str:
    """The picture as a text of SVG: a row for each rank, a bar for each step, alike for steps of one batch."""
    begin, end = min(event.begin for event in events), max(event.end for event in events)
    scale = (WIDTH - LEFT - RIGHT) / (end - begin)
    height = TOP + num_ranks * ROW + BOTTOM

    def x_of(seconds: float) -> float:
        return LEFT + (seconds - begin) * scale

    def bar(event: Busy) -> Iterator[str]:
        x, width = x_of(event.begin), (event.end - event.begin) * scale
        y, colour = TOP + event.rank * ROW, COLOURS[event.step % num_ranks % len(COLOURS)]
        name = f"rank {event.rank}, step {event.step}: {(event.end - event.begin) * 1e3:.1f} ms"
        yield f'<rect x="{x:.1f}" y="{y}" width="{max(1.0, width - 1):.1f}" height="{BAR}" rx="3" fill="{colour}">'
        yield f"<title>{name}</title></rect>"
        if width > 30:
            yield f'<text class="step" x="{x + width / 2:.1f}" y="{y + 25}" text-anchor="middle">{event.step}</text>'

    step_ms = median(event.end - event.begin for event in events) * 1e3
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        "<desc>A row for each stage, in which a bar is one step; while one stage runs a step, the one before runs the "
        "next.</desc>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text class="title" x="{LEFT}" y="30">{escape(title)}</text>',
        f'<text class="soft" x="{LEFT}" y="54">a bar is one step on one stage, with its number; steps of one batch '
        f"have one colour; median {step_ms:.0f} ms</text>",
    ]
    for rank in range(num_ranks):
        y = TOP + rank * ROW
        lines.append(f'<text x="{LEFT - 12}" y="{y + 25}" text-anchor="end">stage {rank}</text>')
        lines.append(f'<rect class="idle" x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{BAR}" rx="3"/>')
    lines += [line for event in events for line in bar(event)]
    axis = TOP + num_ranks * ROW - 6
    lines.append(f'<line class="axis" x1="{LEFT}" y1="{axis}" x2="{WIDTH - RIGHT}" y2="{axis}"/>')
    for tick in nice_ticks((end - begin) * 1e3)[:-1]:
        x = x_of(begin + tick / 1e3)
        lines.append(f'<line class="axis" x1="{x:.1f}" y1="{axis}" x2="{x:.1f}" y2="{axis + 5}"/>')
        lines.append(f'<text class="soft" x="{x:.1f}" y="{axis + 21}" text-anchor="middle">{tick:g}</text>')
    lines += [f'<text class="soft" x="{WIDTH - RIGHT}" y="{axis + 38}" text-anchor="end">milliseconds</text>', "</svg>"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
