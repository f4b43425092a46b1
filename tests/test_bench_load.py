"""The load generator: how many requests run, when they start, and what becomes of those that fail."""

import asyncio
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import within

from tpdist.bench.load import Answer, Load, Loop, Record, arrival_times, run_load
from tpdist.bench.prompts import Prompt
from tpdist.errors import RequestError

PROMPTS: list[Prompt] = [(index, index) for index in range(9)]
LIMIT_S = 20.0


class Gate:
    """A target that answers when it is let. `running` are the prompts whose answers have begun and not ended."""

    def __init__(self, *, opened: bool = False, failures: dict[Prompt, str] | None = None, tokens: int = 3) -> None:
        self.opened = asyncio.Event()
        if opened:
            self.opened.set()
        self.started: list[Prompt] = []
        self.running = 0
        self.most = 0
        self.changed = asyncio.Event()
        self._failures = failures or {}
        self._tokens = tokens

    async def answer(self, prompt: Prompt, *, max_tokens: int, on_tokens: Callable[[int], None]) -> Answer:
        self.started.append(prompt)
        self.running += 1
        self.most = max(self.most, self.running)
        self.changed.set()
        try:
            await self.opened.wait()
            await asyncio.sleep(0)
            if prompt in self._failures:
                raise RequestError(self._failures[prompt])
            for _ in range(self._tokens):
                on_tokens(1)
            return Answer(num_tokens=self._tokens)
        finally:
            self.running -= 1

    async def wait_running(self, count: int) -> None:
        while self.running < count:
            self.changed.clear()
            await self.changed.wait()


async def closed(gate: Gate, concurrency: int, **options: float) -> list[Record]:
    chosen = {"timeout_s": LIMIT_S, **options}
    return await run_load(gate, PROMPTS, Load(Loop.CLOSED, concurrency), max_tokens=3, timeout_s=chosen["timeout_s"])


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (4, 4), (100, 9)])
def test_a_closed_loop_keeps_as_many_requests_running_as_it_was_told(concurrency: int, most: int) -> None:
    async def run() -> tuple[Gate, list[Record]]:
        gate = Gate()
        task = asyncio.create_task(closed(gate, concurrency))
        await within(LIMIT_S, gate.wait_running(most))
        gate.opened.set()
        return gate, await within(LIMIT_S, task)

    gate, records = asyncio.run(run())
    assert gate.most == most
    assert sorted(gate.started) == sorted(PROMPTS)
    assert len(records) == len(PROMPTS)
    assert all(record.error is None for record in records)
    assert [record.started_s for record in records] == sorted(record.started_s for record in records)


def test_an_open_loop_starts_requests_while_no_answer_has_come() -> None:
    async def run() -> list[Record]:
        gate = Gate()
        work = run_load(gate, PROMPTS, Load(Loop.OPEN, 1000.0), max_tokens=3, timeout_s=LIMIT_S, seed=1)
        task = asyncio.create_task(work)
        await within(LIMIT_S, gate.wait_running(len(PROMPTS)))
        gate.opened.set()
        return await within(LIMIT_S, task)

    records = asyncio.run(run())
    times = arrival_times(len(PROMPTS), rate=1000.0, seed=1)
    assert all(record.late_s >= 0 for record in records)
    assert [record.started_s - record.late_s for record in records] == pytest.approx(times)


def test_a_failed_request_is_a_record_with_its_error_and_the_others_go_on() -> None:
    async def run() -> tuple[list[Record], list[Record]]:
        gate = Gate(opened=True, failures={PROMPTS[2]: "told so"})
        ended: list[Record] = []
        load = Load(Loop.CLOSED, 2)
        return await run_load(gate, PROMPTS, load, max_tokens=3, timeout_s=LIMIT_S, on_end=ended.append), ended

    records, ended = asyncio.run(run())
    assert [record.error for record in records if record.error] == ["told so"]
    assert sum(record.answer is not None for record in records) == len(PROMPTS) - 1
    assert len(ended) == len(PROMPTS)


def test_an_answer_without_a_token_is_a_failure() -> None:
    async def run() -> list[Record]:
        return await closed(Gate(opened=True, tokens=0), 2)

    assert {record.error for record in asyncio.run(run())} == {"the answer ended without a token"}


def test_a_request_that_takes_too_long_is_given_up() -> None:
    async def run() -> list[Record]:
        return await within(LIMIT_S, closed(Gate(), 100, timeout_s=0.01))

    errors = [record.error or "" for record in asyncio.run(run())]
    assert all("no whole answer within 0.01 s" in error for error in errors)


def test_an_error_that_is_no_failed_request_is_not_hidden() -> None:
    class Broken(Gate):
        async def answer(self, prompt: Prompt, *, max_tokens: int, on_tokens: Callable[[int], None]) -> Answer:
            raise ZeroDivisionError

    async def run() -> None:
        await closed(Broken(), 2)

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(run())
    assert caught.group_contains(ZeroDivisionError)


@given(
    count=st.integers(1, 200),
    rate=st.floats(0.01, 1000),
    seed=st.integers(0, 2**31),
)
def test_arrival_times_only_grow_and_follow_the_seed(count: int, rate: float, seed: int) -> None:
    times = arrival_times(count, rate=rate, seed=seed)
    assert len(times) == count
    assert times[0] == 0
    assert times == sorted(times)
    assert times == arrival_times(count, rate=rate, seed=seed)
    assert count < 2 or times != arrival_times(count, rate=rate, seed=seed + 1)


@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_the_gaps_between_arrivals_are_exponential(rate: float) -> None:
    """Mean and standard deviation are both 1 / rate, and a part 1 / e of the gaps is longer than that."""
    times = arrival_times(20_001, rate=rate, seed=3)
    gaps = [(later - earlier) * rate for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1, abs=0.03)
    assert deviation == pytest.approx(1, abs=0.05)
    assert sum(gap > 1 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.015)
