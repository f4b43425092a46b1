"""What `tpdist bench` shows: a bar of requests while it works, then the table of load points and what to note."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tpdist.bench.in_process import StartReport
from tpdist.bench.load import Load, Loop, Record
from tpdist.bench.report import PointReport
from tpdist.bench.session import BenchReport, Workload
from tpdist.cli.sizes import size

LOADS = {Loop.CLOSED: "at once", Loop.OPEN: "a second"}
LATE_S, LATE_PART = 0.005, 0.1
"""A request that starts later than both this and this part of the median time to first token spoils the latencies."""


class RequestProgress:
    """A bar on stderr for the requests of the load that runs, if that is a terminal."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            disable=not console.is_terminal,
        )
        self._load: Load | None = None

    def __enter__(self) -> Self:
        self._task = self._progress.add_task("first request", total=None)
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, load: Load, record: Record) -> None:
        """One request of `load` has ended."""
        if load is not self._load:
            self._load = load
            name = f"{load.value:g} {LOADS[load.loop]}"
            self._progress.reset(self._task, description=name, total=self._workload.count(load))
        self._progress.advance(self._task)


def title_of(report: BenchReport) -> str:
    """What was measured, in a line."""
    prompt = "prompts of a file" if report.prompt_tokens is None else f"{report.prompt_tokens} prompt tokens"
    return f"{report.model}, {report.target}: {prompt}, {report.max_tokens} new ones"


def print_report(report: BenchReport) -> None:
    """The report on stdout."""
    console = Console()
    console.print(title_of(report), highlight=False, markup=False)
    for loop in Loop:
        points = [point for point in report.points if point.loop == loop.value]
        if points:
            console.print(points_table(points, load=LOADS[loop]))
    for note in notes(report):
        console.print(note, highlight=False, markup=False)


def points_table(points: Sequence[PointReport], *, load: str) -> Table:
    """One line a load point, in 80 columns; latencies in milliseconds. A column without anything to tell is left
    out."""
    rows = [list(_cells(point)) for point in points]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    headings: tuple[str, ...] = (load, "TTFT ms\np50", "p90", "p99", "ITL ms\np50", "p90", "p99")
    headings += ("tok/s\nall", "tok/s\none", "req/s", "memory", "failed")
    columns = [column for column in zip(headings, *rows, strict=True) if any(column[1:])]
    for heading, *_ in columns:
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for cells in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*cells)
    return table


def _cells(point: PointReport) -> Iterator[str]:
    """The cells of a line. An empty one has nothing to tell."""
    yield f"{point.load:g}"
    for spread in (point.ttft_s, point.itl_s):
        yield from ("-",) * 3 if spread is None else (_ms(spread.p50), _ms(spread.p90), _ms(spread.p99))
    speed = point.request_tokens_per_s
    yield f"{point.tokens_per_s:.1f}"
    yield "-" if speed is None else f"{speed.p50:.1f}"
    yield f"{point.requests_per_s:.2f}"
    yield "" if point.memory_fraction is None else f"{point.memory_fraction:.0%}"
    yield str(point.num_failed or "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def notes(report: BenchReport) -> Iterator[str]:
    """What a reader of the table must know beside it."""
    for point in report.points:
        yield from _warnings(point)
    if report.repeated_prompts:
        yield "prompts of the file came more than once: a prefix cache may have helped"
    if report.start is not None:
        yield f"ready after {report.start.time_to_ready_s:.1f} s{_load_speed(report.start)}"
    if report.memory is not None:
        rates = " and ".join(f"{rate / 1e9:.1f}" for rate in report.memory.read_bytes_per_s)
        yield (
            f"memory: decoding reads {size(report.memory.weight_bytes)} of weights a step and "
            f"{size(report.memory.kv_bytes_per_token)} for each token of context; 100% is a plain read, {rates} GB/s "
            "before and after"
        )
    yield f"seed {report.seed}: --prompt-seed repeats these prompts and times"


def _load_speed(start: StartReport) -> str:
    rate = start.load_bytes_per_s
    if rate is None:
        return ""
    speed = f"{rate / 1e9:.1f} GB/s" if rate >= 1e8 else f"{rate / 1e6:.1f} MB/s"
    return f"; {size(start.load_bytes)} loaded at {speed}"


def _warnings(point: PointReport) -> Iterator[str]:
    name = f"{point.load:g} {LOADS[Loop(point.loop)]}"
    if point.num_failed:
        yield f"{name}: {point.num_failed} of {point.num_requests} requests failed; the first: {point.first_error}"
    if point.short_answers:
        yield f"{name}: {point.short_answers} answers were shorter than asked for: does the server know ignore_eos?"
    if point.ttft_s is not None and point.late_s > max(LATE_S, LATE_PART * point.ttft_s.p50):
        yield f"{name}: a request started {_ms(point.late_s)} ms late; this machine is too busy for exact latencies"
    if point.cached_prompt_tokens:
        yield f"{name}: {point.cached_prompt_tokens} prompt tokens came from the prefix cache"
