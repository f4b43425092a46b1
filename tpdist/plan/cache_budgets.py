"""What each device may give to the cache, by the rules that a rank follows when it makes its own (cache_room.py), how
many blocks that is, and what devices lack for the demand.

The devices and their layers are given; nothing is searched here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tpdist.plan.costs import demanded_tokens, overhead_bytes
from tpdist.plan.memory import cache_blocks, cpu_cache_budget
from tpdist.plan.placement import Demand
from tpdist.plan.places import Layout, Need, usable_bytes


@dataclass(frozen=True)
class Cache:
    """`budgets`: by device, bytes that its part may take. `shortfalls`: what each device lacks for its weights and the
    demanded tokens, or for the blocks that there will be; not above 0 if it fits."""

    num_blocks: int
    budgets: tuple[int, ...]
    shortfalls: tuple[int, ...]


def cache_of(layout: Layout, needs: Sequence[Need], demand: Demand) -> Cache:
    """The cache of the layers that `needs` stand for."""
    host = _host(layout, needs, demand)
    budgets = _budgets(layout, needs, host, demand)
    num_blocks, shortfalls = _cache(needs, budgets, host, demand)
    return Cache(num_blocks, budgets, shortfalls)


@dataclass(frozen=True)
class _Host:
    """What the memory of a machine has for the caches of one process' layers that are computed in it, `token_bytes` of
    them for a token: the room that is left, and what the rule for CPUs allows of it."""

    room_bytes: int
    rule_bytes: int
    token_bytes: int

    def part_of(self, num_bytes: int, need: Need) -> int:
        """Of bytes for all these layers, those of one device."""
        return num_bytes * need.token_bytes // self.token_bytes


def _host(layout: Layout, needs: Sequence[Need], demand: Demand) -> _Host | None:
    inside = [need for need in needs if need.device.kind != "cuda"]
    if layout.mode == "ranks" or layout.host is None or not inside:
        return None
    held = overhead_bytes("cpu") + sum(need.weight_bytes for need in inside if need.device.kind == "cpu")
    streamed = layout.stream_bytes(demand) if any(need.device.kind == "disk" for need in inside) else 0
    used = held + streamed + max(need.activation_bytes for need in inside)
    return _Host(
        room_bytes=usable_bytes(layout.host, demand) - used - sum(need.communication_bytes for need in inside),
        rule_bytes=cpu_cache_budget(layout.host.free_bytes - held, local_ranks=1),
        token_bytes=sum(need.token_bytes for need in inside),
    )


def _budgets(layout: Layout, needs: Sequence[Need], host: _Host | None, demand: Demand) -> tuple[int, ...]:
    """Bytes for the cache on each device, by the rules that a rank follows (cache_room.py)."""
    asked = demand.kv_cache_memory_bytes
    if asked is not None and layout.mode == "ranks":
        return (asked,) * len(needs)
    if asked is not None:
        # One process' cache lies on several devices, on each in proportion to its layers.
        total = sum(need.token_bytes for need in needs)
        return tuple(asked * need.token_bytes // total for need in needs)
    if host is not None:
        allowed = max(0, min(host.room_bytes, host.rule_bytes))
        return tuple(need.room_bytes if need.device.kind == "cuda" else host.part_of(allowed, need) for need in needs)
    by_rule = _cpu_budgets(layout, needs)
    return tuple(min(need.room_bytes, by_rule.get(need.device.node, need.room_bytes)) for need in needs)


def _cpu_budgets(layout: Layout, needs: Sequence[Need]) -> dict[str, int]:
    """By node, what the rule for CPUs gives each of its ranks, from what their weights and processes leave."""
    if not only_cpus(layout):
        return {}
    available: dict[str, int] = {}
    for need in needs:
        left = need.device.free_bytes - need.weight_bytes - need.overhead_bytes - need.communication_bytes
        available[need.device.node] = available.get(need.device.node, 0) + left
    return {node: cpu_cache_budget(left, local_ranks=layout.local_ranks[node]) for node, left in available.items()}


def _cache(
    needs: Sequence[Need], budgets: Sequence[int], host: _Host | None, demand: Demand
) -> tuple[int, tuple[int, ...]]:
    """How many blocks all devices can hold, and what each device lacks."""
    blocks = min(
        cache_blocks(
            budget,
            block_bytes=need.token_bytes * demand.block_size,
            block_size=demand.block_size,
            max_num_seqs=demand.max_num_seqs,
            max_model_len=demand.max_model_len,
        )
        for need, budget in zip(needs, budgets, strict=True)
    )
    demanded = demanded_tokens(demand)
    tokens = max(demanded, blocks * demand.block_size)
    lacking = []
    for need, budget in zip(needs, budgets, strict=True):
        room = need.room_bytes if host is None or need.device.kind == "cuda" else host.part_of(host.room_bytes, need)
        lacking.append(max(tokens * need.token_bytes - room, demanded * need.token_bytes - budget))
        if need.device.kind == "disk":
            lacking[-1] = max(lacking[-1], need.weight_bytes - need.usable_bytes)
    return blocks, tuple(lacking)


def only_cpus(layout: Layout) -> bool:
    """Whether the ranks are on CPUs, so that a rule limits their caches."""
    return all(device.kind == "cpu" for place in layout.places for device in place.devices)
