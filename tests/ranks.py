"""Run a function on several ranks at once, each in a process of its own, over gloo on loopback.

    def both_ranks_add_up(group: RankGroup, start: int) -> list[float]:
        return group.all_reduce(torch.tensor([start + group.rank])).tolist()

    def test_...():
        assert run_ranks(both_ranks_add_up, 2, 10) == [[21], [21]]

The function must stand at the top level of a module; arguments and results travel between processes.
"""

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from tpdist.parallel.group import RankGroup
from tpdist.parallel.process_group import connect, disconnect
from tpdist.parallel.store import create_store

# After the first rank has failed, the others get this long to say what they saw of it.
GRACE_S = 5.0
COLLECTIVE_TIMEOUT_S = 60.0


class RanksFailed(Exception):
    """At least one rank raised, died or did not end; the message holds what is known of each."""


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one run meet."""

    port: int
    world_size: int


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    deadline_s: float = 120,
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
) -> list[Any]:
    """Call fn(group, *args) on every rank and return the results in rank order.

    Raises RanksFailed with the tracebacks of all ranks that failed. Nothing outlives the call.
    """
    return run_processes(_connected, world_size, fn, collective_timeout_s, *args, deadline_s=deadline_s)


def run_processes(fn: Callable[..., Any], world_size: int, *args: Any, deadline_s: float = 120) -> list[Any]:
    """As run_ranks, but call fn(rank, meeting, *args) and leave connecting to it."""
    server = create_store(
        host="127.0.0.1", port=0, world_size=world_size, is_master=True, listen_fd=None, timeout_s=deadline_s
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    meeting = Meeting(port=server.port, world_size=world_size)
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(target=_main, args=(sender, fn, rank, meeting, args), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        return _collect(processes, pipes, deadline_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def open_store(meeting: Meeting, *, timeout_s: float = 30) -> Any:
    """A client of the store that the parent process serves."""
    return create_store(
        host="127.0.0.1",
        port=meeting.port,
        world_size=meeting.world_size,
        is_master=False,
        listen_fd=None,
        timeout_s=timeout_s,
    )


def _connected(rank: int, meeting: Meeting, fn: Callable[..., Any], timeout_s: float, *args: Any) -> Any:
    size = meeting.world_size
    group: RankGroup = connect(
        rank=rank, world_size=size, tp_size=size, backend="gloo", store=open_store(meeting), timeout_s=timeout_s
    )
    result = fn(group, *args)
    disconnect()
    return result


def _main(sender: Connection, fn: Callable[..., Any], rank: int, meeting: Meeting, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        answer = pickle.dumps((True, fn(rank, meeting, *args)))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        sys.exit(1)
    sender.send_bytes(answer)


def _collect(processes: Sequence[BaseProcess], pipes: Sequence[Connection], deadline_s: float) -> list[Any]:
    answers: dict[int, tuple[bool, Any]] = {}
    ends = time.monotonic() + deadline_s
    while waiting := [rank for rank in range(len(pipes)) if rank not in answers]:
        ready = wait([pipes[rank] for rank in waiting], timeout=max(0.0, ends - time.monotonic()))
        for rank in waiting:
            if pipes[rank] in ready:
                answers[rank] = _answer(processes[rank], pipes[rank])
            elif not ready:
                answers[rank] = (False, f"did not end within {deadline_s:g} s\n")
        if not all(succeeded for succeeded, _ in answers.values()):
            ends = min(ends, time.monotonic() + GRACE_S)
    failed = {rank: value for rank, (succeeded, value) in sorted(answers.items()) if not succeeded}
    if failed:
        raise RanksFailed("\n" + "\n".join(f"rank {rank}: {value}" for rank, value in failed.items()))
    return [answers[rank][1] for rank in range(len(pipes))]


def _answer(process: BaseProcess, pipe: Connection) -> tuple[bool, Any]:
    """Plain pickle, since torch's own would share memory with a process that is about to end."""
    try:
        succeeded, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        return False, f"ended with exit code {process.exitcode}\n"
    return succeeded, value
