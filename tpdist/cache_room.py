"""How many blocks of the KV cache a rank's devices have room for, now that the weights are in place.

The planner predicts the same by the same rules (plan/memory.py). On GPUs and in one process the lesser of the two
counts, on CPU ranks what is measured here.
"""

from collections.abc import Iterator

import torch

from tpdist.control.messages import Assign
from tpdist.engine.kv_cache import CacheShapes, bytes_per_token, num_blocks_that_fit
from tpdist.models.decoder import Decoder
from tpdist.plan.memory import cpu_cache_budget, cuda_usable_bytes, is_planned
from tpdist.preflight import cgroup


def blocks_with_room(model: Decoder, assign: Assign) -> int:
    """The most blocks for which every device of this rank has room, or that are planned with other reserves. Raises
    PlanError if it is not even one."""
    settings = assign.settings
    if assign.own_reserves:
        return assign.most_blocks
    blocks = [
        num_blocks_that_fit(
            budget_bytes=budget_bytes,
            bytes_per_token=bytes_per_token(shapes, dtype=getattr(torch, settings["dtype"])),
            block_size=settings["block_size"],
            max_num_seqs=settings["max_num_seqs"],
            max_model_len=assign.max_model_len,
        )
        for budget_bytes, shapes in _budgets(model, assign)
    ]
    planned = is_planned(device=settings["device"], one_process=bool(assign.item_devices))
    return min([*blocks, assign.most_blocks] if planned else blocks)


def _budgets(model: Decoder, assign: Assign) -> Iterator[tuple[int, CacheShapes]]:
    """Bytes, and the layers whose caches share them: all, if the user set the bytes, else those of each device."""
    shapes, devices = model.cache_shapes(), model.cache_devices()
    asked: int | None = assign.settings["kv_cache_memory_bytes"]
    if asked is not None:
        yield asked, shapes
        return
    for device in dict.fromkeys(devices):
        yield _budget(device, assign), [shape for shape, at in zip(shapes, devices, strict=True) if at == device]


def _budget(device: torch.device, assign: Assign) -> int:
    """Bytes for this rank's cache on one device, from what is free on it now."""
    if device.type != "cuda":
        return cpu_cache_budget(cgroup.memory().available_bytes, local_ranks=assign.local_world_size)
    free, total = torch.cuda.mem_get_info(device)
    usable = cuda_usable_bytes(
        free_bytes=free, total_bytes=total, gpu_memory_utilization=assign.settings["gpu_memory_utilization"]
    )
    return usable // -(-assign.local_world_size // torch.cuda.device_count())
