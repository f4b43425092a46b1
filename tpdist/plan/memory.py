"""How many bytes a rank needs, from shapes alone: its weights, and its key-value cache per token.

Knows no device and nothing of what a step needs besides.
"""

import math
from collections.abc import Mapping

from tpdist.plan.model_config import ModelConfig
from tpdist.plan.shards import Partition, Weights, key_value_heads, local_shape

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


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
