"""How much of the memory bandwidth decoding uses. Pure, but for the child that measures the bandwidth.

Each token of a sequence takes one pass over the weights, which all sequences that run share, and a read of its own
keys and values. Memory gives no more bytes per second than a plain read, so the quotient says how far from the limit
a decode is (the roofline of Williams et al., https://doi.org/10.1145/1498765.1498785, at its memory-bound end).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from tpdist.bench.load import Record
from tpdist.bench.report import answered, decode_s, speeds
from tpdist.control.child import output_of_module
from tpdist.errors import TpdistError
from tpdist.plan.memory import DTYPE_BYTES
from tpdist.plan.model_config import ModelConfig
from tpdist.preflight import cgroup

READ_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that all ranks together read: `weight_bytes` for a step, `kv_bytes_per_token` for each token of context."""

    weight_bytes: int
    kv_bytes_per_token: int


def traffic_of(plan: Mapping[str, Any], config: ModelConfig) -> Traffic:
    """From the plan that /v1/cluster shows. A step reads of the embedding table only its tokens' rows; a tied one is
    the output layer too, and read whole."""
    table = config.vocab_size * config.hidden_size * DTYPE_BYTES[plan["dtype"]]
    ranks = plan["ranks"]
    return Traffic(
        weight_bytes=sum(rank["weight_bytes"] for rank in ranks) - (0 if config.tie_word_embeddings else table),
        kv_bytes_per_token=sum(rank["kv_bytes_per_token"] for rank in ranks),
    )


def decode_bytes_per_s(records: Sequence[Record], traffic: Traffic, *, duration_s: float) -> float | None:
    """Bytes per second that decoding read; None if no answer had a speed.

    Steps per second are the median speed of an answer; the sequences that ran at once are the time in which answers
    came, over the whole time."""
    whole = [record for record in answered(records) if record.answer is not None]
    rates = speeds(whole)
    if not rates:
        return None
    running = sum(decode_s(record) for record in whole) / duration_s
    context = fmean(
        (record.num_prompt_tokens or 0) + (record.answer.num_tokens if record.answer else 0) / 2 for record in whole
    )
    return median(rates) * (traffic.weight_bytes + running * context * traffic.kv_bytes_per_token)


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """`read_bytes_per_s`: a plain read with the same devices or threads, before the loads and after them."""

    read_bytes_per_s: tuple[float, ...]
    weight_bytes: int
    kv_bytes_per_token: int

    def fraction(self, bytes_per_s: float | None) -> float | None:
        """`bytes_per_s` as a part of what the plain reads reached on average."""
        return None if bytes_per_s is None else bytes_per_s / fmean(self.read_bytes_per_s)


class MemoryClock:
    """Reads the memory that the ranks use. Memory of other nodes cannot be read from here: then there is no report."""

    def __init__(self, plan: Mapping[str, Any], *, devices: Sequence[set[str]], threads: int | None) -> None:
        """`devices` are those in use, node by node; `threads` those of each rank, None for all CPUs together."""
        self._device = plan["device"]
        self._num_nodes = len(devices)
        self._num_devices = len(devices[0]) if self._device == "cuda" else 1
        num_cpus = cgroup.num_cpus()
        self._threads = num_cpus if threads is None else min(num_cpus, threads * len(plan["ranks"]))
        self._rates: list[float] = []

    async def read(self) -> None:
        if self._num_nodes == 1:
            rate = await measure_read(device=self._device, threads=self._threads)
            self._rates.append(rate * self._num_devices)

    def report(self, traffic: Traffic) -> MemoryReport | None:
        if not self._rates:
            return None
        return MemoryReport(
            read_bytes_per_s=tuple(self._rates),
            weight_bytes=traffic.weight_bytes,
            kv_bytes_per_token=traffic.kv_bytes_per_token,
        )


async def measure_read(*, device: str, threads: int) -> float:
    """Bytes per second of a plain read of this machine's memory, or of one GPU's; by a child, so that this process
    needs no torch. Raises TpdistError."""
    words = ("tpdist.bench.read_rate", "--device", device, "--threads", str(threads))
    try:
        code, output, said = await output_of_module(*words, timeout_s=READ_TIMEOUT_S)
    except TimeoutError as error:
        raise TpdistError(f"a plain read of 2 GiB took more than {READ_TIMEOUT_S:g} s") from error
    if code != 0:
        raise TpdistError(f"the plain read of memory ended with {code}: {said}")
    return float(json.loads(output)["bytes_per_s"])
