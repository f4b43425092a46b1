"""Memory of the paged KV cache of one rank: how many blocks fit a budget, and the tensors themselves.

A layer has one tensor per cached thing (key and value), each [num_blocks, block_size, *shape_per_token]. It knows
neither which sequence holds a block nor what attention does with it.

Blocks start as zeros: attention multiplies masked positions by a weight of 0, and garbage could be NaN there.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpdist.errors import PlanError

CacheShapes = Sequence[Sequence[tuple[int, ...]]]
"""Per layer, per cached tensor: its shape for one token on this rank."""


@dataclass(frozen=True)
class KVCache:
    layers: tuple[tuple[Tensor, ...], ...]
    num_blocks: int
    block_size: int


def bytes_per_token(shapes: CacheShapes, *, dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for layer in shapes for shape in layer) * dtype.itemsize


def num_blocks_that_fit(
    *, budget_bytes: int, bytes_per_token: int, block_size: int, max_num_seqs: int, max_model_len: int
) -> int:
    """Blocks for `budget_bytes`, at most as many as `max_num_seqs` sequences of full length can use.

    Raises PlanError if not even one block fits.
    """
    block_bytes = bytes_per_token * block_size
    useful = max_num_seqs * -(-max_model_len // block_size)
    if block_bytes > budget_bytes:
        raise PlanError(
            f"the KV cache may take {max(budget_bytes, 0):,} bytes on this rank, but one block of {block_size} tokens "
            f"takes {block_bytes:,}; use a larger --kv-cache-memory-bytes or --gpu-memory-utilization, or more ranks"
        )
    return min(budget_bytes // block_bytes, useful) if block_bytes else useful


def allocate(
    shapes: CacheShapes,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | Sequence[torch.device],
) -> KVCache:
    """Allocate the cache of all layers of this rank, on one device or on one for each layer. On a CPU, blocks that are
    never used take no memory."""
    devices = [device] * len(shapes) if isinstance(device, torch.device) else device
    layers = tuple(
        tuple(_zeros((num_blocks, block_size, *shape), dtype=dtype, device=place) for shape in layer)
        for layer, place in zip(shapes, devices, strict=True)
    )
    return KVCache(layers=layers, num_blocks=num_blocks, block_size=block_size)


def _zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros writes to every page; an anonymous mapping is zero without that, page by page on first use."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
