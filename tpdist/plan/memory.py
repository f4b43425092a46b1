"""How many bytes a rank needs, from shapes alone: its weights, and its key-value cache per token; and the rules by
which a rank sizes its cache.

Knows no device and nothing of what a step needs besides.
"""

import math
from collections.abc import Mapping

from tpdist.plan.model_config import ModelConfig
from tpdist.plan.shards import Partition, Weights, key_value_heads, local_shape

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

DEFAULT_CPU_CACHE_BYTES = 4 * 1024**3
"""The most that the caches of a machine's ranks take together of its memory where nobody says how much."""


def weight_bytes(weights: Weights, partition: Partition, rank: int, *, dtype_bytes: int) -> int:
    """Bytes of all parameters that `rank` holds, at `dtype_bytes` per element."""
    return dtype_bytes * sum(math.prod(local_shape(spec, partition, rank)) for spec in weights.specs)


def cache_shapes(config: ModelConfig, partition: Partition, rank: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Per layer, the shape per token of each tensor of its cache on `rank`: keys, values."""
    heads = partition.interval(key_value_heads(config), rank).size
    return (((heads, config.head_dim), (heads, config.head_dim)),) * config.num_hidden_layers


def kv_bytes_per_token(config: ModelConfig, partition: Partition, rank: int, *, dtype_bytes: int) -> int:
    """Bytes that one token of one sequence takes in the caches of all layers on `rank`."""
    shapes = cache_shapes(config, partition, rank)
    return dtype_bytes * sum(math.prod(shape) for layer in shapes for shape in layer)


def cuda_usable_bytes(*, free_bytes: int, total_bytes: int, gpu_memory_utilization: float) -> int:
    """What may be used of a GPU: what is free but for the part of the whole that is left to others."""
    return max(0, int(free_bytes - (1 - gpu_memory_utilization) * total_bytes))


def is_planned(*, device: str, one_process: bool) -> bool:
    """Whether the plan knows better than a rank that measures what is free: it keeps room for activations, which a GPU
    needs, and for what the user allowed each device of one process."""
    return one_process or device == "cuda"


def cpu_cache_budget(available_bytes: int, *, local_ranks: int) -> int:
    """Bytes for the cache of each of a machine's ranks, from what is available once all have their weights."""
    return min(DEFAULT_CPU_CACHE_BYTES, max(0, available_bytes) // 4) // local_ranks


def cache_blocks(budget_bytes: int, *, block_bytes: int, block_size: int, max_num_seqs: int, max_model_len: int) -> int:
    """Blocks for `budget_bytes`, at most as many as `max_num_seqs` sequences of full length can use; may be 0."""
    useful = max_num_seqs * -(-max_model_len // block_size)
    return min(max(0, budget_bytes) // block_bytes, useful) if block_bytes else useful
