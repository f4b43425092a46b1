"""Which ranks of a group share memory, and a group of several hosts, each of which does.

It knows neither how ranks of one host exchange tensors (shared_memory.py) nor how hosts do (process_group.py).
"""

import logging
from collections.abc import Callable, Sequence
from itertools import groupby

from torch import Tensor

from tpdist.parallel import segment
from tpdist.parallel.group import RankGroup, SingleGroup
from tpdist.parallel.segment import Segment
from tpdist.parallel.shared_memory import SharedMemoryGroup
from tpdist.parallel.store import Store, exchange

logger = logging.getLogger(__name__)


class HostsGroup(RankGroup):
    """Ranks of several hosts: collectives go through memory inside each host, and over the wire between first ranks.

    all_reduce adds up each host's ranks in rank order, and then the hosts' sums in the order of their ranks; in 16 bits
    it rounds once for each host and once for the total. Only the first ranks add the hosts' sums up, all the same way,
    and the others copy theirs, so that all hold equal bits.
    """

    def __init__(
        self, *, hosts: Sequence[Sequence[int]], rank: int, inside: RankGroup, across: RankGroup | None
    ) -> None:
        """hosts: the ranks of each, consecutive numbers from 0. inside: this rank's host; across: the hosts' first
        ranks, on those; None on the others."""
        super().__init__(rank=rank, size=sum(map(len, hosts)))
        self._hosts = hosts
        self._host = next(host for host in hosts if rank in host)
        self._inside = inside
        self._across = across

    def all_reduce(self, x: Tensor) -> Tensor:
        x = self._inside.all_reduce(x)
        if self._across is not None:
            x = self._across.all_reduce(x)
        return self._inside.broadcast(x)

    def gather(self, x: Tensor, *, sizes: Sequence[int]) -> Tensor | None:
        assert len(sizes) == self.size, f"sizes {tuple(sizes)} for {self.size} ranks"
        gathered = self._inside.gather(x, sizes=[sizes[rank] for rank in self._host])
        if gathered is None or self._across is None:
            return None
        return self._across.gather(gathered, sizes=[sum(sizes[rank] for rank in host) for host in self._hosts])

    def broadcast(self, x: Tensor) -> Tensor:
        if self._across is not None:
            x = self._across.broadcast(x)
        return self._inside.broadcast(x)


def group_hosts(host_ids: Sequence[str]) -> list[list[int]]:
    """Runs of consecutive places with the same id; a place with an empty id stands alone.

    Runs, and not all places with that id, so that what the hosts hold can be joined in rank order.
    """
    keys = [host_id or place for place, host_id in enumerate(host_ids)]
    return [list(run) for _, run in groupby(range(len(keys)), key=keys.__getitem__)]


def share_memory(
    store: Store, *, rank: int, ranks: Sequence[int], host_id: str, timeout_s: float
) -> tuple[list[list[int]], RankGroup] | None:
    """Find the ranks of this one's host and share memory with them.

    Every one of `ranks` must call it, with its own host_id. Returns the places in `ranks` of each host's ranks, and the
    group of this rank's host; None on all ranks if all hosts have one rank, or if some rank could not attach, which the
    first rank logs. Raises PeerLostError.
    """

    def tell(key: str, value: str) -> list[str]:
        return exchange(store, key=f"shared_memory/{key}", value=value, rank=rank, ranks=ranks, timeout_s=timeout_s)

    hosts = group_hosts(tell("host", host_id))
    if len(hosts) == len(ranks):
        return None
    place = ranks.index(rank)
    host = next(each for each in hosts if place in each)
    member, size, memory, failure = host.index(place), len(host), None, ""
    if member == 0 and size > 1:
        memory, failure = _attempt(lambda: segment.create(size=size, timeout_s=timeout_s))
    address = tell("address", "" if memory is None else memory.address)[host[0]]
    if member > 0:
        memory, failure = _attempt(lambda: segment.attach(address, member=member, size=size, timeout_s=timeout_s))
    failures = [f"rank {each}: {why}" for each, why in zip(ranks, tell("attached", failure), strict=True) if why]
    if failures and place == 0:
        logger.warning("ranks %s do not share memory and use gloo, which is slower: %s", list(ranks), failures[0])
    if failures:
        return None
    inside = SingleGroup() if memory is None else SharedMemoryGroup(memory, ranks=[ranks[each] for each in host])
    return hosts, inside


def _attempt(join: Callable[[], Segment]) -> tuple[Segment | None, str]:
    """What `join` returns, or why it could not."""
    try:
        return join(), ""
    except OSError as error:
        return None, str(error)
