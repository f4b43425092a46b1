"""What one load point's records say: latencies, throughput, failures. Pure.

A request that failed counts as failed, and for nothing else: an error is never a fast answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from tpdist.bench.load import Load, Record


@dataclass(frozen=True)
class Spread:
    """The percentiles of one quantity over the requests, or over the tokens, of a load point."""

    p50: float
    p90: float
    p99: float
    mean: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None without values."""
        if not values:
            return None
        return cls(percentile(values, 50), percentile(values, 90), percentile(values, 99), fmean(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of `values` lie, linear between neighbours (numpy's default)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, kw_only=True)
class PointReport:
    """One load point.

    `ttft_s`: from the start of a request to its first token. `itl_s`: time between tokens; when several come at once,
    their time is shared out among them. `request_tokens_per_s`: the speed of one answer, (n - 1) / (last - first).
    `tokens_per_s` and `requests_per_s` are of whole answers over the whole time, from the first start to the last end.
    `short_answers` ended before they had all their tokens. `late_s` is how long after its time the latest request of
    an open loop started: it should be far less than the latencies. `cached_prompt_tokens` is None if the server does
    not tell. `decode_bytes_per_s` and the part of the memory bandwidth that this is: see roofline.py; None where the
    model does not run in this process.
    """

    loop: str
    load: float
    num_requests: int
    num_failed: int
    first_error: str | None
    short_answers: int
    duration_s: float
    num_tokens: int
    tokens_per_s: float
    requests_per_s: float
    ttft_s: Spread | None
    itl_s: Spread | None
    request_s: Spread | None
    request_tokens_per_s: Spread | None
    late_s: float
    cached_prompt_tokens: int | None
    decode_bytes_per_s: float | None = None
    memory_fraction: float | None = None


def summarise(load: Load, records: Sequence[Record], *, max_tokens: int) -> PointReport:
    """The report of one load point, from its records in the order of their starts."""
    whole = answered(records)
    errors = [record.error for record in records if record.error is not None]
    duration_s = max(record.ended_s for record in records) - min(record.started_s for record in records)
    tokens = [_num_tokens(record) for record in whole]
    cached = [record.answer.num_cached_tokens for record in whole if record.answer is not None]
    told = [count for count in cached if count is not None]
    return PointReport(
        loop=load.loop.value,
        load=load.value,
        num_requests=len(records),
        num_failed=len(errors),
        first_error=errors[0] if errors else None,
        short_answers=sum(count < max_tokens for count in tokens),
        duration_s=duration_s,
        num_tokens=sum(tokens),
        tokens_per_s=sum(tokens) / duration_s,
        requests_per_s=len(whole) / duration_s,
        ttft_s=Spread.of([ttft_s(record) for record in whole]),
        itl_s=Spread.of([gap for record in whole for gap in token_gaps_s(record)]),
        request_s=Spread.of([record.ended_s - record.started_s for record in whole]),
        request_tokens_per_s=Spread.of(speeds(whole)),
        late_s=max(record.late_s for record in records),
        cached_prompt_tokens=sum(told) if told else None,
    )


def answered(records: Sequence[Record]) -> list[Record]:
    """Those with a whole answer."""
    return [record for record in records if record.error is None]


def ttft_s(record: Record) -> float:
    """Time to first token."""
    return record.arrivals[0][0] - record.started_s


def token_gaps_s(record: Record) -> list[float]:
    """The time of each token after those that came first."""
    gaps: list[float] = []
    for (before_s, _), (now_s, count) in pairwise(record.arrivals):
        gaps += [(now_s - before_s) / count] * count
    return gaps


def speeds(records: Sequence[Record]) -> list[float]:
    """Tokens per second of each answer after its first tokens: (n - 1) / (last - first), where one token came first.

    Answers that came all at once have no speed."""
    pairs = [(_num_tokens(record) - record.arrivals[0][1], decode_s(record)) for record in records]
    return [count / seconds for count, seconds in pairs if count > 0 and seconds > 0]


def decode_s(record: Record) -> float:
    """From the first token to the last."""
    return record.arrivals[-1][0] - record.arrivals[0][0]


def _num_tokens(record: Record) -> int:
    return record.answer.num_tokens if record.answer is not None else 0
