"""Whether and how a model fits a layout: the best cut of its layers, and the cache that there is room for.

The demand is taken as it is; what shrinks of it where nothing fits is said in shrinking.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tpdist.plan.costs import demanded_tokens
from tpdist.plan.memory import cache_blocks, cpu_cache_budget
from tpdist.plan.placement import Demand, Objective
from tpdist.plan.places import Layout, Need
from tpdist.plan.search import (
    Costs,
    Found,
    fits_in_any_order,
    fits_in_order,
    split_in_any_order,
    split_in_order,
)
from tpdist.plan.shards import Interval


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A cut of the layers with all its bytes. By device: `budgets`, what its cache may take, and `shortfalls`, what it
    lacks; not above 0 if it fits."""

    layout: Layout
    demand: Demand
    found: Found
    needs: tuple[Need, ...]
    num_blocks: int
    budgets: tuple[int, ...]
    shortfalls: tuple[int, ...]

    @property
    def shortfall_bytes(self) -> int:
        return max(0, *self.shortfalls)

    @property
    def worst(self) -> Need:
        """The device that lacks most, the first of several."""
        return self.needs[self.shortfalls.index(max(self.shortfalls))]

    @property
    def worst_budget(self) -> int:
        """What the cache may take on it."""
        return self.budgets[self.shortfalls.index(max(self.shortfalls))]

    @property
    def latency_s(self) -> float:
        return self.found.total + self.layout.return_s(self.found.places, self.demand)

    @property
    def slowest_stage_s(self) -> float:
        return self.found.slowest

    def seconds(self, objective: Objective) -> float:
        return self.latency_s if objective == "latency" else self.slowest_stage_s

    def cache_bytes(self, need: Need) -> int:
        return self.num_blocks * self.demand.block_size * need.token_bytes


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A layout, and which cuts of it are allowed: one, given by `fixed` (places and their numbers of layers); or in
    mode `ranks` all in the order of the places; or in mode `devices` all in any order that leaves `num_last` places
    last, and where `classes` is None in the order of the places."""

    layout: Layout
    objective: Objective
    fixed: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    classes: tuple[int, ...] | None = None
    num_last: int = 0

    def fit(self, demand: Demand) -> Fit | None:
        """The best cut that fits; None if there is none."""
        found = self._best(demand)
        if found is None:
            return None
        fit = self.settle(found, demand)
        if fit.shortfall_bytes and demand.kv_cache_memory_bytes is not None:
            # The cache is larger than what is demanded of it, and how large depends on the cut.
            found = self._best(demand, tokens=fit.num_blocks * demand.block_size)
            fit = fit if found is None else self.settle(found, demand)
        return fit if fit.shortfall_bytes == 0 else None

    def closest(self, demand: Demand) -> Fit:
        """The best cut of those that fit, or else the one of which the fullest device lacks least."""
        found = self._best(demand)
        if found is None:
            overflow = np.maximum(self.layout.overflow(demand), 0).astype(np.float64)
            found = self._search(overflow, np.zeros((len(overflow),) * 2), objective="throughput")
            assert found is not None, "every layout has a cut if memory does not matter"
        return self.settle(found, demand)

    def settle(self, found: Found, demand: Demand) -> Fit:
        """A cut with its bytes, and its times whatever it was found for."""
        stops = np.cumsum(found.counts)
        runs = [Interval(int(stop) - count, int(stop)) for stop, count in zip(stops, found.counts, strict=True)]
        needs = tuple(
            self.layout.need(place, rank, layers, stage=stage, demand=demand)
            for stage, (place, layers) in enumerate(zip(found.places, runs, strict=True))
            for rank in range(len(self.layout.places[place].devices))
        )
        budgets = _budgets(self.layout, needs, demand)
        num_blocks, shortfalls = _cache(needs, budgets, demand)
        timed = _timed(found, runs, self.layout.seconds(demand), self.layout.transfers(demand))
        return Fit(
            layout=self.layout,
            demand=demand,
            found=timed,
            needs=needs,
            num_blocks=num_blocks,
            budgets=budgets,
            shortfalls=shortfalls,
        )

    def may_fit(self, demand: Demand, *, tokens: int = 0) -> bool:
        """Whether a cut fits, as far as the room decides: without a search for the best."""
        return self._any_fits(self.layout.overflow(demand, tokens=tokens) <= 0)

    def room_decides(self, demand: Demand) -> bool:
        """Whether what may_fit says is all: no rule limits the cache but the room that is left."""
        return demand.kv_cache_memory_bytes is None and not _only_cpus(self.layout)

    def _best(self, demand: Demand, *, tokens: int = 0) -> Found | None:
        fits = self.layout.overflow(demand, tokens=tokens) <= 0
        if not self._any_fits(fits):
            return None
        seconds = np.where(fits, self.layout.seconds(demand), np.inf)
        return self._search(seconds, self.layout.transfers(demand), objective=self.objective)

    def _any_fits(self, fits: NDArray[np.bool_]) -> bool:
        if self.fixed is not None:
            places, counts = self.fixed
            stops = np.cumsum(counts)
            return bool(fits[list(places), stops - counts, stops].all())
        if self.classes is None:
            return fits_in_order(fits, may_be_empty=self.layout.mode == "devices")
        return fits_in_any_order(fits, classes=self.classes, may_be_empty=True, num_last=self.num_last)

    def _search(self, costs: Costs, transfers: Costs, *, objective: Objective) -> Found | None:
        if self.fixed is not None:
            places, counts = self.fixed
            stops = np.cumsum(counts)
            values = [
                costs[place, stop - count, stop] for place, count, stop in zip(places, counts, stops, strict=True)
            ]
            return None if np.isinf(sum(values)) else Found(places, counts, float(sum(values)), float(max(values)))
        if self.classes is None:
            may_be_empty = self.layout.mode == "devices"
            return split_in_order(costs, objective=objective, transfers=transfers, may_be_empty=may_be_empty)
        return split_in_any_order(
            costs,
            classes=self.classes,
            objective=objective,
            transfers=transfers,
            may_be_empty=True,
            num_last=self.num_last,
        )


def first_that_fits(problems: Sequence[Problem], demand: Demand) -> Fit | None:
    """Of the first of `problems` that fits."""
    for problem in problems:
        fit = problem.fit(demand)
        if fit is not None:
            return fit
    return None


def _timed(found: Found, runs: Sequence[Interval], seconds: Costs, transfers: Costs) -> Found:
    values = [float(seconds[place, run.start, run.stop]) for place, run in zip(found.places, runs, strict=True)]
    for position, (place, after) in enumerate(zip(found.places, found.places[1:], strict=False)):
        values[position] += float(transfers[place, after])
    return replace(found, total=sum(values), slowest=max(values))


def _cache(needs: Sequence[Need], budgets: Sequence[int], demand: Demand) -> tuple[int, tuple[int, ...]]:
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
    tokens = max(demanded_tokens(demand), blocks * demand.block_size)
    lacking = tuple(
        max(
            tokens * need.token_bytes - need.room_bytes,
            demanded_tokens(demand) * need.token_bytes - budget,
        )
        for need, budget in zip(needs, budgets, strict=True)
    )
    return blocks, lacking


def _budgets(layout: Layout, needs: Sequence[Need], demand: Demand) -> tuple[int, ...]:
    """Bytes for the cache on each device, by the rule that a rank follows (rank.py)."""
    asked = demand.kv_cache_memory_bytes
    if asked is not None and layout.mode == "ranks":
        return (asked,) * len(needs)
    if asked is not None:
        # One process' cache lies on several devices, on each in proportion to its layers.
        layers = sum(need.layers.size for need in needs)
        return tuple(asked * need.layers.size // layers for need in needs)
    by_rule = _cpu_budgets(layout, needs)
    return tuple(min(need.room_bytes, by_rule.get(need.device.node, need.room_bytes)) for need in needs)


def _cpu_budgets(layout: Layout, needs: Sequence[Need]) -> dict[str, int]:
    """By node, what the rule for CPUs gives each of its ranks, from what their weights and processes leave. It holds
    for processes whose device is the CPU; layers that one with GPUs keeps in memory have what room there is."""
    if not _only_cpus(layout):
        return {}
    available: dict[str, int] = {}
    for need in needs:
        left = need.device.free_bytes - need.weight_bytes - need.overhead_bytes - need.communication_bytes
        available[need.device.node] = available.get(need.device.node, 0) + left
    return {
        node: cpu_cache_budget(left, local_ranks=layout.local_ranks[node] if layout.mode == "ranks" else 1)
        for node, left in available.items()
    }


def _only_cpus(layout: Layout) -> bool:
    return all(device.kind == "cpu" for place in layout.places for device in place.devices)
