"""What one node does for an examination: its own findings, and the work that the head asks for.

Whatever may hang runs in a child that is killed at its deadline, or on a socket that has one.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from tpdist.control.child import describe_exit, output_of_module
from tpdist.control.listening import listening_socket
from tpdist.control.messages import ProbeReport
from tpdist.control.supervisor import interface_variables
from tpdist.preflight.link import LinkError, answer_peers, measure
from tpdist.preflight.machine import limits
from tpdist.preflight.words import (
    Answer,
    Failed,
    Findings,
    Listen,
    ModelFound,
    Port,
    Reach,
    Reduce,
    ReduceFigures,
    Work,
)

PROBE_S = 60.0
MODEL_S = 60.0
GRACE_S = 15.0
"""A child imports torch first, and the ranks' own deadline names more than ours."""


class RankOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one rank of an all-reduce is told. `listen_fd` (rank 0): an inherited socket that listens on `port`."""

    rank: int
    local_rank: int
    world_size: int
    backend: str
    host: str
    port: int
    listen_fd: int | None
    timeout_s: float
    parent_pid: int


@dataclass(frozen=True)
class _Ended:
    """How a child ended: its output, or why there is none (what it said last, or that it did not end in time)."""

    output: bytes = b""
    problem: str = ""
    exit_code: int = 0


class Station:
    """This node's part in an examination. `environ` is what children inherit."""

    def __init__(self, *, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._answering: asyncio.Task[None] | None = None
        self._sockets: list[socket.socket] = []
        self._store: socket.socket | None = None

    async def findings(self, model: str | None, *, revision: str | None, explicit: Mapping[str, object]) -> Findings:
        """What this node is by itself; problems are findings too."""
        probed, read = await asyncio.gather(self._probe(), self._examine_model(model, revision))
        return Findings(
            limits=limits(),
            probe=msgspec.json.decode(probed.output, type=ProbeReport) if probed.output else None,
            probe_problem=probed.problem,
            model=msgspec.json.decode(read.output, type=ModelFound) if read.output else None,
            model_problem=read.problem,
            model_exit_code=read.exit_code,
            explicit=dict(explicit),
        )

    async def carry_out(self, work: Work) -> Answer:
        """Do what the head asks for. A failure is an answer."""
        try:
            match work:
                case Listen():
                    return self._listen(work)
                case Reach():
                    return await asyncio.to_thread(measure, work.host, work.port, work.token)
                case Reduce():
                    return await self._reduce(work)
        except (OSError, LinkError) as error:
            return Failed(problem=str(error))

    def open_store(self, host: str, port: int) -> int:
        """Listen for the ranks of an all-reduce whose rank 0 is to run here; returns the port. Raises OSError."""
        self._store = listening_socket(host, port)
        self._sockets.append(self._store)
        return int(self._store.getsockname()[1])

    async def close(self) -> None:
        """Stop listening."""
        if self._answering is not None:
            self._answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._answering
        for each in self._sockets:
            each.close()

    async def _probe(self) -> "_Ended":
        return await self._child("tpdist.probe", "--json", timeout_s=PROBE_S)

    async def _examine_model(self, model: str | None, revision: str | None) -> "_Ended":
        if model is None:
            return _Ended()
        words = ["tpdist.preflight.model_files", model, "--parent-pid", str(os.getpid())]
        words += [] if revision is None else ["--revision", revision]
        return await self._child(*words, timeout_s=MODEL_S)

    def _listen(self, work: Listen) -> Port:
        listener = listening_socket(work.host)
        self._sockets.append(listener)
        self._answering = asyncio.create_task(answer_peers(listener, work.token))
        return Port(port=listener.getsockname()[1])

    async def _reduce(self, work: Reduce) -> ReduceFigures | Failed:
        """Of this node's ranks the slowest figures, or the first failure."""
        answers = await asyncio.gather(*(self._rank(work, index) for index in range(work.num_ranks)))
        if work.first_rank == 0 and self._store is not None:
            self._store.close()
            self._store = None
        failed = [each for each in answers if isinstance(each, Failed)]
        if failed:
            return failed[0]
        figures = [each for each in answers if isinstance(each, ReduceFigures)]
        return ReduceFigures(
            small_s=max(each.small_s for each in figures), large_s=max(each.large_s for each in figures)
        )

    async def _rank(self, work: Reduce, local_rank: int) -> ReduceFigures | Failed:
        rank = work.first_rank + local_rank
        fds = (self._store.fileno(),) if rank == 0 and self._store is not None else ()
        order = RankOrder(
            rank=rank,
            local_rank=local_rank,
            world_size=work.world_size,
            backend=work.backend,
            host=work.host,
            port=work.port,
            listen_fd=fds[0] if fds else None,
            timeout_s=work.timeout_s,
            parent_pid=os.getpid(),
        )
        interface = {} if work.interface is None else interface_variables(work.interface)
        ended = await self._child(
            "tpdist.preflight.collective",
            msgspec.json.encode(order).decode(),
            timeout_s=work.timeout_s + GRACE_S,
            environ={**interface, **self._environ},
            pass_fds=fds,
        )
        return Failed(problem=ended.problem) if ended.problem else msgspec.json.decode(ended.output, type=ReduceFigures)

    async def _child(
        self,
        *words: str,
        timeout_s: float,
        environ: Mapping[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> "_Ended":
        try:
            code, output, said = await output_of_module(
                *words, timeout_s=timeout_s, environ=environ or self._environ, pass_fds=pass_fds
            )
        except TimeoutError:
            return _Ended(problem=f"`python -m {words[0]}` did not end within {timeout_s:g} s and was killed")
        if code == 0:
            return _Ended(output=output)
        last = next(iter(said.splitlines()[::-1]), f"`python -m {words[0]}` {describe_exit(code)}")
        return _Ended(problem=last, exit_code=max(code, 0))
