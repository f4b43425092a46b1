"""A series of load points on one target: warm up, then each load in turn with prompts of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tpdist.bench.in_process import StartReport
from tpdist.bench.load import Load, Loop, Record, Target, run_load
from tpdist.bench.prompts import Prompt, random_prompts, take
from tpdist.bench.report import PointReport, summarise
from tpdist.bench.roofline import MemoryReport, Traffic, decode_bytes_per_s
from tpdist.errors import SettingsError

WARM_UP_TOKENS = 8
OPEN_LOOP_REQUESTS = 32
ROUNDS, LEAST_REQUESTS = 4, 8


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every request asks for. `prompts` replaces random ones; `num_requests` None: as many as a load needs."""

    prompt_tokens: int
    max_tokens: int
    vocab_size: int
    seed: int
    timeout_s: float
    shared_prefix_tokens: int = 0
    num_requests: int | None = None
    prompts: Sequence[Prompt] | None = None

    def count(self, load: Load) -> int:
        """Requests of one load point: enough rounds of a closed loop that its beginning and end weigh little."""
        if self.num_requests is not None:
            return self.num_requests
        return OPEN_LOOP_REQUESTS if load.loop is Loop.OPEN else max(LEAST_REQUESTS, ROUNDS * int(load.value))

    def prompts_of(self, run: int, count: int, *, used: int) -> list[Prompt]:
        """The prompts of one run, of which no other run has any. Those of a file follow the `used` ones before, and
        come again when it is at its end."""
        if self.prompts is not None:
            return take(self.prompts, count, skip=used)
        return random_prompts(
            count,
            num_tokens=self.prompt_tokens,
            vocab_size=self.vocab_size,
            seed=self.seed,
            run=run,
            shared_prefix_tokens=self.shared_prefix_tokens,
        )


async def warm_up(target: Target, workload: Workload) -> None:
    """One short request that is not counted. Raises SettingsError if it fails: none of the others would do better."""
    (record,) = await run_load(
        target,
        workload.prompts_of(0, 1, used=0),
        Load(Loop.CLOSED, 1),
        max_tokens=min(WARM_UP_TOKENS, workload.max_tokens),
        timeout_s=workload.timeout_s,
    )
    if record.error is not None:
        raise SettingsError(
            f"the first request failed: {record.error}\nA server that takes text only needs --prompt-file, one with a "
            f"small vocabulary --vocab-size (it is {workload.vocab_size} now)"
        )


async def measure_points(
    target: Target,
    loads: Sequence[Load],
    workload: Workload,
    *,
    traffic: Traffic | None = None,
    on_end: Callable[[Load, Record], None] = lambda load, record: None,
) -> list[PointReport]:
    """Measure every load in turn; `on_end` hears of each request that has ended."""
    reports: list[PointReport] = []
    for run, load in enumerate(loads, start=1):
        used = 1 + sum(report.num_requests for report in reports)
        records = await run_load(
            target,
            workload.prompts_of(run, workload.count(load), used=used),
            load,
            max_tokens=workload.max_tokens,
            timeout_s=workload.timeout_s,
            seed=workload.seed,
            on_end=lambda record, load=load: on_end(load, record),  # type: ignore[misc]
        )
        report = summarise(load, records, max_tokens=workload.max_tokens)
        if traffic is not None:
            rate = decode_bytes_per_s(records, traffic, duration_s=report.duration_s)
            report = replace(report, decode_bytes_per_s=rate)
        reports.append(report)
    return reports


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All that one `tpdist bench` found. `prompt_tokens` is None for prompts from a file; `repeated_prompts`: the file
    held fewer than a load needs, so that a prefix cache may have helped."""

    target: str
    model: str
    seed: int
    prompt_tokens: int | None
    max_tokens: int
    shared_prefix_tokens: int
    repeated_prompts: bool
    points: list[PointReport]
    start: StartReport | None = None
    memory: MemoryReport | None = None

    @classmethod
    def of(
        cls,
        workload: Workload,
        *,
        target: str,
        model: str,
        points: Sequence[PointReport],
        start: StartReport | None = None,
        memory: MemoryReport | None = None,
    ) -> "BenchReport":
        """Points get the part of the memory bandwidth that they used, if `memory` is known."""
        if memory is not None:
            points = [replace(each, memory_fraction=memory.fraction(each.decode_bytes_per_s)) for each in points]
        from_file = workload.prompts is not None
        return cls(
            target=target,
            model=model,
            seed=workload.seed,
            prompt_tokens=None if from_file else workload.prompt_tokens,
            max_tokens=workload.max_tokens,
            shared_prefix_tokens=workload.shared_prefix_tokens,
            repeated_prompts=from_file and sum(point.num_requests for point in points) >= len(workload.prompts or ()),
            points=list(points),
            start=start,
            memory=memory,
        )
