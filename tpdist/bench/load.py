"""Requests at a given load, and when each of their tokens came.

A closed loop keeps a number of requests running: the next starts when one ends. An open loop starts requests at random
times whatever becomes of the earlier ones, as independent users do. Knows no server: a Target brings the tokens.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from tpdist.bench.prompts import Prompt
from tpdist.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is known of a whole answer. `num_cached_tokens` is None if the server does not tell."""

    num_tokens: int
    num_cached_tokens: int | None = None


class Target(Protocol):
    """What is measured."""

    async def answer(self, prompt: Prompt, *, max_tokens: int, on_tokens: Callable[[int], None]) -> Answer:
        """Have one prompt continued by exactly `max_tokens` tokens, and call `on_tokens(n)` whenever n of them come.

        Raises RequestError when the answer does not come, or not whole."""
        ...


class Loop(StrEnum):
    CLOSED = "closed"
    OPEN = "open"


@dataclass(frozen=True)
class Load:
    """`value` is the number of requests that run at once (closed), or that start in a second on average (open)."""

    loop: Loop
    value: float


@dataclass(kw_only=True)
class Record:
    """One request. Times are seconds after the start of its load point. `arrivals`: when tokens came, and how many.
    `late_s` is how much later than planned it started; `error` is None for a whole answer."""

    started_s: float
    num_prompt_tokens: int | None
    late_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    answer: Answer | None = None
    ended_s: float = 0.0
    error: str | None = None


async def run_load(
    target: Target,
    prompts: Sequence[Prompt],
    load: Load,
    *,
    max_tokens: int,
    timeout_s: float,
    seed: int = 0,
    on_end: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Ask for an answer to each of `prompts` and return the records in the order of the requests' starts.

    `timeout_s` is for one whole answer; `seed` fixes the start times of an open loop. A request that fails is a record
    with an error."""
    point = _Point(target, max_tokens=max_tokens, timeout_s=timeout_s, on_end=on_end)
    if load.loop is Loop.CLOSED:
        await _closed(point, prompts, concurrency=int(load.value))
    else:
        await _open(point, prompts, arrival_times(len(prompts), rate=load.value, seed=seed))
    return point.records


def arrival_times(count: int, *, rate: float, seed: int) -> list[float]:
    """Seconds at which `count` requests start if they come independently of each other, `rate` a second on average:
    the gaps of a Poisson process are exponential. The first starts at 0."""
    generator = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + generator.expovariate(rate))
    return times[:count]


async def _closed(point: "_Point", prompts: Sequence[Prompt], *, concurrency: int) -> None:
    waiting = iter(prompts)

    async def client() -> None:
        for prompt in waiting:
            await point.ask(prompt, planned_s=point.now())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(prompts))):
            group.create_task(client())


async def _open(point: "_Point", prompts: Sequence[Prompt], times: Sequence[float]) -> None:
    async with asyncio.TaskGroup() as group:
        for prompt, planned_s in zip(prompts, times, strict=True):
            await asyncio.sleep(max(0.0, planned_s - point.now()))
            group.create_task(point.ask(prompt, planned_s=planned_s))


class _Point:
    """The clock and the records of one load point."""

    def __init__(self, target: Target, *, max_tokens: int, timeout_s: float, on_end: Callable[[Record], None]) -> None:
        self.records: list[Record] = []
        self._target = target
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._origin = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._origin

    async def ask(self, prompt: Prompt, *, planned_s: float) -> None:
        num_prompt_tokens = None if isinstance(prompt, str) else len(prompt)
        started_s = self.now()
        record = Record(started_s=started_s, num_prompt_tokens=num_prompt_tokens, late_s=started_s - planned_s)
        self.records.append(record)

        def on_tokens(count: int) -> None:
            record.arrivals.append((self.now(), count))

        try:
            async with asyncio.timeout(self._timeout_s):
                record.answer = await self._target.answer(prompt, max_tokens=self._max_tokens, on_tokens=on_tokens)
            if not record.arrivals:
                record.error = "the answer ended without a token"
        except RequestError as error:
            record.error = str(error)
        except TimeoutError:
            record.error = f"no whole answer within {self._timeout_s:g} s (--request-timeout-s)"
        record.ended_s = self.now()
        self._on_end(record)
