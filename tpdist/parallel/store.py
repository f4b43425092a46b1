"""The key-value store through which ranks find each other and agree before, and beside, their collectives.

It knows nothing of groups. Its socket is not authenticated: bind it to the interface of the cluster, see
docs/security.md.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from tpdist.errors import JoinError
from tpdist.parallel.group import PeerLostError

__all__ = [
    "Store",
    "agree_minimum",
    "create_store",
    "environment_store",
    "exchange",
    "first_line",
    "reported",
    "sub_store",
    "wait_for_all",
]


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
            f"({first_line(error)}): open this TCP port of the head, or fix another with TPDIST_STORE_PORT"
        ) from error


def environment_store(*, timeout_s: float) -> Store:
    """The store that torchrun made and its environment variables name. Raises JoinError."""
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
    except (RuntimeError, ValueError) as error:
        raise JoinError(f"cannot reach torchrun's store within {timeout_s:g} s ({first_line(error)})") from error
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
    exchange(store, key=key, value="here", rank=rank, ranks=range(world_size), timeout_s=timeout_s)


def agree_minimum(store: Store, *, key: str, value: int, rank: int, world_size: int, timeout_s: float) -> int:
    """The smallest of all ranks' values, on every rank. Waits and raises as wait_for_all."""
    values = exchange(store, key=key, value=str(value), rank=rank, ranks=range(world_size), timeout_s=timeout_s)
    return min(map(int, values))


def exchange(store: Store, *, key: str, value: str, rank: int, ranks: Sequence[int], timeout_s: float) -> list[str]:
    """Tell all of `ranks` this rank's value and return theirs, in the order of `ranks`. Waits and raises as
    wait_for_all."""
    keys = [f"{key}/{each}" for each in ranks]
    with reported(f"{key!r} on rank {rank}", timeout_s):
        store.set(f"{key}/{rank}", value)
        try:
            store.wait(keys, timedelta(seconds=timeout_s))
        except dist.DistStoreError as error:
            missing = [each for each in ranks if not store.check([f"{key}/{each}"])]
            raise PeerLostError(f"{key!r}: no word from ranks {missing} within {timeout_s:g} s") from error
        return [each.decode() for each in store.multi_get(keys)]


@contextmanager
def reported(what: str, timeout_s: float) -> Iterator[None]:
    """Turn torch.distributed's errors (all are RuntimeErrors) into PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"{what} failed, deadline {timeout_s:g} s ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
