"""How many bytes a rank needs: its weights, what a step of the forward keeps alive, what ranks exchange, and what a
process needs to run at all. How long a decode step takes stands in speed.py.

Bytes are what parameters, buffers and tensors have (nbytes), without what an allocator rounds up. The cache of every
layer keeps all tokens, also where a sliding window makes it read fewer: windows make steps faster, not caches smaller.
With more ranks than key-value heads each rank caches its copy of a head.

Of activations the peak is what counts: the tensors that models/decoder.py and its layers hold at their fullest, which
is in attention, in the MLP, in a norm, or when logits become tokens. With T tokens, hidden size H, q query and k
key-value heads and I columns of the MLP on this rank, head size D, d bytes an element and C tokens of context:

    input      T (3 * 8 + 2 ropes * rotary_dim * d) + masks         ids, positions, slots, angles
    layer      2 T H d                                              what came in, and the sum so far
    norm       T H (8 + d), in float32 T H 8                        the wide copy, scaled, and rounded
    attention  T H d + T D (q + 2k) d + T D (q + k) d               normed input, heads, rotated heads
               + the larger of   3 T D (q + k) d (5 with q_norm)    products on the way to the rotated heads
                                 3 T D q d + gathered               attention's output, its copy, and one joined
                                 T D q d + T H d                    output projection
    MLP        T H d + 3 T I d + T H d                              normed input, gate and up, activated, output
    masks      a number for each query and key of a prompt's chunk, at most MAX_MASK_ELEMENTS for a sequence, by window;
               two booleans each while one is made
    gathered   2 * 2 k D d * sequences * C                          keys and values of one layer, copied together; twice
                                                                    for padding, or for a recorded step's own copy
    logits     T H d + n H d + n V_r d                              n rows, V_r of the V words on this rank
               + 2 n V d + 4 n V + SAMPLER_BYTES * part             shards joined, as float32, and a part drawn from
               + DIGITS_BYTES * rows of a part                      sums by digit, of a row that is cut by mass
"""

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tpdist.plan.memory import DTYPE_BYTES
from tpdist.plan.model_config import ModelConfig, RopeConfig
from tpdist.plan.placement import Demand
from tpdist.plan.shards import Axis, Blocks, Partition, Rows, Weights, WeightSpec, key_value_heads, query_heads
from tpdist.plan.stages import EMBEDDING, OUTPUT

Bytes = NDArray[np.int64]
Number = TypeVar("Number", np.int64, np.float64)

MIB = 1024**2

NORM_BUFFER_BYTES = 4
"""The eps of a norm, a float32 on its device."""

MAX_MASK_ELEMENTS = 1 << 23
"""As in layers/attention.py."""

SAMPLER_PART = {"cpu": 2**17, "cuda": 2**22}
SAMPLER_BYTES = 48
"""Rows are drawn from in parts of so many logits (engine/sampler.py). For each: two copies and a temporary of 4 bytes,
masses of 8, digits of 4 and 8, sums of 8, and booleans."""

DIGITS_BYTES = 2 * 8 * (2**15 + 1)
"""Of each row that is drawn from: sums by digit (engine/sampler.py), of one digit while those of the next are made."""

LOGPROB_ROWS = 32
LOGPROB_BYTES = 24
"""Rows that are scored at once, and bytes for each of their logits (engine/logprobs.py)."""

CUDA_CONTEXT_BYTES = 512 * MIB
"""Of a process on a GPU: the driver's context and the kernels of torch."""

CUDA_WORKSPACE_BYTES = 192 * MIB
"""cuBLAS' workspaces, and what torch's allocator holds beyond what tensors need."""

PROCESS_BYTES = 256 * MIB
"""Memory of its own of a rank's Python process with torch, as a CPU's ranks need it besides tensors."""

NCCL_BYTES = 256 * MIB
"""Buffers of one communicator on each of its GPUs."""

STREAM_BUFFERS = 2
"""Layers of the disk that are in memory at a time (models/streamed.py)."""

SLOT_BYTES = 512 * 1024
SEGMENT_HEADER_BYTES = 8192
"""Of the memory that ranks of one machine share: two slots for each (parallel/segment.py), and one header."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ItemBytes:
    """Weights and buffers of one rank. `layers`: of each layer. `head`: the output layer, by itself. A tied one has
    bytes of its own only on a stage that does not have the embedding."""

    embedding: int
    layers: Bytes
    final_norm: int
    head: int
    tied: bool

    def by_interval(self, *, head_first: bool = False) -> Bytes:
        """Of the layers start <= i < stop and what goes with the first and the last of the model's layers, for all
        intervals: [num_layers + 1, num_layers + 1]. With `head_first` all of that goes with the first layer."""
        sums = sums_of_runs(self.layers)
        sums[0, :] += self.embedding
        last = sums[0, :] if head_first else sums[:, -1]
        last += self.final_norm + self.head
        if self.tied:
            both = sums[0, :] if head_first else sums[0, -1:]
            both -= self.head
        return sums


class WeightItems:
    """The tensors of a model by what they belong to, with equal layers found once."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._config = config
        layers: list[list[WeightSpec]] = [[] for _ in range(config.num_hidden_layers)]
        self._embedding: list[WeightSpec] = []
        self._output: list[WeightSpec] = []
        self._last: list[WeightSpec] = []
        for spec in weights.specs:
            if match := _LAYER.match(spec.parameter):
                layers[int(match[1])].append(spec)
            else:
                {EMBEDDING: self._embedding, OUTPUT: self._output}.get(spec.parameter, self._last).append(spec)
        kinds: dict[tuple[object, ...], list[WeightSpec]] = {}
        keys = [tuple((spec.shape, spec.split) for spec in specs) for specs in layers]
        for key, specs in zip(keys, layers, strict=True):
            kinds.setdefault(key, specs)
        numbers = {key: number for number, key in enumerate(kinds)}
        self._kind_of_layer = np.array([numbers[key] for key in keys])
        self._kinds = tuple(kinds.values())

    def on_rank(self, partition: Partition, rank: int, *, dtype_bytes: int) -> ItemBytes:
        """What `rank` of a tensor-parallel group holds of each item."""

        def total(specs: list[WeightSpec]) -> int:
            return dtype_bytes * sum(_local_size(spec, partition, rank) for spec in specs)

        norms = 4 if self._config.qk_norm else 2
        kinds = np.array([total(specs) + norms * NORM_BUFFER_BYTES for specs in self._kinds], dtype=np.int64)
        return ItemBytes(
            embedding=total(self._embedding),
            layers=kinds[self._kind_of_layer],
            final_norm=total(self._last) + NORM_BUFFER_BYTES,
            head=total(self._output or self._embedding),
            tied=not self._output,
        )


@lru_cache(maxsize=4096)
def _sizes(axis: Axis, partition: Partition) -> tuple[int, ...]:
    """How many steps of an axis each rank holds. Plans ask for the same ones many times over."""
    return tuple(interval.size for interval in axis.intervals(partition.shares))


def _local_size(spec: WeightSpec, partition: Partition, rank: int) -> int:
    """Elements of what `rank` holds; those of shards.local_shape."""
    whole = math.prod(spec.shape)
    if spec.split is None:
        return whole
    steps = _sizes(spec.split.axis, partition)[rank]  # type: ignore[arg-type]  # every axis is a frozen dataclass
    return whole // spec.shape[spec.dim] * spec.split.unit * steps


def rope_bytes(config: ModelConfig) -> Bytes:
    """Bytes of the frequencies for all intervals of layers, [num_layers + 1, num_layers + 1]: those of each different
    rotary embedding in it once."""
    total = np.zeros((config.num_hidden_layers + 1,) * 2, dtype=np.int64)
    for rope in dict.fromkeys(layer.rope for layer in config.layers):
        has_it = np.array([layer.rope == rope for layer in config.layers], dtype=np.int64)
        total += (sums_of_runs(has_it) > 0) * 4 * -(-_rotary_dim(config, rope) // 2)
    return total


def kv_bytes_per_layer(config: ModelConfig, partition: Partition, rank: int, *, dtype_bytes: int) -> int:
    """Bytes of one token in the cache of one layer on `rank`."""
    return 2 * _sizes(key_value_heads(config), partition)[rank] * config.head_dim * dtype_bytes


def context_tokens(demand: Demand) -> int:
    """Tokens of the longest sequence that a placement must have room for: max_seq_len, or if only a length of the model
    was set, that one."""
    if "max_model_len" in demand.fixed and "max_seq_len" not in demand.fixed:
        return demand.max_model_len
    return min(demand.max_seq_len, demand.max_model_len)


def asks_too_much(demand: Demand) -> bool:
    """Whether the user set longer sequences than max_model_len allows, which are then taken to be as long as that."""
    return "max_seq_len" in demand.fixed and demand.max_seq_len > demand.max_model_len


def demanded_tokens(demand: Demand) -> int:
    """Tokens, in whole blocks, that the cache must have room for."""
    return demand.max_batch_size * -(-context_tokens(demand) // demand.block_size) * demand.block_size


def forward_bytes(config: ModelConfig, partition: Partition, rank: int, demand: Demand) -> int:
    """Peak of the tensors that a step of `max_num_batched_tokens` keeps alive up to its last hidden states."""
    d, tokens, hidden = DTYPE_BYTES[demand.dtype], _step_tokens(demand), config.hidden_size
    queries = _sizes(query_heads(config), partition)[rank] * config.head_dim
    keys = _sizes(key_value_heads(config), partition)[rank] * config.head_dim
    columns = _sizes(Blocks(config.intermediate_size), partition)[rank]
    ropes = {layer.rope for layer in config.layers}
    angles = 2 * d * sum(_rotary_dim(config, rope) for rope in ropes)
    inputs = tokens * (3 * 8 + angles) + _mask_bytes(config, demand)
    norm = tokens * hidden * (8 if d == 4 else 8 + d)
    rotation = (5 if config.qk_norm else 3) * (queries + keys)
    gathered = 2 * 2 * keys * d * demand.max_batch_size * context_tokens(demand)
    attention = tokens * d * (hidden + 2 * queries + 3 * keys) + max(
        tokens * d * rotation, 3 * tokens * d * queries + gathered, tokens * d * (queries + hidden)
    )
    mlp = tokens * d * (2 * hidden + 3 * columns)
    return inputs + 2 * tokens * hidden * d + max(norm, attention, mlp)


def logits_bytes(config: ModelConfig, partition: Partition, rank: int, demand: Demand, *, kind: str) -> int:
    """Peak from the last hidden states to the tokens, for `max_num_seqs` rows, on a rank of the last stage. The first
    of them samples."""
    d, hidden, vocab = DTYPE_BYTES[demand.dtype], config.hidden_size, config.vocab_size
    rows = min(demand.max_num_seqs, _step_tokens(demand))
    shards = _sizes(Rows(vocab), partition)
    held = _step_tokens(demand) * hidden * d + rows * (hidden + shards[rank]) * d
    if rank > 0:
        return held + rows * max(shards) * d * (max(shards) > shards[rank])
    drawn = min(rows, max(1, SAMPLER_PART["cpu" if kind == "cpu" else "cuda"] // vocab))
    scored = min(rows, LOGPROB_ROWS) * vocab * LOGPROB_BYTES
    joined = rows * d * (vocab + len(shards) * max(shards)) if len(shards) > 1 else 0
    return held + max(
        joined + rows * vocab * 4, rows * vocab * 4 + max(drawn * (SAMPLER_BYTES * vocab + DIGITS_BYTES), scored)
    )


def hidden_bytes(config: ModelConfig, demand: Demand) -> int:
    """The hidden states of a step of `max_num_batched_tokens`."""
    return _step_tokens(demand) * config.hidden_size * DTYPE_BYTES[demand.dtype]


@dataclass(frozen=True, kw_only=True)
class VisionTower:
    """An image encoder that stays whole on the first device. `parameter_bytes`: all its weights."""

    parameter_bytes: int
    hidden_size: int
    intermediate_size: int
    patch_size: int


def vision_bytes(tower: VisionTower, demand: Demand) -> tuple[int, int]:
    """(weights, activations) of a tower: for `max_num_images` of `max_image_length` pixels each way, patches become
    tokens, each of which holds two hidden states, and at the fullest q, k, v and attention's output, or the MLP's."""
    patches = demand.max_num_images * (-(-demand.max_image_length // tower.patch_size)) ** 2
    widest = max(4 * tower.hidden_size, 2 * tower.intermediate_size)
    return tower.parameter_bytes, patches * (2 * tower.hidden_size + widest) * DTYPE_BYTES[demand.dtype]


def nccl_bytes(*, tp_size: int, world_size: int) -> int:
    """Buffers of the communicators of a GPU's rank: one of all ranks, and one of its group where that is smaller."""
    return NCCL_BYTES * ((world_size > 1) + (1 < tp_size < world_size))


def gloo_bytes(hosts: Sequence[int], rank: int, *, hidden_bytes: int) -> int:
    """What a CPU's rank holds to talk with its group, `hosts` being the numbers of consecutive ranks on each machine:
    its part of the memory that they share, and on the first of each machine a copy of every machine's part of a sum."""
    starts = [0, *accumulate(hosts)]
    host = bisect_right(starts, rank) - 1
    shared = SEGMENT_HEADER_BYTES + 2 * hosts[host] * SLOT_BYTES if hosts[host] > 1 else 0
    wire = len(hosts) * hidden_bytes if len(hosts) > 1 and rank == starts[host] else 0
    return -(-shared // hosts[host]) + wire


def overhead_bytes(kind: str) -> int:
    """What one process needs on a device before it holds any tensor."""
    by_kind: Mapping[str, int] = {"cuda": CUDA_CONTEXT_BYTES + CUDA_WORKSPACE_BYTES, "cpu": PROCESS_BYTES, "disk": 0}
    return by_kind[kind]


def _step_tokens(demand: Demand) -> int:
    return demand.max_num_batched_tokens


def _mask_bytes(config: ModelConfig, demand: Demand) -> int:
    """Masks of the prompts' chunks in one step, one for each different window, and what making one takes."""
    context, sequences = context_tokens(demand), demand.max_batch_size
    largest = min(_step_tokens(demand) * context, max(MAX_MASK_ELEMENTS, context))
    together = min(_step_tokens(demand) * context, sequences * largest)
    windows = len({layer.sliding_window for layer in config.layers})
    return windows * together * DTYPE_BYTES[demand.dtype] + 2 * largest


def _rotary_dim(config: ModelConfig, rope: RopeConfig) -> int:
    return int(config.head_dim * rope.partial_rotary_factor)


def sums_of_runs(values: NDArray[Number]) -> NDArray[Number]:
    """[n + 1, n + 1]: the sum of values[start:stop] where start <= stop, and 0 elsewhere."""
    sums = np.zeros(len(values) + 1, dtype=values.dtype)
    np.cumsum(values, out=sums[1:])
    return np.triu(sums[None, :] - sums[:, None])
