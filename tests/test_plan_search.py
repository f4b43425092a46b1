"""The exact search against every cut and every order of small instances."""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest

from tpdist.plan.orders import is_too_large
from tpdist.plan.placement import Objective
from tpdist.plan.search import (
    Costs,
    Found,
    fits_in_any_order,
    fits_in_order,
    split_in_any_order,
    split_in_order,
    tabulate,
)

INF = math.inf
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput")


def cuts(num_items: int, num_runs: int) -> Iterator[tuple[int, ...]]:
    """The sizes of all cuts into runs that are not empty."""
    for inner in combinations(range(1, num_items), num_runs - 1):
        bounds = (0, *inner, num_items)
        yield tuple(stop - start for start, stop in pairwise(bounds))


def measured(order: Sequence[int], counts: Sequence[int], costs: Costs, transfers: Costs) -> tuple[float, float]:
    """Sum and largest of the values of a cut."""
    values, start = [], 0
    for position, (place, count) in enumerate(zip(order, counts, strict=True)):
        transfer = transfers[place, order[position + 1]] if position + 1 < len(order) else 0.0
        values.append(costs[place, start, start + count] + transfer)
        start += count
    return sum(values), max(values)


def best_of(
    orders: Iterator[Sequence[int]], costs: Costs, transfers: Costs, labels: Sequence[int], objective: Objective
) -> Found | None:
    """The best cut of all, by the rule for ties that search.py states."""
    num_items = costs.shape[1] - 1
    best: tuple[object, Found] | None = None
    for order in orders:
        if len(order) > num_items:
            continue
        for counts in cuts(num_items, len(order)):
            total, slowest = measured(order, counts, costs, transfers)
            if total == INF:
                continue
            rank = (total, slowest) if objective == "latency" else (slowest, total)
            taken = [(labels[place], -count) for place, count in zip(order, counts, strict=True)]
            if best is None or (*rank, taken, list(order)) < best[0]:
                best = ((*rank, taken, list(order)), Found(tuple(order), counts, total, slowest))
    return best[1] if best else None


def random_costs(rng: random.Random, classes: Sequence[int], num_items: int) -> Costs:
    """Whole numbers, so that ties are many and sums exact; runs that do not fit; equal places of a class. Costs of runs
    need not be sums of costs of items."""
    by_class = {}
    for each in sorted(set(classes)):
        room = rng.randint(1, num_items + 2)
        additive = rng.random() < 0.5
        speed = rng.randint(1, 3)
        weights = [rng.randint(1, 3) for _ in range(num_items)]

        def cost(
            start: int,
            stop: int,
            room: int = room,
            additive: bool = additive,
            speed: int = speed,
            w: Sequence[int] = weights,
        ) -> float:
            if stop - start > room:
                return INF
            return float(speed * sum(w[start:stop]) if additive else rng.randint(0, 4))

        by_class[each] = tabulate(
            lambda _, start, stop, cost=cost: cost(start, stop), num_places=1, num_items=num_items
        )[0]
    return np.stack([by_class[each] for each in classes])


def random_transfers(rng: random.Random, classes: Sequence[int]) -> Costs:
    pairs = {(a, b): float(rng.randint(0, 2)) for a in set(classes) for b in set(classes)}
    return np.array([[pairs[a, b] for b in classes] for a in classes])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_in_order_it_finds_what_trying_every_cut_finds(objective: Objective) -> None:
    rng = random.Random(1)
    nothing_fits = 0
    for _ in range(1500):
        num_places, num_items = rng.randint(1, 4), rng.randint(1, 7)
        classes = range(num_places)
        costs, transfers = random_costs(rng, classes, num_items), random_transfers(rng, classes)
        may_be_empty = rng.random() < 0.5
        sizes = range(1, num_places + 1) if may_be_empty else (num_places,)
        orders = (order for size in sizes for order in combinations(range(num_places), size))
        expected = best_of(orders, costs, transfers, classes, objective)
        found = split_in_order(costs, objective=objective, transfers=transfers, may_be_empty=may_be_empty)
        assert found == expected, (costs, transfers, may_be_empty)
        assert fits_in_order(costs < INF, may_be_empty=may_be_empty) == (found is not None)
        nothing_fits += found is None
    assert 100 < nothing_fits < 1000


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_in_any_order_it_finds_what_trying_every_order_finds(objective: Objective) -> None:
    rng = random.Random(2)
    for _ in range(1200):
        num_places, num_items = rng.randint(1, 4), rng.randint(1, 6)
        num_last = rng.randint(0, min(2, num_places - 1))
        free = [rng.randint(0, 2) for _ in range(num_places - num_last)]
        classes = [*free, *range(10, 10 + num_last)]
        costs, transfers = random_costs(rng, classes, num_items), random_transfers(rng, classes)
        may_be_empty = rng.random() < 0.6
        expected = best_of(
            allowed_orders(num_places, num_last, may_be_empty), costs, transfers, first_of_class(classes), objective
        )
        found = split_in_any_order(
            costs,
            classes=classes,
            objective=objective,
            transfers=transfers,
            may_be_empty=may_be_empty,
            num_last=num_last,
        )
        assert found == expected, (classes, costs, transfers, may_be_empty, num_last)
        quick = fits_in_any_order(costs < INF, classes=classes, may_be_empty=may_be_empty, num_last=num_last)
        assert quick == (found is not None)


def allowed_orders(num_places: int, num_last: int, may_be_empty: bool) -> Iterator[Sequence[int]]:
    for size in range(1, num_places + 1) if may_be_empty else (num_places,):
        for order in permutations(range(num_places), size):
            last = [place for place in order if place >= num_places - num_last]
            if not last or (last == sorted(last) and order[len(order) - len(last) :] == tuple(last)):
                yield order


def first_of_class(classes: Sequence[int]) -> list[int]:
    return [list(classes).index(each) for each in classes]


def test_among_equal_cuts_the_first_place_gets_most() -> None:
    costs = np.zeros((3, 6, 6))
    assert split_in_order(costs, objective="latency") == Found((0, 1, 2), (3, 1, 1), 0.0, 0.0)
    assert split_in_order(costs, objective="latency", may_be_empty=True) == Found((0,), (5,), 0.0, 0.0)
    assert split_in_any_order(costs, classes=(0, 0, 0), objective="throughput") == Found((0, 1, 2), (3, 1, 1), 0.0, 0.0)


def test_of_cuts_with_the_same_sum_the_one_with_the_fastest_slowest_place_is_taken() -> None:
    costs = tabulate(lambda place, start, stop: float(stop - start), num_places=2, num_items=8)
    assert split_in_order(costs, objective="latency") == Found((0, 1), (4, 4), 8.0, 4.0)


def test_of_cuts_with_the_same_slowest_place_the_one_with_the_least_sum_is_taken() -> None:
    costs = tabulate(lambda place, start, stop: (place + 1.0) * (stop - start), num_places=2, num_items=4)
    # (2, 2) has 4 as the slowest, and (3, 1) has 3.
    assert split_in_order(costs, objective="throughput") == Found((0, 1), (3, 1), 5.0, 3.0)


def test_nothing_is_cut_where_there_is_nothing_or_too_few_items() -> None:
    assert split_in_order(np.zeros((2, 1, 1)), objective="latency") is None
    assert split_in_order(np.zeros((3, 3, 3)), objective="latency") is None


def layers_over(speeds: Sequence[float], rooms: Sequence[int], num_items: int = 128) -> Costs:
    sizes = np.arange(num_items + 1)[None, :] - np.arange(num_items + 1)[:, None]
    return np.stack([np.where(sizes <= room, sizes * speed, INF) for speed, room in zip(speeds, rooms, strict=True)])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_order_of_many_places_is_at_least_as_good_as_theirs(
    objective: Objective,
) -> None:
    classes = [0] * 5 + [1] * 5 + [2] * 6
    costs = layers_over([1.0 + each for each in classes], [12 + each for each in classes])
    transfers = np.full((16, 16), 0.1)
    for may_be_empty in (False, True):
        in_order = split_in_order(costs, objective=objective, transfers=transfers, may_be_empty=may_be_empty)
        any_order = split_in_any_order(
            costs, classes=classes, objective=objective, transfers=transfers, may_be_empty=may_be_empty
        )
        assert in_order is not None
        assert any_order is not None
        assert any_order.total <= in_order.total or objective == "throughput"


def test_many_different_places_are_too_many_for_all_orders() -> None:
    assert not is_too_large([0] * 5 + [1] * 5 + [2] * 6)
    assert not is_too_large(range(8))
    assert is_too_large(range(16))
    with pytest.raises(ValueError, match="too many to search"):
        split_in_any_order(np.zeros((16, 20, 20)), classes=range(16), objective="latency")
