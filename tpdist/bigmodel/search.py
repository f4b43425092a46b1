"""The best contiguous placement of pieces on GPUs, CPU and disk, in whole numbers. Knows no torch and no modules.

Pieces stay in order: the GPUs take the first ones, in the order of the GPUs, the CPU what follows, the disk the rest.
Other orders of the GPUs are tried where the given one spills, and one of them is taken only if it spills less.
Wanted, in this order: the fewest bytes on the disk, the fewest on the CPU, the fewest GPUs, the least cost of the
places where one GPU's pieces end and the next one's begin, and as much as possible on the earlier GPUs.

Room is also needed to run what is offloaded. If anything is on CPU or disk, the first GPU that holds pieces keeps room
for the largest layer there; if anything is on the disk, the CPU keeps room for the largest layer on the disk, unless
it holds nothing.

Why this is exact: pieces have bytes, and no layer is larger than its piece. So where the GPUs end at piece `a`, the
CPU ends best at the last piece `b` that it has room for, which grows with `a`: the bytes on the disk, and for the same
`b` those on the CPU, shrink as `a` grows: the largest possible `a` is best. A smaller `a` may be impossible where a
larger one is possible, since it may need a larger reserve, so they are tried from the last piece on.
"""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import factorial, prod

# Orders of GPUs that are tried: all of five different ones.
MAX_ORDERS = 120


@dataclass(frozen=True)
class Piece:
    """What is never split. `num_bytes` > 0; `layer_bytes` <= `num_bytes`: the room that its largest layer needs to run;
    `cut_cost`: the cost of a GPU border right before it."""

    num_bytes: int
    layer_bytes: int
    cut_cost: int = 0


@dataclass(frozen=True, order=True)
class _Cuts:
    """Where each GPU's pieces end, the first GPU's first. Less is better: few GPUs, cheap borders, full early GPUs."""

    num_gpus: int
    cost: int
    minus_ends: tuple[int, ...]

    @property
    def wish(self) -> tuple[int, int]:
        """What orders of the GPUs are compared by."""
        return self.num_gpus, self.cost


@dataclass(frozen=True)
class _Sums:
    """Of each number of pieces: the bytes of so many (`before`), and the largest layer of the others (`reserve`)."""

    before: Sequence[int]
    reserve: Sequence[int]

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "_Sums":
        before = [0, *accumulate(piece.num_bytes for piece in pieces)]
        return cls(before, [*accumulate((piece.layer_bytes for piece in reversed(pieces)), max, initial=0)][::-1])


def place_in_best_order(pieces: Sequence[Piece], *, gpu_bytes: Sequence[int], cpu_bytes: int) -> list[int]:
    """Like `place`, also with the GPUs in another order if the given one spills and the other spills less.

    Only GPUs with room are in an order, and equal ones are interchangeable. With more than MAX_ORDERS orders the given
    one counts. Among orders that spill alike: the fewest GPUs, then the cheapest borders, then the first in the order
    of the numbers.
    """
    given = place(pieces, gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes)
    most = sum(device < len(gpu_bytes) for device in given)
    gpus = [gpu for gpu, num_bytes in enumerate(gpu_bytes) if num_bytes > 0]
    if most == len(pieces) or not 1 < _num_orders([gpu_bytes[gpu] for gpu in gpus]) <= MAX_ORDERS:
        return given
    sums = _Sums.of(pieces)
    best: tuple[int, _Cuts, list[int]] | None = None
    for order in _orders(gpus, gpu_bytes):
        room = [gpu_bytes[gpu] for gpu in order]
        count, cuts = _gpu_cuts(pieces, sums, room, at_least=most + 1 if best is None else best[0])
        if cuts is not None and (best is None or (-count, *cuts.wish) < (-best[0], *best[1].wish)):
            best = (count, cuts, order)
    if best is None:
        return given
    order = [*best[2], *(gpu for gpu in range(len(gpu_bytes)) if gpu not in best[2])]
    found = place(pieces, gpu_bytes=[gpu_bytes[gpu] for gpu in order], cpu_bytes=cpu_bytes)
    return [order[device] if device < len(order) else device for device in found]


def _num_orders(sizes: Sequence[int]) -> int:
    return factorial(len(sizes)) // prod(factorial(count) for count in Counter(sizes).values())


def _orders(gpus: Sequence[int], gpu_bytes: Sequence[int]) -> Iterator[list[int]]:
    """All orders of these GPUs, the given one first; equal ones keep theirs."""
    if not gpus:
        yield []
    tried: set[int] = set()
    for place_of, gpu in enumerate(gpus):
        if gpu_bytes[gpu] not in tried:
            tried.add(gpu_bytes[gpu])
            for rest in _orders([*gpus[:place_of], *gpus[place_of + 1 :]], gpu_bytes):
                yield [gpu, *rest]


def place(pieces: Sequence[Piece], *, gpu_bytes: Sequence[int], cpu_bytes: int) -> list[int]:
    """The device of each piece: 0 and up for the GPUs, len(gpu_bytes) for the CPU, one more for the disk."""
    sums = _Sums.of(pieces)
    before, reserve = sums.before, sums.reserve
    on_gpus, cuts = _gpu_cuts(pieces, sums, gpu_bytes, at_least=1)
    ends = [0] * len(gpu_bytes) if cuts is None else [-end for end in cuts.minus_ends]
    # The room needed up to a piece never shrinks from one piece to the next: see "Why this is exact".
    needed = [before[end] + reserve[end] for end in range(on_gpus, len(pieces) + 1)]
    cpu_end = on_gpus + max(0, bisect_right(needed, cpu_bytes + before[on_gpus]) - 1)
    counts = [end - start for start, end in pairwise([0, *ends, cpu_end, len(pieces)])]
    return [device for device, count in enumerate(counts) for _ in range(count)]


def _gpu_cuts(
    pieces: Sequence[Piece], sums: _Sums, gpu_bytes: Sequence[int], *, at_least: int
) -> tuple[int, _Cuts | None]:
    """The most pieces that the GPUs can hold, and the best way to do so; 0 if they cannot hold `at_least` so many."""
    before, reserve = sums.before, sums.reserve
    for count in range(min(len(pieces), bisect_right(before, sum(gpu_bytes)) - 1), at_least - 1, -1):
        options = [
            _partition(pieces[:count], before, room, first)
            for first, room in _rooms(gpu_bytes, reserve[count], before[1])
            if _fits(before, count, room)
        ]
        found = [cuts for cuts in options if cuts is not None]
        if found:
            return count, min(found)
    return 0, None


def _rooms(gpu_bytes: Sequence[int], reserve: int, first_piece: int) -> list[tuple[int | None, list[int]]]:
    """The room on each GPU for each choice of the first GPU that holds pieces, which keeps the reserve and has room for
    the first piece. Without a reserve there is nothing to choose (None)."""
    if reserve == 0:
        return [(None, list(gpu_bytes))]
    return [
        (first, [0] * first + [num_bytes - reserve, *gpu_bytes[first + 1 :]])
        for first, num_bytes in enumerate(gpu_bytes)
        if num_bytes - reserve >= first_piece
    ]


def _fits(before: Sequence[int], count: int, room: Sequence[int]) -> bool:
    """Whether the first `count` pieces fit: filling each GPU as far as it goes leaves the least for the others."""
    end = 0
    for num_bytes in room:
        end = max(end, bisect_right(before, before[end] + num_bytes) - 1)
    return end >= count


def _partition(pieces: Sequence[Piece], before: Sequence[int], room: Sequence[int], first: int | None) -> _Cuts | None:
    """The best way to hold all these pieces with the GPU `first` as the first that holds any, if there is a way.

    Dynamic programming over the GPUs: `best[end]` is the best way to hold the pieces up to `end` on the GPUs so far.
    The starts from which a GPU reaches `end` are a window that only moves forwards, so each needs one look.
    """
    best: list[_Cuts | None] = [_Cuts(0, 0, ()), *[None] * len(pieces)]
    for gpu, num_bytes in enumerate(room):
        following = [_skip_gpu(cuts, end) for end, cuts in enumerate(best)]
        window: deque[tuple[_Cuts, int]] = deque()
        for end in range(1, len(pieces) + 1):
            _add_start(window, pieces, best, end - 1)
            while window and before[end] - before[window[0][1]] > num_bytes:
                window.popleft()
            if window:
                start = window[0][0]
                used = _Cuts(start.num_gpus + 1, start.cost, (*start.minus_ends, -end))
                skipped = following[end]
                following[end] = used if skipped is None else min(used, skipped)
        if gpu == first:
            following[0] = None
        best = following
    return best[-1]


def _skip_gpu(cuts: _Cuts | None, end: int) -> _Cuts | None:
    return None if cuts is None else _Cuts(cuts.num_gpus, cuts.cost, (*cuts.minus_ends, -end))


def _add_start(
    window: deque[tuple[_Cuts, int]], pieces: Sequence[Piece], best: Sequence[_Cuts | None], start: int
) -> None:
    """Let a GPU begin at `start`, at the cost of a border there; starts that are no better and end sooner go."""
    cuts = best[start]
    if cuts is None:
        return
    cost = pieces[start].cut_cost if start else 0
    entry = _Cuts(cuts.num_gpus, cuts.cost + cost, cuts.minus_ends)
    while window and window[-1][0] >= entry:
        window.pop()
    window.append((entry, start))
