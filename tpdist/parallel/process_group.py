"""Real groups of ranks: over torch.distributed, and through shared memory where ranks stand on one host.

It knows nothing of models, of nodes, or of who decided the ranks. gloo takes its network interface from
GLOO_SOCKET_IFNAME and NCCL from NCCL_SOCKET_IFNAME, which the process that starts a rank sets. Their sockets are not
authenticated, see docs/security.md.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tpdist.parallel.group import PeerLostError, RankGroup, SingleGroup, pad_last_dim, sum_in_rank_order
from tpdist.parallel.hosts import HostsGroup, share_memory
from tpdist.parallel.segment import machine_id
from tpdist.parallel.store import Store, first_line, reported


class ProcessGroup(RankGroup):
    """The ranks of one torch.distributed group, each in a process of its own.

    gloo: all_reduce is an all_gather and a sum in rank order, because gloo's own ring adds each element in an order
    that depends on its place, and in 16 bits rounds after every addition: then ranks would agree with each other, but
    not with an unsharded model. Costs (size - 1) * bytes per rank received. CUDA tensors are staged through the host.
    nccl: native. It reports a lost peer late, from its watchdog; the agents notice first and end the epoch.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(rank=group.rank(), size=group.size())
        self._group = group
        self._on_host = dist.get_backend(group) == "gloo"
        self.capturable = not self._on_host
        self._buffers: dict[torch.dtype, Tensor] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        if not self._on_host:
            self._call("all_reduce", x, lambda: dist.all_reduce(x, group=self._group))
            return x
        if not x.is_cpu:
            return x.copy_(self.all_reduce(x.cpu()))
        part = x.contiguous()
        parts = list(self._buffer(part))
        self._call("all_reduce", x, lambda: dist.all_gather(parts, part, group=self._group))
        return sum_in_rank_order(parts, out=x)

    def gather(self, x: Tensor, *, sizes: Sequence[int]) -> Tensor | None:
        assert len(sizes) == self.size, f"sizes {tuple(sizes)} for {self.size} ranks"
        assert sizes[self.rank] == x.shape[-1], f"rank {self.rank} of sizes {tuple(sizes)}, shard {tuple(x.shape)}"
        shard = pad_last_dim(x.cpu() if self._on_host else x, max(sizes))
        shards = [torch.empty_like(shard) for _ in sizes] if self.rank == 0 else None
        self._call("gather", x, lambda: dist.gather(shard, shards, group=self._group, group_dst=0))
        if shards is None:
            return None
        return torch.cat([each[..., :size] for each, size in zip(shards, sizes, strict=True)], dim=-1).to(x.device)

    def broadcast(self, x: Tensor) -> Tensor:
        staged = (x.cpu() if self._on_host else x).contiguous()
        self._call("broadcast", x, lambda: dist.broadcast(staged, group=self._group, group_src=0))
        return x if staged is x else x.copy_(staged)

    def _buffer(self, part: Tensor) -> Tensor:
        """[size, *part.shape], reused between calls and grown when needed."""
        needed = self.size * part.numel()
        buffer = self._buffers.get(part.dtype)
        if buffer is None or buffer.numel() < needed:
            buffer = self._buffers[part.dtype] = torch.empty(needed, dtype=part.dtype)
        return buffer[:needed].view(self.size, *part.shape)

    def _call(self, name: str, x: Tensor, collective: Callable[[], object]) -> None:
        try:
            collective()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PeerLostError(
                f"{name} of {tuple(x.shape)} failed on rank {self.rank} of {self.size}: a peer has gone or did not "
                f"answer in time ({first_line(error)})"
            ) from error


def connect(
    *,
    rank: int,
    world_size: int,
    tp_size: int,
    backend: str,
    store: Store,
    timeout_s: float,
    device: torch.device | None = None,
    host_id: str | None = None,
) -> RankGroup:
    """Join the process group of all ranks, and return this rank's tensor-parallel group.

    Tensor-parallel groups are runs of `tp_size` consecutive ranks. Every rank must call it with the same sizes.
    `timeout_s` is the deadline of connecting and of every collective thereafter. With `device`, this rank's GPU, NCCL
    connects here and not at the first collective. With gloo, ranks of equal `host_id` (default: of this machine) share
    memory; an empty one shares with nobody. Raises PeerLostError.
    """
    assert world_size % tp_size == 0, f"{world_size} ranks in groups of {tp_size}"
    if world_size == 1:
        return SingleGroup()
    timeout = timedelta(seconds=timeout_s)
    with reported(f"connecting rank {rank} to the other {world_size - 1} ranks over {backend}", timeout_s):
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
        )
        if tp_size == 1:
            return SingleGroup()
        if backend == "gloo":
            first = rank - rank % tp_size
            ranks = range(first, first + tp_size)
            host_id = machine_id() if host_id is None else host_id
            return _on_hosts(store, rank=rank, ranks=ranks, host_id=host_id, timeout_s=timeout_s)
        if tp_size == world_size:
            assert dist.group.WORLD is not None
            return ProcessGroup(dist.group.WORLD)
        # Every rank has to take part in making each group, in the same order.
        starts = range(0, world_size, tp_size)
        groups = [dist.new_group(list(range(start, start + tp_size)), timeout=timeout) for start in starts]
        return ProcessGroup(groups[rank // tp_size])


def _on_hosts(store: Store, *, rank: int, ranks: Sequence[int], host_id: str, timeout_s: float) -> RankGroup:
    """The group of `ranks`: through shared memory inside each host, and over gloo across hosts."""
    shared = share_memory(store, rank=rank, ranks=ranks, host_id=host_id, timeout_s=timeout_s)
    if shared is None:
        return _gloo_group(ranks, timeout_s)
    hosts, inside = shared
    if len(hosts) == 1:
        return inside
    leaders = [ranks[host[0]] for host in hosts]
    across = _gloo_group(leaders, timeout_s) if rank in leaders else None
    return HostsGroup(hosts=hosts, rank=ranks.index(rank), inside=inside, across=across)


def _gloo_group(ranks: Sequence[int], timeout_s: float) -> ProcessGroup:
    """All of `ranks`, and nobody else, must call it."""
    group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return ProcessGroup(group)


def disconnect() -> None:
    """Leave the process group, if there is one. After a PeerLostError end the process instead: NCCL may wait here."""
    if dist.is_initialized():
        dist.destroy_process_group()
