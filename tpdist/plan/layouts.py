"""Which tensor-parallel sizes and numbers of stages there are for some ranks, and how a stage's ranks share its model.

Knows no bytes but the devices' own.
"""

import math
from collections.abc import Sequence

from tpdist.errors import JoinError, PlanError
from tpdist.plan.costs import nccl_bytes, overhead_bytes
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.placement import Demand, Device
from tpdist.plan.places import usable_bytes
from tpdist.plan.shards import Partition, check_shardable, key_value_heads, query_heads

Shares = tuple[tuple[int, ...], ...]
"""The tensor-parallel weights of each stage's ranks."""

SHARE_STEPS = (8, 64, 4096)
"""How finely memory is turned into shares, coarse and readable first: the largest device has so many."""

NEARLY_EQUAL = 0.98


def factorisations(world_size: int) -> list[tuple[int, int]]:
    """All (tensor-parallel size, stages), the fewest stages first."""
    return [(world_size // stages, stages) for stages in range(1, world_size + 1) if world_size % stages == 0]


def sizes(
    config: ModelConfig, world_size: int, *, tp_size: int | None, pp_size: int | None
) -> tuple[int, int, tuple[str, ...]]:
    """(tensor-parallel size, stages, notes): as asked for; where only one is, the other follows; else the fewest stages
    with which tensor parallelism is possible. Raises JoinError if sizes and ranks do not go together, PlanError if the
    model cannot be cut so."""
    if tp_size is None and pp_size is None:
        return _default(config, world_size)
    if (pp_size or 1) > world_size:
        raise JoinError(
            f"{pp_size} pipeline stages need at least as many ranks, but the nodes have {world_size}; change "
            "--pipeline-parallel-size or the nodes' LOCAL_WORLD_SIZE"
        )
    stages = pp_size or max(1, world_size // (tp_size or 1))
    tp_size = tp_size or world_size // stages
    if tp_size * stages != world_size:
        raise JoinError(
            f"tensor_parallel_size={tp_size} times {stages} stages needs {tp_size * stages} ranks, "
            f"but the nodes have {world_size}; change --tensor-parallel-size or the nodes' LOCAL_WORLD_SIZE"
        )
    check_shardable(config, Partition.even(tp_size))
    if reason := problem(config, tp_size, stages):
        raise PlanError(f"{config.architecture} cannot be cut so: {reason}")
    return tp_size, stages, ()


def problem(config: ModelConfig, tp_size: int, pp_size: int) -> str | None:
    """Why the model cannot be cut so, if it cannot."""
    limits = (
        (config.num_attention_heads, "query heads"),
        (config.intermediate_size, "columns of the MLP"),
        (config.vocab_size, "vocabulary rows"),
    )
    for limit, what in limits:
        if tp_size > limit:
            return f"tensor-parallel size {tp_size} is more than {limit} {what}"
    if pp_size > config.num_hidden_layers:
        return f"{pp_size} stages are more than {config.num_hidden_layers} layers"
    try:
        for axis in (query_heads(config), key_value_heads(config)):
            axis.intervals((1,) * tp_size)
    except PlanError:
        return (
            f"tensor-parallel size {tp_size} cannot share {config.num_attention_heads} query heads in "
            f"{config.num_key_value_heads} groups"
        )
    return None


def stage_shares(given: tuple[int, ...] | None, *, tp_size: int, pp_size: int, asked: bool) -> Shares:
    """Shares that the user gave, or even ones: one for each rank of a stage, the same for all stages, or one for each
    rank of all. Raises PlanError for another number; for a layout that was not `asked` for they are even then."""
    if given is None:
        return ((1,) * tp_size,) * pp_size
    if len(given) == tp_size:
        return (given,) * pp_size
    if len(given) == tp_size * pp_size:
        return tuple(given[start : start + tp_size] for start in range(0, len(given), tp_size))
    if asked:
        expected = f"{tp_size}" if pp_size == 1 else f"{tp_size} (the same for each stage) or {tp_size * pp_size}"
        raise PlanError(f"{len(given)} shares ({', '.join(map(str, given))}) were given, but it takes {expected}")
    return ((1,) * tp_size,) * pp_size


def shares_by_memory(devices: Sequence[Device], demand: Demand, *, tp_size: int) -> list[Shares]:
    """Shares in proportion to what each device has for a model: readable ones first, then more exact ones, to be tried
    in turn."""
    stages = [devices[start : start + tp_size] for start in range(0, len(devices), tp_size)]
    rooms = [[_room(device, demand, tp_size, len(devices)) for device in stage] for stage in stages]
    options = [tuple(proportions(room, steps=steps) for room in rooms) for steps in SHARE_STEPS]
    return list(dict.fromkeys(options))


def _room(device: Device, demand: Demand, tp_size: int, world_size: int) -> int:
    """What may be used of a device, less what a rank needs on it whatever its share."""
    buffers = nccl_bytes(tp_size=tp_size, world_size=world_size) if device.kind == "cuda" else 0
    return max(1, usable_bytes(device, demand) - overhead_bytes(device.kind) - buffers)


def proportions(amounts: Sequence[int], *, steps: int) -> tuple[int, ...]:
    """Small whole numbers in proportion to `amounts`, the largest at most `steps`; equal ones for nearly equal ones."""
    largest = max(amounts)
    if min(amounts) >= NEARLY_EQUAL * largest:
        return (1,) * len(amounts)
    counts = [max(1, round(amount * steps / largest)) for amount in amounts]
    divisor = math.gcd(*counts)
    return tuple(count // divisor for count in counts)


def _default(config: ModelConfig, world_size: int) -> tuple[int, int, tuple[str, ...]]:
    for tp_size, pp_size in factorisations(world_size):
        if problem(config, tp_size, pp_size) is None:
            return tp_size, pp_size, () if pp_size == 1 else (_why(config, world_size, tp_size, pp_size),)
    reasons = [problem(config, tp_size, pp_size) for tp_size, pp_size in factorisations(world_size)]
    raise PlanError(
        f"{config.architecture} cannot be cut for {world_size} ranks: {'; '.join(filter(None, reasons))}. "
        f"Use {_possible_below(config, world_size)} ranks"
    )


def _why(config: ModelConfig, world_size: int, tp_size: int, pp_size: int) -> str:
    heads = f"{world_size} ranks and {config.num_attention_heads} query heads: {pp_size} stages of {tp_size}"
    return f"{heads}, since {problem(config, world_size, 1)}"


def _possible_below(config: ModelConfig, world_size: int) -> int:
    """The largest smaller number of ranks that can share the model; 1 always can."""
    for fewer in range(world_size - 1, 1, -1):
        if any(problem(config, tp_size, pp_size) is None for tp_size, pp_size in factorisations(fewer)):
            return fewer
    return 1
