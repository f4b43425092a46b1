"""The best cut of a layout whose caches follow a rule that depends on the cut itself.

A table tells of each run of layers by itself whether it fits. Two rules for the caches of ranks are not of that kind:

    kv_cache_memory_bytes   all ranks have the same number of blocks, as many as the stage with most of the cache per
                            token can have of the bytes that were asked for; the others need room for as many
    CPUs                    the ranks of a machine share a part of what their weights leave of it

The first is solved exactly: the number of blocks takes at most one value for each number of layers, and with it a table
tells all. Of the second a table tells what each run needs at least, whatever the other runs of its machine are: exactly
where each machine has ranks of one stage only. Elsewhere cuts are tried in turn, the best first, until the rule holds
for one, or until none is left, or until there were MAX_TRIED; only then may a cut that fits be missed.
"""

import heapq
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import count, groupby

import numpy as np
from numpy.typing import NDArray

from tpdist.plan.costs import demanded_tokens
from tpdist.plan.memory import DEFAULT_CPU_CACHE_BYTES, cache_blocks
from tpdist.plan.placement import Demand
from tpdist.plan.places import Layout
from tpdist.plan.search import Costs, Found

MAX_TRIED = 256
"""Searches for cuts that the rule for CPUs may take."""

Rank = tuple[float, ...]
"""What cuts are compared by; less is better."""

NEVER: Rank = (np.inf,)


NEARLY = 1 + 1e-9
"""Sums of seconds that are added in another order differ by less than this."""


@dataclass(frozen=True)
class Tried:
    """A cut that a search found. `bound`: what it is by the tables of the search, which no other of its cuts is below.
    `rank`: what it is by the rule, at least `bound`, or NEVER."""

    found: Found
    bound: Rank
    rank: Rank


@dataclass(frozen=True)
class Goal:
    """What is sought. `search` takes what runs overflow by, and which may be taken, and gives the best cut. `values`:
    what that goes by, of which a cut's largest counts, or their sum. `only_fitting`: whether only cuts count that
    fit."""

    search: Callable[[Costs, NDArray[np.bool_]], Tried | None]
    values: Callable[[Costs], Costs]
    largest: bool
    only_fitting: bool


def overflow_of_runs(layout: Layout, demand: Demand) -> Costs:
    """By how much runs exceed what there is, as far as that does not depend on the cut. In one process
    kv_cache_memory_bytes are for all devices together, which is as many blocks wherever layers are."""
    asked = demand.kv_cache_memory_bytes
    if layout.mode == "ranks" or asked is None:
        return layout.overflow(demand)
    sizes = _block_bytes(layout, demand)
    whole_bytes = int(sizes.max())
    blocks = _num_blocks(whole_bytes, demand)
    lacking = (demanded_tokens(demand) / demand.block_size - asked / whole_bytes) * sizes
    made: Costs = np.maximum(layout.overflow(demand, tokens=blocks * demand.block_size), lacking)
    return made


def best_by_blocks(layout: Layout, demand: Demand, goal: Goal) -> Tried | None:
    """The best cut with kv_cache_memory_bytes.

    The largest block of any cut is first taken for that of the best one. If what is found so has smaller blocks, and
    so more of them than there is room for, it is worked out what each range of block sizes can come to at least, and
    the best cut is searched in those that come to least.
    """
    sizes = _block_bytes(layout, demand)
    ranges = _worth_trying(layout, sizes, demand, goal)
    if not ranges:
        return None
    if goal.only_fitting:
        made = goal.search(layout.overflow(demand, tokens=ranges[0].tokens), sizes <= ranges[0].most)
        if made is None or made.rank == made.bound:
            return made
    least: list[tuple[float, _BlockRange, list[int]]] = []
    best = np.inf
    for each in ranges:
        values = goal.values(layout.overflow(demand, tokens=each.tokens))
        through = _least_with_each(np.where(sizes <= each.most, values, np.inf), largest=goal.largest)
        if goal.only_fitting and through.min() > best * NEARLY:
            break  # with fewer layers on the fullest stage there are more blocks and fewer cuts
        if not goal.only_fitting and each.lacking > best * NEARLY:
            break
        by_place = np.where(sizes >= each.least, through, np.inf).min(axis=(1, 2))
        best = min(best, float(by_place.min()))
        places = np.flatnonzero((by_place < np.inf) & (by_place <= best * NEARLY)).tolist()
        least.append((float(by_place.min()), each, places))
    tried = [
        made
        for value, each, places in least
        if value <= best * NEARLY
        for place in places
        if (made := _with_block_on(place, each, layout, demand, sizes, goal)) is not None
    ]
    return min(tried, key=lambda each: each.rank, default=None)


def _with_block_on(
    place: int, wanted: "_BlockRange", layout: Layout, demand: Demand, sizes: Costs, goal: Goal
) -> Tried | None:
    """The best cut of which `place` has a block of the range, and no other place a larger one."""
    allowed = sizes <= wanted.most
    allowed[place] &= sizes[place] >= wanted.least
    return goal.search(layout.overflow(demand, tokens=wanted.tokens), allowed)


@dataclass(frozen=True)
class _BlockRange:
    """Bytes of a block on the fullest rank with which the cache has `tokens`. `lacking`: what runs with such a block
    lack at least."""

    least: float
    most: float
    tokens: int
    lacking: float


def _worth_trying(layout: Layout, sizes: Costs, demand: Demand, goal: Goal) -> list[_BlockRange]:
    """If only cuts count that fit, those with which some run fits, the largest blocks first; else all, the ones that
    lack least first."""
    overflow = layout.overflow(demand)
    least_token = min(min(layout.layer_token_bytes(place, demand)) for place in layout.places)
    num_layers = layout.model.num_layers
    by_size = [
        min(float(np.diagonal(overflow[place], size).min()) for place in range(len(overflow)))
        for size in range(1, num_layers + 1)
    ]
    made = []
    for least, most, tokens in _block_ranges(sizes, demand):
        fewest = [int(least // sizes[place, 0, 1]) for place in range(len(sizes))]
        more = (tokens - demanded_tokens(demand)) * least_token
        first, last = max(1, min(fewest)), min(num_layers, int(most // sizes[:, 0, 1].min()))
        lacking = min(by_size[size - 1] + size * more for size in range(first, last + 1))
        made.append(_BlockRange(least, most, tokens, max(0.0, lacking)))
    if goal.only_fitting:
        return [each for each in made if each.lacking == 0]
    return sorted(made, key=lambda each: each.lacking)


def _block_bytes(layout: Layout, demand: Demand) -> Costs:
    """[num_places, num_layers + 1, num_layers + 1]: of a block on the rank of a place that has most of it."""
    steps = np.arange(layout.model.num_layers + 1)
    num_layers = np.maximum(steps[None, :] - steps[:, None], 0)
    most = [max(layout.layer_token_bytes(place, demand)) * demand.block_size for place in layout.places]
    made: Costs = np.array(most, dtype=np.float64)[:, None, None] * num_layers
    return made


def _block_ranges(sizes: Costs, demand: Demand) -> Iterator[tuple[float, float, int]]:
    """(least bytes, most bytes, tokens of the cache) for blocks of the fullest rank, the largest first."""
    num_places, num_layers = len(sizes), sizes.shape[1] - 1
    for num_blocks, group in groupby(
        reversed(np.unique(sizes[:, 0, 1 : num_layers - num_places + 2]).tolist()),
        key=lambda block_bytes: _num_blocks(int(block_bytes), demand),
    ):
        alike = list(group)
        yield alike[-1], alike[0], num_blocks * demand.block_size


def _num_blocks(block_bytes: int, demand: Demand) -> int:
    assert demand.kv_cache_memory_bytes is not None
    blocks = cache_blocks(
        demand.kv_cache_memory_bytes,
        block_bytes=block_bytes,
        block_size=demand.block_size,
        max_num_seqs=demand.max_num_seqs,
        max_model_len=demand.max_model_len,
    )
    return max(blocks, demanded_tokens(demand) // demand.block_size)


class MachineRule:
    """What the rule for CPUs asks of the ranks of each machine."""

    def __init__(self, layout: Layout, demand: Demand) -> None:
        self._local_ranks = layout.local_ranks
        self._demanded = demanded_tokens(demand)
        self._free: dict[str, int] = {}
        self._held: dict[str, dict[int, Costs]] = {}
        self._layer_bytes: dict[str, dict[int, int]] = {}
        tables: dict[Hashable, Costs] = {}
        for index, place in enumerate(layout.places):
            for rank, layer_bytes in enumerate(layout.layer_token_bytes(place, demand)):
                node, key = place.devices[rank].node, (place.partition.shares, rank, place.hosts)
                if key not in tables:
                    tables[key] = layout.held_bytes(place, rank, demand)
                self._free[node] = self._free.get(node, 0) + place.devices[rank].free_bytes
                held = self._held.setdefault(node, {})
                held[index] = held[index] + tables[key] if index in held else tables[key]
                most = self._layer_bytes.setdefault(node, {})
                most[index] = max(most.get(index, 0), layer_bytes)

    def overflow(self, allowed: NDArray[np.bool_]) -> Costs:
        """By how much a run at least exceeds what its caches may take, if the others are of those `allowed`."""
        worst = np.full(allowed.shape, -np.inf)
        steps = np.arange(allowed.shape[1])
        tokens = np.maximum(steps[None, :] - steps[:, None], 0) * float(self._demanded)
        fullest: dict[tuple[int, int, int, int], Costs] = {}
        for node, held in self._held.items():
            for place, least in _least_held(held, allowed).items():
                alike = (place, self._free[node], self._local_ranks[node], self._layer_bytes[node][place])
                fullest[alike] = np.maximum(fullest[alike], least) if alike in fullest else least
        for (place, free, local_ranks, layer_bytes), least in fullest.items():
            left = np.maximum(free - least, 0)
            rule = np.minimum(DEFAULT_CPU_CACHE_BYTES, left // 4) // local_ranks
            np.maximum(worst[place], tokens * layer_bytes - rule, out=worst[place])
        return worst


def _least_held(held: dict[int, Costs], allowed: NDArray[np.bool_]) -> dict[int, Costs]:
    """By place of a machine and run, the least that all its ranks hold if one place has this run."""
    if len(held) == 1:
        return held
    costs = np.where(allowed, 0.0, np.inf)
    for place, table in held.items():
        costs[place] += table
    least = _least_with_each(costs)
    return {place: least[place] for place in held}


def _least_with_each(costs: Costs, *, largest: bool = False) -> Costs:
    """By place and run, the least that the sum, or the largest, of a cut's costs can be that has this run, each place
    having one; infinity where there is none."""
    num_places, size = costs.shape[:2]
    combined: np.ufunc = np.maximum if largest else np.add
    costs = np.where(np.tri(size, dtype=bool), np.inf, costs)
    before = np.full((num_places + 1, size), np.inf)
    behind = before.copy()
    before[0, 0] = behind[num_places, size - 1] = 0
    for place in range(num_places):
        before[place + 1] = combined(before[place][:, None], costs[place]).min(axis=0)
    for place in reversed(range(num_places)):
        behind[place] = combined(costs[place], behind[place + 1]).min(axis=1)
    made: Costs = combined(combined(before[:-1, :, None], costs), behind[1:, None, :])
    return made


def best_by_machine(allowed: NDArray[np.bool_], search: Callable[[NDArray[np.bool_]], Tried | None]) -> Tried | None:
    """The best cut of runs that are `allowed`, with the rule for CPUs, as far as MAX_TRIED searches tell. `search`
    takes which runs may be taken; each place must have one.

    Of the cuts beside one that was found, some differ on the first place, others are the same there and differ on the
    second, and so on: each of these is searched by itself (Lawler, https://doi.org/10.1287/mnsc.18.7.401).
    """
    best, numbers = None, count()
    waiting: list[tuple[Rank, int, Tried, NDArray[np.bool_], int]] = []

    def add(allowed: NDArray[np.bool_], num_same: int) -> None:
        made = search(allowed)
        number = next(numbers)
        if made is not None:
            heapq.heappush(waiting, (made.bound, number, made, allowed, num_same))

    add(allowed, 0)
    while waiting:
        bound, number, made, allowed, num_same = heapq.heappop(waiting)
        if best is None or made.rank < best.rank:
            best = made
        if best.rank <= bound or number >= MAX_TRIED:
            break
        for place, others in enumerate(_beside(made.found, allowed)):
            if place >= num_same:
                add(others, place)
    return best if best is not None and best.rank < NEVER else None


def _beside(found: Found, allowed: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
    """By place, all but the last: what is allowed to the cuts that are as `found` before it, and differ there."""
    same, start = allowed.copy(), 0
    for place, size in enumerate(found.counts[:-1]):
        others = same.copy()
        others[place, start, start + size] = False
        yield others
        same[place] = False
        same[place, start, start + size] = True
        start += size
