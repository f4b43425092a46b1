"""A group whose rank notes each collective that it enters and leaves, so that one that hangs in it can be told from
one that waits for it."""

from collections.abc import Sequence

from torch import Tensor

from tpdist.control.progress import WAITS, Watch
from tpdist.parallel.group import RankGroup

ALL_REDUCE, GATHER, BROADCAST = (WAITS.index(name) for name in ("all_reduce", "gather", "broadcast"))


class WatchedGroup(RankGroup):
    """`group`, with every collective noted in `watch`."""

    def __init__(self, group: RankGroup, watch: Watch) -> None:
        super().__init__(rank=group.rank, size=group.size)
        self.capturable = group.capturable
        self._group = group
        self._watch = watch

    def all_reduce(self, x: Tensor) -> Tensor:
        self._watch.enter(ALL_REDUCE)
        x = self._group.all_reduce(x)
        self._watch.leave()
        return x

    def gather(self, x: Tensor, *, sizes: Sequence[int]) -> Tensor | None:
        self._watch.enter(GATHER)
        gathered = self._group.gather(x, sizes=sizes)
        self._watch.leave()
        return gathered

    def broadcast(self, x: Tensor) -> Tensor:
        self._watch.enter(BROADCAST)
        x = self._group.broadcast(x)
        self._watch.leave()
        return x
