"""How the ranks of one epoch find each other: listening sockets, the store, the process group, the step plans' socket.

Rank 0 listens and says where; its agent and the head pass that on; then everybody connects. It knows nothing of what
ranks do once they have met.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from tpdist.control.channel import ClusterKeys, Codec, Dealer, Router, tcp_address, wait_any
from tpdist.control.listening import listening_socket
from tpdist.control.messages import Connect, Listening, Message, RankHello, RankStart, RankStop
from tpdist.errors import JoinError, SettingsError
from tpdist.parallel.group import RankGroup, SingleGroup
from tpdist.parallel.process_group import connect
from tpdist.parallel.store import Store, create_store

MakeStore = Callable[[RankStart, Connect, int | None], Store]
Expected = TypeVar("Expected", bound=Message)


class RankStopped(Exception):
    """The agent told this rank to end while it waited for something else: a reason to go, not an error."""


@dataclass(frozen=True)
class Peers:
    """What a rank has once all have met. A rank that is alone has no store; `plans` is rank 0's, `plan_link` the
    others'."""

    group: RankGroup
    store: Store | None = None
    plans: Router | None = None
    plan_link: Dealer | None = None


def meet(
    link: Dealer, start: RankStart, *, keys: ClusterKeys | None, make_store: MakeStore, device: torch.device
) -> Peers:
    """Meet the other ranks. Every rank of the epoch must call it; it returns when all have.

    Raises JoinError naming who did not come in time, SettingsError when a port is taken, RankStopped.
    """
    assign = start.assign
    if assign.world_size == 1:
        return Peers(SingleGroup())
    plans, plan_link, listen_fd = None, None, None
    if start.rank == 0:
        plans, listen_fd = _listen(link, start, keys)
    ports = expect(link, Connect, timeout_s=assign.load_timeout_s)
    store = make_store(start, ports, listen_fd)
    if plans is not None:
        others = {plan_identity(rank) for rank in range(1, assign.world_size)}
        plans.wait_for(others, timeout_s=assign.load_timeout_s)
    else:
        plan_link = _open_plan_link(start, ports, keys)
    group = connect(
        rank=start.rank,
        world_size=assign.world_size,
        tp_size=assign.tp_size,
        backend=assign.backend,
        store=store,
        timeout_s=assign.collective_timeout_s,
        device=device if assign.backend == "nccl" else None,
    )
    return Peers(group, store, plans, plan_link)


def make_store(start: RankStart, ports: Connect, listen_fd: int | None) -> Store:
    """The store that rank 0 serves to all ranks of the epoch."""
    assign = start.assign
    host = assign.head_host if listen_fd is None else _reachable(assign.bind_host)
    return create_store(
        host=host,
        port=ports.store_port,
        world_size=assign.world_size,
        is_master=start.rank == 0,
        listen_fd=listen_fd,
        timeout_s=assign.load_timeout_s,
    )


def expect(link: Dealer, kind: type[Expected], *, timeout_s: float) -> Expected:
    """Wait for a message of `kind` and drop others. Raises JoinError after `timeout_s`, RankStopped on a RankStop."""
    deadline = time.monotonic() + timeout_s
    while wait_any([link], timeout_s=max(0.0, deadline - time.monotonic())):
        envelope = link.receive()
        if envelope is not None and isinstance(envelope.body, RankStop):
            raise RankStopped
        if envelope is not None and isinstance(envelope.body, kind):
            return envelope.body
    raise JoinError(f"no {kind.__name__} came within {timeout_s:g} s")


def plan_identity(rank: int) -> bytes:
    """How rank 0 tells the others apart."""
    return f"rank-{rank}".encode()


def _listen(link: Dealer, start: RankStart, keys: ClusterKeys | None) -> tuple[Router, int]:
    """Rank 0: open the socket for plans and the one for the store (its descriptor), and say where they are."""
    assign = start.assign
    listener = _listening_socket(assign.bind_host, assign.store_port)
    codec = Codec(cluster_id=assign.cluster_id, epoch=assign.epoch)
    plans = Router(host=assign.bind_host, ipc_address=start.plan_address, codec=codec, keys=keys)
    link.send(Listening(store_port=listener.getsockname()[1], plan_port=plans.port))
    return plans, listener.detach()


def _open_plan_link(start: RankStart, ports: Connect, keys: ClusterKeys | None) -> Dealer:
    """Other ranks: connect to rank 0, over ipc on its own node, and say hello."""
    assign = start.assign
    on_head = assign.node_index == 0
    address = start.plan_address if on_head else tcp_address(assign.head_host, ports.plan_port)
    plan_link = Dealer(
        address=address,
        identity=plan_identity(start.rank),
        codec=Codec(cluster_id=assign.cluster_id, epoch=assign.epoch),
        keys=keys,
    )
    plan_link.send(RankHello(local_rank=start.local_rank, pid=os.getpid()))
    return plan_link


def _listening_socket(host: str, port: int) -> socket.socket:
    """A socket for the store, so that its port is ours before anybody is told of it."""
    try:
        return listening_socket(host, port)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port} for the store: {error.strerror or error}; free the port or set another "
            "with TPDIST_STORE_PORT"
        ) from error


def _reachable(bind_host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind_host, bind_host)
