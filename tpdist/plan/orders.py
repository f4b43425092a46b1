"""Which place may follow which, as a graph that search.py walks.

In a given order a place is followed by later ones. In any order a node is how many places of each class are taken, and
the class of the last one, since places of a class are interchangeable. Knows no costs but those from place to place.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Transfers = NDArray[np.float64]
"""[num_places, num_places]: the cost from the row's place to the column's."""

MAX_EDGES = 20_000
"""The largest graph that is made: to search it with 128 items takes about a second."""


@dataclass(frozen=True)
class Node:
    """A place, or the first of its class, that takes the next items. `exits`: nodes that may come next, by number, with
    the transfer to each. `may_end`: whether none need come."""

    place: int
    exits: tuple[tuple[int, float], ...]
    may_end: bool


@dataclass(frozen=True)
class Graph:
    """`nodes` in an order in which exits come later; `starts`: those that may be first."""

    nodes: tuple[Node, ...]
    starts: tuple[int, ...]


def is_too_large(classes: Sequence[int], *, num_last: int = 0) -> bool:
    """Whether there are too many different places for the search of all orders."""
    return _num_edges(members_of(classes, num_last), num_last) > MAX_EDGES


def _num_edges(members: list[list[int]], num_last: int) -> int:
    """At most so many edges has the graph of their orders."""
    num_free = len(members) - num_last
    taken = math.prod(len(places) + 1 for places in members[:num_free])
    return int(taken * (num_free * len(members) + 2**num_last * num_last**2))


def one_order(num_places: int, transfers: Transfers | None, *, may_be_empty: bool) -> Graph:
    """The places in their order, some of them left out if they `may_be_empty`."""
    links = np.zeros((num_places, num_places)) if transfers is None else transfers
    nodes = tuple(
        Node(
            place=place,
            exits=tuple((after, float(links[place, after])) for after in _after(place, num_places, may_be_empty)),
            may_end=may_be_empty or place == num_places - 1,
        )
        for place in range(num_places)
    )
    return Graph(nodes, tuple(range(num_places)) if may_be_empty else (0,))


def _after(place: int, num_places: int, may_be_empty: bool) -> range:
    return range(place + 1, num_places if may_be_empty else min(place + 2, num_places))


def members_of(classes: Sequence[int], num_last: int) -> list[list[int]]:
    """The places of each class, by the first of them. Each of the last places is a class of its own."""
    num_free = len(classes) - num_last
    by_class: dict[int, list[int]] = {}
    for place, each in enumerate(classes[:num_free]):
        by_class.setdefault(each, []).append(place)
    return [*by_class.values(), *([place] for place in range(num_free, len(classes)))]


def orders(members: list[list[int]], transfers: Transfers | None, *, may_be_empty: bool, num_last: int) -> Graph:
    """A node for each number of taken places by class, and each class of the last one. Later nodes have more taken.
    Raises ValueError if `is_too_large`."""
    if _num_edges(members, num_last) > MAX_EDGES:
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
        Node(members[last][0], tuple(exits(taken, last)), may_be_empty or list(taken) == sizes) for taken, last in keys
    )
    starts = tuple(number for (taken, _), number in numbers.items() if sum(taken) == 1)
    return Graph(nodes, starts)


def _link(transfers: Transfers | None, left: list[int], right: list[int]) -> float:
    """The transfer between two classes, maybe the same one."""
    if transfers is None:
        return 0.0
    return float(transfers[left[0], right[0] if left is not right else left[1]])
