"""Which of several rooms holds each of some sizes, in any arrangement: for models that fit only so. Whole numbers;
knows no torch and no modules.
"""

from collections.abc import Iterator, Sequence

# Of sizes into rooms. A hundred layers that are alike take about a hundred; what takes more is given up.
MAX_TRIES = 100_000


def pack(sizes: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """The number of the room of each size, or None if there is no way, or none is found within MAX_TRIES.

    Backtracking from the largest size down. Of rooms with equally much left the first stands for all; of equal sizes
    the later never goes to an earlier room than the one before, and in the end those follow each other as in `sizes`.
    """
    order = sorted(range(len(sizes)), key=lambda item: -sizes[item])
    needs = [sizes[item] for item in order]
    found = _held(needs, rooms) if sum(needs) <= sum(rooms) else None
    if found is None:
        return None
    packed = [0] * len(sizes)
    for item, room in zip(order, found, strict=True):
        packed[item] = room
    return packed


def _held(needs: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """The room of each of `needs`, which never grow."""
    left, total = list(rooms), sum(needs)
    held: list[int] = []
    choices: list[Iterator[int]] = []
    for _ in range(MAX_TRIES):
        if len(held) == len(needs):
            return held
        if len(choices) == len(held):
            choices.append(iter(_options(needs, held, left, total)))
        while (room := next(choices[-1], None)) is None:
            choices.pop()
            if not choices:
                return None
            back = held.pop()
            left[back] += needs[len(held)]
            total += needs[len(held)]
        left[room] -= needs[len(held)]
        total -= needs[len(held)]
        held.append(room)
    return None


def _options(needs: Sequence[int], held: Sequence[int], left: Sequence[int], total: int) -> list[int]:
    """The rooms that are worth trying for the next of `needs`; `total` is what it and the later ones take."""
    item, smallest = len(held), needs[-1]
    if total > sum(room for room in left if room >= smallest):
        return []
    if 0 < needs[item] == smallest and len(needs) - item > sum(room // smallest for room in left):
        return []
    first = held[-1] if item and needs[item] == needs[item - 1] else 0
    fitting = {left[room]: room for room in reversed(range(first, len(left))) if left[room] >= needs[item]}
    return sorted(fitting.values())
