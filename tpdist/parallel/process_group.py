"""Real groups of ranks over torch.distributed, and the store through which ranks find each other.

The only home of torch.distributed. It knows nothing of models, of nodes, or of who decided the ranks. gloo takes its
network interface from GLOO_SOCKET_IFNAME and NCCL from NCCL_SOCKET_IFNAME, which the process that starts a rank sets.

None of these sockets is authenticated: bind the store to the interface of the cluster, see docs/security.md.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

__all__ = [
    "ProcessGroup",
    "Store",
    "agree_minimum",
    "connect",
    "create_store",
    "disconnect",
    "environment_store",
    "sub_store",
    "wait_for_all",
]

from tpdist.errors import JoinError
from tpdist.parallel.group import PeerLostError, RankGroup, SingleGroup, pad_last_dim, sum_in_rank_order


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
        self._buffers: dict[torch.dtype, Tensor] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        if not self._on_host:
            self._call("all_reduce", x, lambda: dist.all_reduce(x, group=self._group))
            return x
        part = x.cpu().contiguous()
        parts = self._buffer(part)
        self._call("all_reduce", x, lambda: dist.all_gather(list(parts), part, group=self._group))
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
                f"answer in time ({_first_line(error)})"
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
) -> RankGroup:
    """Join the process group of all ranks, and return this rank's tensor-parallel group.

    Tensor-parallel groups are runs of `tp_size` consecutive ranks. Every rank must call it with the same sizes.
    `timeout_s` is the deadline of connecting and of every collective thereafter. With `device`, this rank's GPU, NCCL
    connects here and not at the first collective. Raises PeerLostError.
    """
    assert world_size % tp_size == 0, f"{world_size} ranks in groups of {tp_size}"
    if world_size == 1:
        return SingleGroup()
    timeout = timedelta(seconds=timeout_s)
    with _reported(f"connecting rank {rank} to the other {world_size - 1} ranks over {backend}", timeout_s):
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
        )
        if tp_size == 1:
            return SingleGroup()
        if tp_size == world_size:
            assert dist.group.WORLD is not None
            return ProcessGroup(dist.group.WORLD)
        # Every rank has to take part in making each group, in the same order.
        starts = range(0, world_size, tp_size)
        groups = [dist.new_group(list(range(start, start + tp_size)), timeout=timeout) for start in starts]
        return ProcessGroup(groups[rank // tp_size])


def disconnect() -> None:
    """Leave the process group, if there is one. After a PeerLostError end the process instead: NCCL may wait here."""
    if dist.is_initialized():
        dist.destroy_process_group()


def create_store(
    *, host: str, port: int, world_size: int, is_master: bool, listen_fd: int | None, timeout_s: float
) -> TCPStore:
    """Open the key-value store that rank 0 (`is_master`) serves at host:port and everybody, rank 0 too, connects to.

    host: an address of the master as this rank reaches it. listen_fd (master only): an inherited socket that listens on
    `port` already, so that the port cannot be lost to another process; the store owns it from now on.
    Does not wait for the others. Raises JoinError.
    """
    assert is_master or listen_fd is None, "only the master listens"
    try:
        return TCPStore(
            host,
            port,
            world_size=world_size,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listen_fd,
        )
    except RuntimeError as error:
        raise JoinError(
            f"{'cannot serve' if is_master else 'cannot reach'} the store at {host}:{port} within {timeout_s:g} s "
            f"({_first_line(error)}): open this TCP port of the head, or fix another with TPDIST_STORE_PORT"
        ) from error


def environment_store(*, timeout_s: float) -> Store:
    """The store that torchrun made and its environment variables name. Raises JoinError."""
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
    except (RuntimeError, ValueError) as error:
        raise JoinError(f"cannot reach torchrun's store within {timeout_s:g} s ({_first_line(error)})") from error
    assert isinstance(store, Store)
    return store


def sub_store(store: Store, prefix: str) -> Store:
    """A view of `store` in which keys begin with `prefix`."""
    return PrefixStore(prefix, store)


def wait_for_all(store: Store, *, key: str, rank: int, world_size: int, timeout_s: float) -> None:
    """Return once every rank has called this with the same key; a key serves once.

    Through the store and not a collective, so that a slow phase has its own deadline. Raises PeerLostError that names
    the missing ranks.
    """
    _exchange(store, key=key, value="here", rank=rank, world_size=world_size, timeout_s=timeout_s)


def agree_minimum(store: Store, *, key: str, value: int, rank: int, world_size: int, timeout_s: float) -> int:
    """The smallest of all ranks' values, on every rank. Waits and raises as wait_for_all."""
    values = _exchange(store, key=key, value=str(value), rank=rank, world_size=world_size, timeout_s=timeout_s)
    return min(int(each) for each in values)


def _exchange(store: Store, *, key: str, value: str, rank: int, world_size: int, timeout_s: float) -> list[bytes]:
    keys = [f"{key}/{each}" for each in range(world_size)]
    with _reported(f"{key!r} on rank {rank}", timeout_s):
        store.set(keys[rank], value)
        try:
            store.wait(keys, timedelta(seconds=timeout_s))
        except dist.DistStoreError as error:
            missing = [each for each in range(world_size) if not store.check([keys[each]])]
            raise PeerLostError(f"{key!r}: no word from ranks {missing} within {timeout_s:g} s") from error
        return store.multi_get(keys)


@contextmanager
def _reported(what: str, timeout_s: float) -> Iterator[None]:
    """Turn torch.distributed's errors (all are RuntimeErrors) into PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"{what} failed, deadline {timeout_s:g} s ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
