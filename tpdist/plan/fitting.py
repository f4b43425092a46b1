"""Whether and how a model fits a layout: the best cut of its layers, and the cache that there is room for.

The demand is taken as it is; what shrinks of it where nothing fits is said in shrinking.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tpdist.plan.cache_budgets import cache_of, only_cpus
from tpdist.plan.costs import context_tokens
from tpdist.plan.cuts import NEVER, Goal, MachineRule, Rank, Tried, best_by_blocks, best_by_machine, overflow_of_runs
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
        """The best cut that fits; None if there is none, or where ranks are on CPUs if cuts.py misses it."""
        seconds, transfers = self.layout.seconds(demand), self.layout.transfers(demand)

        def search(overflow: Costs, allowed: NDArray[np.bool_]) -> Tried | None:
            where = allowed & (overflow <= 0)
            if not self._any_fits(where):
                return None
            found = self._search(np.where(where, seconds, np.inf), transfers, objective=self.objective)
            if found is None:
                return None
            rank = self._rank(found)
            return Tried(found, rank, NEVER if self._lacks(found, demand) > 0 else rank)

        after = np.array([[transfers[place, place + 1]] for place in range(len(transfers) - 1)] + [[0.0]])
        goal = Goal(
            search=search,
            values=lambda overflow: np.where(overflow <= 0, seconds + after[:, :, None], np.inf),
            largest=self.objective == "throughput",
            only_fitting=True,
        )
        return self._least(demand, goal)

    def closest(self, demand: Demand) -> Fit:
        """The best cut of those that fit, or else the one of which the fullest device lacks least."""
        if (fit := self.fit(demand)) is not None:
            return fit
        no_transfers = np.zeros((len(self.layout.places),) * 2)

        def search(overflow: Costs, allowed: NDArray[np.bool_]) -> Tried | None:
            lacking = np.where(allowed, np.maximum(overflow, 0), np.inf)
            found = self._search(lacking, no_transfers, objective="throughput")
            if found is None:
                return None
            return Tried(found, (found.slowest,), (float(self._lacks(found, demand)),))

        goal = Goal(search=search, values=lambda overflow: np.maximum(overflow, 0), largest=True, only_fitting=False)
        closest = self._least(demand, goal)
        assert closest is not None, "every layout has a cut if memory does not matter"
        return closest

    def _least(self, demand: Demand, goal: Goal) -> Fit | None:
        """The best cut with the rule that its cache follows."""
        tried = self._tried(demand, goal)
        return None if tried is None or tried.rank == NEVER else self.settle(tried.found, demand)

    def _tried(self, demand: Demand, goal: Goal) -> Tried | None:
        if self.fixed is not None:
            shape = (len(self.layout.places), *(self.layout.model.num_layers + 1,) * 2)
            return goal.search(np.zeros(shape), np.ones(shape, dtype=bool))
        if self.layout.mode == "ranks" and demand.kv_cache_memory_bytes is not None:
            return best_by_blocks(self.layout, demand, goal)
        overflow = overflow_of_runs(self.layout, demand)
        allowed = overflow <= 0 if goal.only_fitting else np.ones(overflow.shape, dtype=bool)
        if self.layout.mode == "devices" or not only_cpus(self.layout):
            return goal.search(overflow, allowed)
        rule = MachineRule(self.layout, demand)
        return best_by_machine(
            allowed, lambda allowed: goal.search(np.maximum(overflow, rule.overflow(allowed)), allowed)
        )

    def _rank(self, found: Found) -> Rank:
        """By the rule for ties of search.py."""
        times = (found.total, found.slowest) if self.objective == "latency" else (found.slowest, found.total)
        return (*times, *(-count for count in found.counts))

    def _lacks(self, found: Found, demand: Demand) -> int:
        """What the fullest device lacks."""
        return max(cache_of(self.layout, self._needs(found, demand), demand).shortfalls)

    def holds(self, found: Found, demand: Demand) -> bool:
        """Whether a cut fits, without its times."""
        return self._lacks(found, demand) <= 0

    def settle(self, found: Found, demand: Demand) -> Fit:
        """A cut with its bytes, and its times whatever it was found for."""
        needs = self._needs(found, demand)
        cache = cache_of(self.layout, needs, demand)
        timed = _timed(found, _runs(found), self.layout.seconds(demand), self.layout.transfers(demand))
        return Fit(
            layout=self.layout,
            demand=demand,
            found=timed,
            needs=needs,
            num_blocks=cache.num_blocks,
            budgets=cache.budgets,
            shortfalls=cache.shortfalls,
        )

    def _needs(self, found: Found, demand: Demand) -> tuple[Need, ...]:
        return tuple(
            self.layout.need(place, rank, layers, stage=stage, demand=demand)
            for stage, (place, layers) in enumerate(zip(found.places, _runs(found), strict=True))
            for rank in range(len(self.layout.places[place].devices))
        )

    def may_fit(self, demand: Demand) -> bool:
        """Whether a cut fits, as far as the room decides: without a search for the best."""
        return self._any_fits(self.layout.overflow(demand) <= 0)

    def room_decides(self, demand: Demand) -> bool:
        """Whether what may_fit says is all: no rule limits the cache but those of its tables."""
        tables_tell = self.layout.mode == "devices" or not only_cpus(self.layout)
        return demand.kv_cache_memory_bytes is None and self.fixed is None and tables_tell

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


def longest_context(fit: Fit) -> int:
    """Tokens of the longest sequences with which this cut and its batch fit: whole blocks, or all of the model's
    length. A step keeps more alive with a longer context, which leaves less for the cache."""
    demand, size = fit.demand, fit.demand.block_size
    problem = Problem(layout=fit.layout, objective="latency", fixed=(fit.found.places, fit.found.counts))

    def fits(tokens: int) -> bool:
        return problem.holds(fit.found, replace(demand, max_seq_len=tokens, fixed=demand.fixed | {"max_seq_len"}))

    demanded = context_tokens(demand)
    most = min(demand.max_model_len, fit.num_blocks // demand.max_batch_size * size)
    if most <= demanded or fits(most):
        return max(demanded, most)
    low, high = demanded // size, (most - 1) // size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * size) else (low, middle - 1)
    return max(demanded, low * size)


def _runs(found: Found) -> list[Interval]:
    stops = [sum(found.counts[: place + 1]) for place in range(len(found.counts))]
    return [Interval(stop - count, stop) for stop, count in zip(stops, found.counts, strict=True)]


def _timed(found: Found, runs: Sequence[Interval], seconds: Costs, transfers: Costs) -> Found:
    values = [float(seconds[place, run.start, run.stop]) for place, run in zip(found.places, runs, strict=True)]
    for position, (place, after) in enumerate(zip(found.places, found.places[1:], strict=False)):
        values[position] += float(transfers[place, after])
    return replace(found, total=sum(values), slowest=max(values))
