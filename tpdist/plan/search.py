"""Exact search for the best cut of a row of items into runs, one run for each place, by dynamic programming.

Knows nothing of models: a cost is a number for (place, start, stop), infinity where that run does not fit there, and a
transfer is a number for two places that follow each other. The value of a place is its cost and the transfer to the
next place that has items. `latency` minimises the sum of the values, `throughput` the largest.

Ties, in this order, so that the outcome depends on nothing else: the objective; the other objective; the first place
in the order in which places are numbered, and as many items on it as possible; then the same for the next, and so on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tpdist.plan.orders import Graph, Node, Transfers, members_of, one_order, orders
from tpdist.plan.placement import Objective

Costs = NDArray[np.float64]
"""[num_places, num_items + 1, num_items + 1]: the cost of items start <= i < stop; only start < stop is looked at."""


@dataclass(frozen=True)
class Found:
    """The places that got items, in the order of their items, and how many each got. `total` and `slowest`: sum and
    largest of their values."""

    places: tuple[int, ...]
    counts: tuple[int, ...]
    total: float
    slowest: float


def tabulate(cost: Callable[[int, int, int], float], *, num_places: int, num_items: int) -> Costs:
    """The costs that cost(place, start, stop) tells."""
    costs = np.full((num_places, num_items + 1, num_items + 1), math.inf)
    for place in range(num_places):
        for start in range(num_items):
            for stop in range(start + 1, num_items + 1):
                costs[place, start, stop] = cost(place, start, stop)
    return costs


def split_in_order(
    costs: Costs, *, objective: Objective, transfers: Transfers | None = None, may_be_empty: bool = False
) -> Found | None:
    """The best cut with the places in their order; None if nothing fits. Unless they `may_be_empty`, all get items.
    transfers: [num_places, num_places], from the row's place to the column's; default none."""
    return _search(one_order(len(costs), transfers, may_be_empty=may_be_empty), costs, objective=objective)


def split_in_any_order(
    costs: Costs,
    *,
    classes: Sequence[int],
    objective: Objective,
    transfers: Transfers | None = None,
    may_be_empty: bool = False,
    num_last: int = 0,
) -> Found | None:
    """The best cut over all orders of the places, but that the `num_last` last ones stay behind the others in their
    order; None if nothing fits. Places of one class must have equal costs and transfers. What is a matter of choice
    among them, the places of one class take in their order. Raises ValueError if orders.is_too_large."""
    members = members_of(classes, num_last)
    graph = orders(members, transfers, may_be_empty=may_be_empty, num_last=num_last)
    found = _search(graph, costs, objective=objective)
    if found is None:
        return None
    queues = {places[0]: iter(places) for places in members}
    return Found(tuple(next(queues[first]) for first in found.places), found.counts, found.total, found.slowest)


def fits_in_order(fits: NDArray[np.bool_], *, may_be_empty: bool = False) -> bool:
    """Whether `split_in_order` would find a cut, `fits` saying which runs have a cost. Faster than the search."""
    return _reaches_the_end(one_order(len(fits), None, may_be_empty=may_be_empty), fits)


def fits_in_any_order(
    fits: NDArray[np.bool_], *, classes: Sequence[int], may_be_empty: bool = False, num_last: int = 0
) -> bool:
    """Whether `split_in_any_order` would find a cut."""
    members = members_of(classes, num_last)
    return _reaches_the_end(orders(members, None, may_be_empty=may_be_empty, num_last=num_last), fits)


def _reaches_the_end(graph: Graph, fits: NDArray[np.bool_]) -> bool:
    """Whether some path of runs that fit takes all items."""
    size = fits.shape[1]
    runs = fits & ~np.tri(size, dtype=bool)
    ends = np.zeros((len(graph.nodes), size), dtype=bool)
    for number in reversed(range(len(graph.nodes))):
        node = graph.nodes[number]
        rest = np.zeros(size, dtype=bool)
        rest[-1] = node.may_end
        for after, _ in node.exits:
            rest |= ends[after]
        ends[number] = runs[node.place][:, rest].any(axis=1)
    return bool(ends[list(graph.starts), 0].any())


def _search(graph: Graph, costs: Costs, *, objective: Objective) -> Found | None:
    """First the least that the largest value can be: for throughput among all cuts, for latency among those of least
    sum. Then the least sum among the cuts whose values are at most that; of equal ones, the first by the rule."""
    num_items = costs.shape[1] - 1
    if num_items == 0:
        return None
    costs = np.where(np.tri(num_items + 1, dtype=bool), math.inf, costs)
    tables = _Tables(graph, costs)
    sums = tables.least_sums(math.inf)
    if math.isinf(tables.first(sums)):
        return None
    if objective == "latency":
        limit = tables.first_of_least(tables.least_largest(sums), sums)
    else:
        limit = tables.first(tables.least_largest(None))
    return tables.trace(tables.least_sums(limit), limit)


class _Tables:
    """Backward recursions over a graph. A table is [num_nodes, num_items + 1]: the best for the items from the column's
    on, the first of which is on the row's node."""

    def __init__(self, graph: Graph, costs: Costs) -> None:
        self._nodes, self._starts, self._costs = graph.nodes, graph.starts, costs
        self._size = costs.shape[1]

    def first(self, table: Costs) -> float:
        """The best for all items."""
        return float(min(table[start, 0] for start in self._starts))

    def first_of_least(self, table: Costs, sums: Costs) -> float:
        """The best for all items, where the first place is one of a least sum."""
        least = self.first(sums)
        return float(min(table[start, 0] for start in self._starts if sums[start, 0] == least))

    def least_sums(self, limit: float) -> Costs:
        """The least sum of values, of which none is above `limit`."""
        table = np.full((len(self._nodes), self._size), math.inf)
        for number in reversed(range(len(self._nodes))):
            node = self._nodes[number]
            for transfer, rest in self._rests(node, table, end=0.0):
                values = self._costs[node.place] + transfer
                if limit < math.inf:
                    values = np.where(values <= limit, values, math.inf)
                np.minimum(table[number], (values + rest).min(axis=1), out=table[number])
        return table

    def least_largest(self, sums: Costs | None) -> Costs:
        """The least that the largest value can be; with `sums`, among cuts of least sum only."""
        table = np.full((len(self._nodes), self._size), math.inf)
        for number in reversed(range(len(self._nodes))):
            node = self._nodes[number]
            if sums is None:
                for transfer, rest in self._rests(node, table, end=-math.inf):
                    largest = np.maximum(self._costs[node.place] + transfer, rest).min(axis=1)
                    np.minimum(table[number], largest, out=table[number])
                continue
            for exit_sums, exit_table, transfer in self._exits(node, sums, table):
                values = self._costs[node.place] + transfer
                tight = values + exit_sums == sums[number][:, None]
                largest = np.where(tight, np.maximum(values, exit_table), math.inf).min(axis=1)
                np.minimum(table[number], largest, out=table[number])
        return table

    def trace(self, sums: Costs, limit: float) -> Found:
        """The cut that `least_sums(limit)` tells of, the first by the rule for ties."""
        best = self.first(sums)
        number = min((s for s in self._starts if sums[s, 0] == best), key=lambda s: self._nodes[s].place)
        places, counts, slowest, start = [], [], 0.0, 0
        while True:
            stop, after, value = self._step(number, start, sums, limit)
            places.append(self._nodes[number].place)
            counts.append(stop - start)
            slowest = max(slowest, value)
            if after is None:
                return Found(tuple(places), tuple(counts), best, slowest)
            number, start = after, stop

    def _step(self, number: int, start: int, sums: Costs, limit: float) -> tuple[int, int | None, float]:
        """Where the run of a node stops, the node after it, and the node's value."""
        node, wanted = self._nodes[number], sums[number, start]
        costs = self._costs[node.place, start]
        options: list[tuple[int, int, int | None, float]] = []
        if node.may_end and costs[-1] <= limit and costs[-1] == wanted:
            options.append((-(self._size - 1), -1, None, float(costs[-1])))
        for after, transfer in node.exits:
            values = costs + transfer
            stops = np.flatnonzero((values <= limit) & (values + sums[after] == wanted))
            if len(stops):
                stop = int(stops[-1])
                options.append((-stop, self._nodes[after].place, after, float(values[stop])))
        stop, _, after_number, value = min(options, key=lambda option: option[:2])
        return -stop, after_number, value

    def _rests(self, node: Node, table: Costs, *, end: float) -> Iterator[tuple[float, Costs]]:
        """By the transfer that leads there, the best for what is left behind each stop. `end`: for nothing left."""
        if node.may_end:
            yield 0.0, self._nothing_left(end)
        by_transfer: dict[float, list[int]] = {}
        for after, transfer in node.exits:
            by_transfer.setdefault(transfer, []).append(after)
        for transfer, afters in by_transfer.items():
            yield transfer, table[afters].min(axis=0)

    def _exits(self, node: Node, sums: Costs, table: Costs) -> Iterator[tuple[Costs, Costs, float]]:
        if node.may_end:
            yield self._nothing_left(0.0), self._nothing_left(-math.inf), 0.0
        for after, transfer in node.exits:
            yield sums[after], table[after], transfer

    def _nothing_left(self, end: float) -> Costs:
        rest = np.full(self._size, math.inf)
        rest[-1] = end
        return rest
