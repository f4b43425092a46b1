"""Exact search for the best cut of a row of items into runs, one run for each place, by dynamic programming.

Knows nothing of models: a cost is a number for (place, start, stop), infinity where that run does not fit there, and a
transfer is a number for two places that follow each other. The value of a place is its cost and the transfer to the
next place that has items. `latency` minimises the sum of the values, `throughput` the largest.

Which place may follow which is a graph: in a given order a place is followed by later ones; in any order a node is
how many places of each class are taken, and the class of the last one, since places of a class are interchangeable.

Ties, in this order, so that the outcome depends on nothing else: the objective; the other objective; the first place
in the order in which places are numbered, and as many items on it as possible; then the same for the next, and so on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from tpdist.plan.placement import Objective

Costs = NDArray[np.float64]
"""[num_places, num_items + 1, num_items + 1]: the cost of items start <= i < stop; only start < stop is looked at."""

MAX_EDGES = 20_000
"""The largest graph that is searched: with 128 items it takes about a second."""


@dataclass(frozen=True)
class Found:
    """The places that got items, in the order of their items, and how many each got. `total` and `slowest`: sum and
    largest of their values."""

    places: tuple[int, ...]
    counts: tuple[int, ...]
    total: float
    slowest: float


@dataclass(frozen=True)
class _Node:
    """A place that may take the next items. `exits`: nodes that may come next, with the transfer to each."""

    cost: int
    label: int
    exits: tuple[tuple[int, float], ...]
    may_end: bool


@dataclass(frozen=True)
class _Graph:
    """`nodes` in an order in which exits come later; `starts`: those that may be first."""

    nodes: tuple[_Node, ...]
    starts: tuple[int, ...]


def tabulate(cost: Callable[[int, int, int], float], *, num_places: int, num_items: int) -> Costs:
    """The costs that cost(place, start, stop) tells."""
    costs = np.full((num_places, num_items + 1, num_items + 1), math.inf)
    for place in range(num_places):
        for start in range(num_items):
            for stop in range(start + 1, num_items + 1):
                costs[place, start, stop] = cost(place, start, stop)
    return costs


def split_in_order(
    costs: Costs, *, objective: Objective, transfers: Costs | None = None, may_be_empty: bool = False
) -> Found | None:
    """The best cut with the places in their order; None if nothing fits. Unless they `may_be_empty`, all get items.
    transfers: [num_places, num_places], from the row's place to the column's; default none."""
    return _search(_one_order(len(costs), transfers, may_be_empty=may_be_empty), costs, objective=objective)


def split_in_any_order(
    costs: Costs,
    *,
    classes: Sequence[int],
    objective: Objective,
    transfers: Costs | None = None,
    may_be_empty: bool = False,
    num_last: int = 0,
) -> Found | None:
    """The best cut over all orders of the places, but that the `num_last` last ones stay behind the others in their
    order; None if nothing fits. Places of one class must have equal costs and transfers. What is a matter of choice
    among them, the places of one class take in their order. Raises ValueError if `is_too_large`."""
    members = _members(classes, num_last)
    graph = _orders(members, transfers, may_be_empty=may_be_empty, num_last=num_last)
    found = _search(graph, costs, objective=objective)
    if found is None:
        return None
    queues = {places[0]: iter(places) for places in members}
    return Found(tuple(next(queues[first]) for first in found.places), found.counts, found.total, found.slowest)


def fits_in_order(fits: NDArray[np.bool_], *, may_be_empty: bool = False) -> bool:
    """Whether `split_in_order` would find a cut, `fits` saying which runs have a cost. Faster than the search."""
    return _reaches_the_end(_one_order(len(fits), None, may_be_empty=may_be_empty), fits)


def fits_in_any_order(
    fits: NDArray[np.bool_], *, classes: Sequence[int], may_be_empty: bool = False, num_last: int = 0
) -> bool:
    """Whether `split_in_any_order` would find a cut."""
    members = _members(classes, num_last)
    return _reaches_the_end(_orders(members, None, may_be_empty=may_be_empty, num_last=num_last), fits)


def is_too_large(classes: Sequence[int], *, num_last: int = 0) -> bool:
    """Whether there are too many different places for the search of all orders."""
    return _num_edges(_members(classes, num_last)) > MAX_EDGES


def _num_edges(members: list[list[int]]) -> int:
    """At most so many edges has the graph of their orders."""
    return math.prod(len(places) + 1 for places in members) * len(members) ** 2


def _one_order(num_places: int, transfers: Costs | None, *, may_be_empty: bool) -> _Graph:
    links = np.zeros((num_places, num_places)) if transfers is None else transfers
    nodes = tuple(
        _Node(
            cost=place,
            label=place,
            exits=tuple((after, float(links[place, after])) for after in _after(place, num_places, may_be_empty)),
            may_end=may_be_empty or place == num_places - 1,
        )
        for place in range(num_places)
    )
    return _Graph(nodes, tuple(range(num_places)) if may_be_empty else (0,))


def _after(place: int, num_places: int, may_be_empty: bool) -> range:
    return range(place + 1, num_places if may_be_empty else min(place + 2, num_places))


def _members(classes: Sequence[int], num_last: int) -> list[list[int]]:
    """The places of each class, by the first of them. Each of the last places is a class of its own."""
    num_free = len(classes) - num_last
    by_class: dict[int, list[int]] = {}
    for place, each in enumerate(classes[:num_free]):
        by_class.setdefault(each, []).append(place)
    return [*by_class.values(), *([place] for place in range(num_free, len(classes)))]


def _orders(members: list[list[int]], transfers: Costs | None, *, may_be_empty: bool, num_last: int) -> _Graph:
    """A node for each number of taken places by class, and each class of the last one. Later nodes have more taken."""
    if _num_edges(members) > MAX_EDGES:
        raise ValueError(
            f"the orders of {sum(map(len, members))} places of {len(members)} classes are too many to search"
        )
    sizes = [len(places) for places in members]
    first_last = len(members) - num_last
    keys = [
        (taken, last)
        for taken in sorted(product(*(range(size + 1) for size in sizes)), key=sum)
        for last in range(len(sizes))
        if taken[last] and not any(taken[max(last + 1, first_last) :])
    ]
    numbers = {key: number for number, key in enumerate(keys)}

    def exits(taken: tuple[int, ...], last: int) -> Iterator[tuple[int, float]]:
        for after in range(len(sizes)):
            more = (*taken[:after], taken[after] + 1, *taken[after + 1 :])
            if (number := numbers.get((more, after))) is not None:
                yield number, _link(transfers, members[last], members[after])

    nodes = tuple(
        _Node(members[last][0], members[last][0], tuple(exits(taken, last)), may_be_empty or list(taken) == sizes)
        for taken, last in keys
    )
    starts = tuple(number for (taken, _), number in numbers.items() if sum(taken) == 1)
    return _Graph(nodes, starts)


def _link(transfers: Costs | None, left: list[int], right: list[int]) -> float:
    """The transfer between two classes, maybe the same one."""
    if transfers is None:
        return 0.0
    return float(transfers[left[0], right[0] if left is not right else left[1]])


def _reaches_the_end(graph: _Graph, fits: NDArray[np.bool_]) -> bool:
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
        ends[number] = runs[node.cost][:, rest].any(axis=1)
    return bool(ends[list(graph.starts), 0].any())


def _search(graph: _Graph, costs: Costs, *, objective: Objective) -> Found | None:
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

    def __init__(self, graph: _Graph, costs: Costs) -> None:
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
                values = self._costs[node.cost] + transfer
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
                    largest = np.maximum(self._costs[node.cost] + transfer, rest).min(axis=1)
                    np.minimum(table[number], largest, out=table[number])
                continue
            for exit_sums, exit_table, transfer in self._exits(node, sums, table):
                values = self._costs[node.cost] + transfer
                tight = values + exit_sums == sums[number][:, None]
                largest = np.where(tight, np.maximum(values, exit_table), math.inf).min(axis=1)
                np.minimum(table[number], largest, out=table[number])
        return table

    def trace(self, sums: Costs, limit: float) -> Found:
        """The cut that `least_sums(limit)` tells of, the first by the rule for ties."""
        best = self.first(sums)
        number = min((s for s in self._starts if sums[s, 0] == best), key=lambda s: self._nodes[s].label)
        labels, counts, slowest, start = [], [], 0.0, 0
        while True:
            stop, after, value = self._step(number, start, sums, limit)
            labels.append(self._nodes[number].label)
            counts.append(stop - start)
            slowest = max(slowest, value)
            if after is None:
                return Found(tuple(labels), tuple(counts), best, slowest)
            number, start = after, stop

    def _step(self, number: int, start: int, sums: Costs, limit: float) -> tuple[int, int | None, float]:
        """Where the run of a node stops, the node after it, and the node's value."""
        node, wanted = self._nodes[number], sums[number, start]
        costs = self._costs[node.cost, start]
        options: list[tuple[int, int, int | None, float]] = []
        if node.may_end and costs[-1] <= limit and costs[-1] == wanted:
            options.append((-(self._size - 1), -1, None, float(costs[-1])))
        for after, transfer in node.exits:
            values = costs + transfer
            stops = np.flatnonzero((values <= limit) & (values + sums[after] == wanted))
            if len(stops):
                stop = int(stops[-1])
                options.append((-stop, self._nodes[after].label, after, float(values[stop])))
        stop, _, after_number, value = min(options, key=lambda option: option[:2])
        return -stop, after_number, value

    def _rests(self, node: _Node, table: Costs, *, end: float) -> Iterator[tuple[float, Costs]]:
        """By the transfer that leads there, the best for what is left behind each stop. `end`: for nothing left."""
        if node.may_end:
            yield 0.0, self._nothing_left(end)
        by_transfer: dict[float, list[int]] = {}
        for after, transfer in node.exits:
            by_transfer.setdefault(transfer, []).append(after)
        for transfer, afters in by_transfer.items():
            yield transfer, table[afters].min(axis=0)

    def _exits(self, node: _Node, sums: Costs, table: Costs) -> Iterator[tuple[Costs, Costs, float]]:
        if node.may_end:
            yield self._nothing_left(0.0), self._nothing_left(-math.inf), 0.0
        for after, transfer in node.exits:
            yield sums[after], table[after], transfer

    def _nothing_left(self, end: float) -> Costs:
        rest = np.full(self._size, math.inf)
        rest[-1] = end
        return rest
