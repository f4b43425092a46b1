"""Figures from records: percentiles, speeds, throughput, and what does not count."""

from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpdist.bench.load import Answer, Load, Loop, Record
from tpdist.bench.report import PointReport, Spread, percentile, speeds, summarise, token_gaps_s

CLOSED = Load(Loop.CLOSED, 2)


def record_of(*arrivals: tuple[float, int], started: float = 0.0, **changes: Any) -> Record:
    """A request whose tokens came at these times; a whole answer unless changed."""
    count = sum(number for _, number in arrivals)
    ended = arrivals[-1][0] if arrivals else started
    fields = {"answer": Answer(num_tokens=count), "ended_s": ended, "num_prompt_tokens": 5, **changes}
    return Record(started_s=started, arrivals=list(arrivals), **fields)


def report_of(*records: Record, max_tokens: int = 3) -> PointReport:
    return summarise(CLOSED, records, max_tokens=max_tokens)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1), percent=st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    expected = numpy.percentile(values, percent)
    assert percentile(values, percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_a_spread_of_nothing_is_none() -> None:
    assert Spread.of([]) is None
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0)


def test_the_speed_of_a_request_leaves_out_its_first_token() -> None:
    assert speeds([record_of((10.0, 1), (10.5, 1), (12.0, 1))]) == [2 / 2.0]


def test_tokens_that_come_together_share_their_time() -> None:
    record = record_of((1.0, 2), (2.0, 1), (4.0, 2))
    assert token_gaps_s(record) == [1.0, 1.0, 1.0]
    assert speeds([record]) == [3 / 3.0]


def test_an_answer_that_came_all_at_once_has_no_speed() -> None:
    assert speeds([record_of((1.0, 3)), record_of((1.0, 1))]) == []


def test_a_count_that_the_server_tells_decides_over_its_chunks() -> None:
    record = record_of((1.0, 1), (3.0, 1), answer=Answer(num_tokens=9))
    assert speeds([record]) == [4.0]
    assert report_of(record, max_tokens=9).num_tokens == 9


def test_a_point_sums_up_its_requests() -> None:
    first = record_of((1.0, 1), (2.0, 1), (3.0, 1))
    second = record_of((4.0, 1), (4.5, 1), (5.0, 1), started=1.0, late_s=0.25)
    report = report_of(first, second)
    assert (report.loop, report.load, report.num_requests) == ("closed", 2, 2)
    assert report.duration_s == 5.0
    assert report.tokens_per_s == 6 / 5
    assert report.requests_per_s == 2 / 5
    assert report.ttft_s is not None
    assert (report.ttft_s.p50, report.ttft_s.mean) == (2.0, 2.0)
    assert report.itl_s is not None
    assert report.itl_s.p50 == 0.75
    assert report.request_tokens_per_s is not None
    assert report.request_tokens_per_s.p50 == 1.5
    assert (report.num_failed, report.first_error, report.short_answers) == (0, None, 0)
    assert report.late_s == 0.25


def test_a_failed_request_counts_as_failed_and_for_nothing_else() -> None:
    good = record_of((2.0, 1), (3.0, 1), (4.0, 1))
    refused = record_of(ended_s=0.001, answer=None, error="refused at once")
    broken = record_of((0.1, 1), (0.2, 1), ended_s=8.0, answer=None, error="broke off")
    report = report_of(good, refused, broken)
    alone = report_of(good)
    assert (report.num_failed, report.first_error) == (2, "refused at once")
    assert (report.ttft_s, report.itl_s, report.request_s) == (alone.ttft_s, alone.itl_s, alone.request_s)
    assert report.num_tokens == 3
    assert report.tokens_per_s == 3 / 8.0
    assert report.requests_per_s == 1 / 8.0


def test_a_point_where_all_failed_has_no_latencies() -> None:
    report = report_of(record_of(ended_s=1.0, answer=None, error="no"))
    assert (report.ttft_s, report.itl_s, report.request_tokens_per_s, report.tokens_per_s) == (None, None, None, 0)


def test_short_answers_are_counted() -> None:
    whole, short = record_of((1.0, 1), (2.0, 2)), record_of((1.0, 1), (2.0, 1))
    assert report_of(whole, short).short_answers == 1


def test_cached_tokens_are_summed_if_the_server_tells() -> None:
    told = record_of((1.0, 3), answer=Answer(num_tokens=3, num_cached_tokens=4))
    assert report_of(told, told).cached_prompt_tokens == 8
    assert report_of(record_of((1.0, 3))).cached_prompt_tokens is None
