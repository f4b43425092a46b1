"""What a placement is made of: the devices that there are, what is asked of the model, what each device would hold, and
which other layouts were weighed. Plain data, the same for ranks in processes of their own and for the devices of one
process; planner.py fills it, cli/ shows it, and as a dict it is the plan in /v1/cluster and `tpdist plan --json`.

Bytes are device memory; times are seconds of one decode step.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tpdist.plan.shards import Interval

Objective = Literal["latency", "throughput"]
Method = Literal["ranks", "exact", "first-fit", "manual"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, or the memory of a machine (`kind` cpu), or its disk. `name` is torch's, such as cuda:0, and unique
    on its node. `bandwidth`: bytes per second that it reads its memory with. `limit_bytes`: the most that its user lets
    be used of it."""

    name: str
    kind: Literal["cuda", "cpu", "disk"]
    node: str
    total_bytes: int
    free_bytes: int
    bandwidth: float
    limit_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between two devices: bytes per second, and seconds of the smallest message."""

    bandwidth: float
    latency_s: float


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Devices in the order of ranks, node by node. `inside`: the link between devices of a node, by its name. `across`:
    between two nodes, by their names in the order of ranks; `default_across` for pairs that are not there."""

    devices: tuple[Device, ...]
    inside: Mapping[str, Link]
    across: Mapping[tuple[str, str], Link]
    default_across: Link


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What decides memory beside the weights. `fixed` names the fields that the user set: they never shrink.

    `max_seq_len`, `max_batch_size`, `max_image_length` (pixels of an edge) and `max_num_images` are what a placement
    must have room for, not limits of what is served later.
    """

    dtype: Literal["float32", "bfloat16", "float16"]
    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_seq_len: int = 4096
    max_batch_size: int = 1
    max_image_length: int = 1024
    max_num_images: int = 1
    fixed: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """What one device holds. `rank` is None where one process has all devices. `layers` may be empty. `usable_bytes` is
    what may be used of the device at all; `kv_cache_bytes` is what the cache takes of it, and `tokens` how many tokens
    of this device's layers that is."""

    device: Device
    rank: int | None
    stage: int
    tp_rank: int
    layers: Interval
    holds_embedding: bool
    holds_head: bool
    usable_bytes: int
    weight_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    communication_bytes: int
    overhead_bytes: int
    tokens: int

    @property
    def used_bytes(self) -> int:
        return (
            self.weight_bytes
            + self.kv_cache_bytes
            + self.activation_bytes
            + self.communication_bytes
            + self.overhead_bytes
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that was weighed: `stage_layers` has the number of layers of each stage. `shortfall_bytes` is what the
    fullest device lacks, 0 if it fits. `latency_s`: one token of each sequence; `slowest_stage_s` bounds the throughput
    of a full pipeline. Both are infinite, and `stage_layers` empty, where the model cannot be cut so. `reason`: in
    words, why it was not taken."""

    tp_size: int
    pp_size: int
    stage_layers: tuple[int, ...]
    shortfall_bytes: int
    latency_s: float
    slowest_stage_s: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What will run. `shares` are the tensor-parallel weights of each stage's ranks. In one process the stages are the
    devices that have layers, in their order, and `devices` has the others behind them. `longest_context`: tokens of the
    longest sequences, `max_batch_size` of them at once, that fit by all bytes that are counted, at most the model's.
    `notes`: what was shrunk or decided for the user, a sentence each. `advice`: what would be faster or roomier, a
    sentence each. `demand` is what is left of the user's after shrinking. `extra`: "num_blocks", of the cache on every
    device, and "longest_sequence", the longest context of one alone."""

    architecture: str
    method: Method
    objective: Objective
    demand: Demand
    devices: tuple[DevicePlan, ...]
    tp_size: int
    pp_size: int
    stage_layers: tuple[Interval, ...]
    shares: tuple[tuple[int, ...], ...]
    longest_context: int
    latency_s: float
    slowest_stage_s: float
    rejected: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; infinite times are null."""
        made = asdict(self)
        made["demand"]["fixed"] = sorted(self.demand.fixed)
        for rejected in made["rejected"]:
            for name in ("latency_s", "slowest_stage_s"):
                rejected[name] = rejected[name] if math.isfinite(rejected[name]) else None
        return made
