"""The exact placement against trying everything: the same placement, in thousands of random cases."""

import random
from collections.abc import Sequence
from itertools import combinations_with_replacement, permutations

import pytest

from tpdist.bigmodel.search import MAX_ORDERS, Piece, place, place_in_best_order


def devices_of(placement: Sequence[int]) -> list[int]:
    return sorted(set(placement))


def is_possible(pieces: Sequence[Piece], placement: Sequence[int], gpu_bytes: Sequence[int], cpu_bytes: int) -> bool:
    cpu = len(gpu_bytes)
    used = [
        sum(p.num_bytes for p, d in zip(pieces, placement, strict=True) if d == device) for device in range(cpu + 2)
    ]
    offloaded = [p.layer_bytes for p, d in zip(pieces, placement, strict=True) if d >= cpu]
    on_disk = [p.layer_bytes for p, d in zip(pieces, placement, strict=True) if d > cpu]
    room = [*gpu_bytes, cpu_bytes]
    gpus = [device for device in devices_of(placement) if device < cpu]
    if gpus:
        room[gpus[0]] -= max(offloaded, default=0)
    if used[cpu]:
        room[cpu] -= max(on_disk, default=0)
    return all(used[device] <= room[device] for device in range(cpu + 1) if used[device])


def wish(pieces: Sequence[Piece], placement: Sequence[int], num_gpus: int) -> tuple[object, ...]:
    """What a placement is judged by; less is better."""
    num_bytes = {
        device: sum(p.num_bytes for p, d in zip(pieces, placement, strict=True) if d == device)
        for device in range(num_gpus + 2)
    }
    borders = [
        piece.cut_cost
        for piece, left, right in zip(pieces[1:], placement, placement[1:], strict=False)
        if left != right and right < num_gpus
    ]
    ends = [-sum(1 for d in placement if d <= gpu) for gpu in range(num_gpus)]
    gpus = [device for device in devices_of(placement) if device < num_gpus]
    return num_bytes[num_gpus + 1], num_bytes[num_gpus], len(gpus), sum(borders), ends


def by_trying_everything(pieces: Sequence[Piece], gpu_bytes: Sequence[int], cpu_bytes: int) -> list[int]:
    all_of_them = combinations_with_replacement(range(len(gpu_bytes) + 2), len(pieces))
    possible = [found for found in all_of_them if is_possible(pieces, found, gpu_bytes, cpu_bytes)]
    return list(min(possible, key=lambda found: wish(pieces, found, len(gpu_bytes))))


def random_pieces(draw: random.Random, count: int) -> list[Piece]:
    pieces = []
    for _ in range(count):
        num_bytes = draw.randint(1, 12)
        pieces.append(Piece(num_bytes, draw.randint(0, num_bytes), draw.randint(0, 3)))
    return pieces


@pytest.mark.parametrize("seed", range(20))
def test_placements_are_those_that_trying_everything_finds(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(150):
        pieces = random_pieces(draw, draw.randint(0, 7))
        total = sum(piece.num_bytes for piece in pieces)
        gpu_bytes = [draw.randint(0, total) for _ in range(draw.randint(0, 3))]
        cpu_bytes = draw.randint(0, total)
        expected = by_trying_everything(pieces, gpu_bytes, cpu_bytes)
        assert place(pieces, gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes) == expected, (pieces, gpu_bytes, cpu_bytes)


@pytest.mark.parametrize("seed", range(10))
def test_no_order_of_the_gpus_is_better(seed: int) -> None:
    """Of all orders the least is spilled, then the fewest GPUs and the cheapest borders; the given order if it is as
    good as any."""
    draw = random.Random(100 + seed)
    changed = 0
    for _ in range(60):
        pieces = random_pieces(draw, draw.randint(3, 7))
        total = sum(piece.num_bytes for piece in pieces)
        gpu_bytes = [draw.randint(0, total // 2) for _ in range(draw.randint(2, 3))]
        cpu_bytes = draw.randint(0, total)
        given = by_trying_everything(pieces, gpu_bytes, cpu_bytes)
        wishes = {}
        for order in permutations(range(len(gpu_bytes))):
            room = [gpu_bytes[gpu] for gpu in order]
            best = by_trying_everything(pieces, room, cpu_bytes)
            wishes[tuple([*order, *range(len(room), len(room) + 2)][d] for d in best)] = wish(pieces, best, len(room))
        found = place_in_best_order(pieces, gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes)
        least = min(wishes.values())
        if wish(pieces, given, len(gpu_bytes))[:2] == least[:2]:
            assert found == given
            continue
        changed += 1
        assert wishes[tuple(found)][:4] == least[:4], (pieces, gpu_bytes, cpu_bytes)
    assert changed > 0


def test_orders_of_many_different_gpus_are_not_tried() -> None:
    sizes = [1, 2, 3, 4, 5, 6]
    pieces = [Piece(size, size) for size in reversed(sizes)]
    assert place_in_best_order(pieces, gpu_bytes=sizes, cpu_bytes=100) == place(pieces, gpu_bytes=sizes, cpu_bytes=100)
    assert place_in_best_order(pieces[1:], gpu_bytes=sizes[:5], cpu_bytes=0) == [4, 3, 2, 1, 0]
    assert MAX_ORDERS == 120
    pieces = [Piece(5, 5), *[Piece(1, 1)] * 7]
    assert place_in_best_order(pieces, gpu_bytes=[1] * 7 + [5], cpu_bytes=0) == [7, 0, 1, 2, 3, 4, 5, 6]


def test_all_orders_of_five_gpus_are_tried_for_a_thousand_pieces() -> None:
    draw = random.Random(0)
    pieces = random_pieces(draw, 1000)
    total = sum(piece.num_bytes for piece in pieces)
    gpu_bytes = [int(total * share) for share in (0.1, 0.15, 0.19, 0.2, 0.25)]
    found = place_in_best_order(pieces, gpu_bytes=gpu_bytes, cpu_bytes=total)
    assert len(set(found)) == 6


def test_a_model_that_fits_on_the_gpus_needs_no_reserve() -> None:
    pieces = [Piece(10, 10)] * 4
    assert place(pieces, gpu_bytes=[20, 20], cpu_bytes=0) == [0, 0, 1, 1]
    assert place(pieces, gpu_bytes=[20, 19], cpu_bytes=100) == [0, 1, 2, 2]


def test_fewer_gpus_are_better_than_many() -> None:
    assert place([Piece(1, 1)] * 3, gpu_bytes=[1, 5, 9], cpu_bytes=0) == [1, 1, 1]


def test_borders_go_where_they_cost_least() -> None:
    pieces = [Piece(1, 1, cost) for cost in (0, 2, 2, 0, 2, 2)]
    assert place(pieces, gpu_bytes=[5, 5], cpu_bytes=0) == [0, 0, 0, 1, 1, 1]


def test_a_large_model_takes_a_moment_only() -> None:
    draw = random.Random(0)
    pieces = random_pieces(draw, 3000)
    total = sum(piece.num_bytes for piece in pieces)
    for share in (0.3, 0.11):
        placement = place(pieces, gpu_bytes=[int(total * share)] * 8, cpu_bytes=total)
        assert placement == sorted(placement)
