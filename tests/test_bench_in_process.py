"""The engine as a target, and the clock of a start, without processes."""

import asyncio

import pytest
from server_fakes import FakeClient
from waiting import within

from tpdist.bench.in_process import EngineTarget, LoadClock, StartReport
from tpdist.bench.load import Answer
from tpdist.control.messages import RankUpdate
from tpdist.errors import RequestError

LIMIT_S = 20.0


def ask(client: FakeClient, *, times: int = 1) -> tuple[Answer, list[int]]:
    """The last answer, and how many tokens came each time."""
    counts: list[int] = []

    async def run() -> Answer:
        target = EngineTarget(client)
        for _ in range(times):
            counts.clear()
            answer = await within(LIMIT_S, target.answer((5, 6), max_tokens=4, on_tokens=counts.append))
        return answer

    return asyncio.run(run()), counts


def test_tokens_are_counted_as_the_engine_gives_them() -> None:
    client = FakeClient(lambda request: [1, 2, 3], per_step=2)
    answer, counts = ask(client)
    assert answer.num_tokens == sum(counts)
    assert counts[0] == 2


def test_requests_ban_the_end_of_sequence_and_have_names_of_their_own() -> None:
    client = FakeClient(lambda request: [1])
    ask(client, times=2)
    first, second = client.requests
    assert first.request_id != second.request_id
    assert first.prompt_token_ids == (5, 6)
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos, sampling.greedy) == (4, 4, True, True)


def test_a_lost_rank_is_a_failed_request() -> None:
    client = FakeClient(lambda request: [1, 2, 3], fail_after=1)
    with pytest.raises(RequestError, match="rank 1 was lost"):
        ask(client)


def update(rank: int, phase: str, *, done: int = 0, total: int = 0) -> RankUpdate:
    return RankUpdate(rank=rank, pid=1, device="cpu", phase=phase, done=done, total=total)


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_a_load_lasts_from_the_first_rank_that_begins_to_the_last_that_has_loaded() -> None:
    now = Clock()
    clock = LoadClock(now)
    said = [
        (1.0, update(0, "start")),
        (2.0, update(0, "load")),
        (3.0, update(1, "load", total=30)),
        (4.0, update(0, "load", done=5, total=20)),
        (5.0, update(0, "warmup")),
        (7.0, update(1, "warmup")),
        (8.0, update(1, "ready")),
    ]
    for now.time, message in said:
        clock.update(message)
    now.time = 9.0
    assert clock.report() == StartReport(time_to_ready_s=9.0, load_bytes=50, load_s=5.0, load_bytes_per_s=10.0)


def test_ranks_that_tell_of_no_load_have_no_speed() -> None:
    clock = LoadClock()
    clock.update(update(0, "ready"))
    report = clock.report()
    assert (report.load_s, report.load_bytes_per_s, report.load_bytes) == (None, None, 0)
