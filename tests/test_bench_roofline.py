"""Bytes that decoding reads, and the bandwidth that they are compared with."""

import asyncio
from typing import Any

import pytest
import torch
from plans import small_config
from test_bench_report import record_of

from tpdist.bench import read_rate, roofline
from tpdist.bench.load import Answer
from tpdist.bench.roofline import MemoryClock, MemoryReport, Traffic, decode_bytes_per_s, measure_read, traffic_of
from tpdist.errors import TpdistError

PLAN: dict[str, Any] = {
    "device": "cpu",
    "dtype": "bfloat16",
    "ranks": [{"weight_bytes": 100_000, "kv_bytes_per_token": 30}, {"weight_bytes": 50_000, "kv_bytes_per_token": 10}],
}
TRAFFIC = Traffic(weight_bytes=1000, kv_bytes_per_token=10)


def test_a_step_reads_all_weights_but_an_untied_embedding_table() -> None:
    table = 300 * 64 * 2
    untied = traffic_of(PLAN, small_config(tie_word_embeddings=False))
    assert untied == Traffic(weight_bytes=150_000 - table, kv_bytes_per_token=40)
    assert traffic_of(PLAN, small_config(tie_word_embeddings=True)).weight_bytes == 150_000


def test_one_sequence_reads_the_weights_and_its_context_for_each_token() -> None:
    """Two steps a second, from the start to the end; five prompt tokens and on average two new ones."""
    record = record_of((0.0, 1), (0.5, 1), (1.0, 1), (1.5, 1))
    assert decode_bytes_per_s([record], TRAFFIC, duration_s=1.5) == 2 * (1000 + 7 * 10)


def test_sequences_that_run_together_share_the_weights_only() -> None:
    records = [record_of((0.0, 1), (0.5, 1), (1.0, 1), (1.5, 1)) for _ in range(3)]
    assert decode_bytes_per_s(records, TRAFFIC, duration_s=1.5) == 2 * (1000 + 3 * 7 * 10)


def test_failed_requests_and_answers_at_once_read_nothing() -> None:
    failed = record_of((0.0, 1), (0.001, 1), answer=None, error="no")
    at_once = record_of((0.0, 3), answer=Answer(num_tokens=3))
    assert decode_bytes_per_s([failed, at_once], TRAFFIC, duration_s=1.0) is None


def test_the_part_of_the_memory_is_over_the_mean_of_the_reads() -> None:
    memory = MemoryReport(read_bytes_per_s=(90.0, 110.0), weight_bytes=1, kv_bytes_per_token=1)
    assert memory.fraction(50.0) == 0.5
    assert memory.fraction(None) is None


def test_a_plain_read_is_measured_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([5.0, 9.0, 7.0])
    monkeypatch.setattr(read_rate, "cpu_bytes_per_s", lambda buffer: next(rates))
    assert read_rate.read_rate(device="cpu", num_bytes=1 << 12, passes=3) == 9.0


def test_a_plain_read_reads_every_byte() -> None:
    assert read_rate.read_rate(device="cpu", num_bytes=1 << 20, passes=2) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_copy_on_a_gpu_has_a_rate() -> None:
    assert read_rate.read_rate(device="cuda", num_bytes=1 << 26, passes=2) > 0


@pytest.mark.parametrize(("threads", "expected"), [(None, 8), (1, 2), (3, 6), (30, 8)])
def test_as_many_threads_read_as_the_ranks_have(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, expected: int
) -> None:
    asked: list[tuple[str, int]] = []

    async def measure(*, device: str, threads: int) -> float:
        asked.append((device, threads))
        return 5.0

    monkeypatch.setattr(roofline, "measure_read", measure)
    monkeypatch.setattr(roofline.cgroup, "num_cpus", lambda: 8)
    clock = MemoryClock(PLAN, devices=[{"cpu"}], threads=threads)
    asyncio.run(clock.read())
    asyncio.run(clock.read())
    assert asked == [("cpu", expected)] * 2
    report = clock.report(TRAFFIC)
    assert report is not None
    assert report.read_bytes_per_s == (5.0, 5.0)


def test_gpus_are_read_one_by_one_and_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async def measure(*, device: str, threads: int) -> float:
        return 5.0

    monkeypatch.setattr(roofline, "measure_read", measure)
    clock = MemoryClock({**PLAN, "device": "cuda"}, devices=[{"cuda:0", "cuda:1"}], threads=None)
    asyncio.run(clock.read())
    report = clock.report(TRAFFIC)
    assert report is not None
    assert report.read_bytes_per_s == (10.0,)


def test_memory_of_other_machines_has_no_report() -> None:
    clock = MemoryClock(PLAN, devices=[{"cpu"}, {"cpu"}], threads=None)
    asyncio.run(clock.read())
    assert clock.report(TRAFFIC) is None


def test_a_read_that_fails_says_what_its_process_said() -> None:
    with pytest.raises(TpdistError, match="invalid choice"):
        asyncio.run(measure_read(device="tpu", threads=1))
