"""Whether and how a model fits a layout: the best cut of its layers, and the cache that there is room for.

The demand is taken as it is; what shrinks of it where nothing fits is said in shrinking.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tpdist.plan.cache_budgets import cache_of, only_cpus
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
        cache = cache_of(self.layout, needs, demand)
        timed = _timed(found, runs, self.layout.seconds(demand), self.layout.transfers(demand))
        return Fit(
            layout=self.layout,
            demand=demand,
            found=timed,
            needs=needs,
            num_blocks=cache.num_blocks,
            budgets=cache.budgets,
            shortfalls=cache.shortfalls,
        )

    def may_fit(self, demand: Demand, *, tokens: int = 0) -> bool:
        """Whether a cut fits, as far as the room decides: without a search for the best."""
        return self._any_fits(self.layout.overflow(demand, tokens=tokens) <= 0)

    def room_decides(self, demand: Demand) -> bool:
        """Whether what may_fit says is all: no rule limits the cache but those of its tables."""
        tables_tell = self.layout.mode == "devices" or not only_cpus(self.layout)
        return demand.kv_cache_memory_bytes is None and self.fixed is None and tables_tell

    def _best(self, demand: Demand, *, tokens: int = 0) -> Found | None:
        fits = self.layout.overflow(demand, tokens=tokens) <= 0
        if not self._any_fits(fits):
            return None
        seconds = self.layout.seconds(demand)
        if self.fixed is None:
            seconds = np.where(fits, seconds, np.inf)
        return self._search(seconds, self.layout.transfers(demand), objective=self.objective)

    def _any_fits(self, fits: NDArray[np.bool_]) -> bool:
        if self.fixed is not None:
            return True  # its bytes are counted one by one
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
