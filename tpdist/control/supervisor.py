"""The ranks of one node: starts them, hands them their orders, watches them, ends them.

A rank is `python -m tpdist.worker`; it connects to this node's ipc socket. Under torchrun the ranks exist already and
only connect. A rank that ends without being asked to is reported as a RankGone with its exit code or signal and the
last lines it wrote; nothing here decides what that means for the cluster.

    start, connect   the ranks of one epoch
    progress         how far each is, as it notes itself
    broken           gets the error of a task that fails here; a node cannot go on without
    end_epoch        they are asked to end, then killed; when it returns none is left, and the next epoch may start
    close            end_epoch, and the socket goes
"""

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tpdist.control.channel import AsyncRouter, Codec
from tpdist.control.child import Child
from tpdist.control.messages import (
    Assign,
    Connect,
    Listening,
    Message,
    RankGone,
    RankHello,
    RankProgress,
    RankStart,
    RankStop,
    RankUpdate,
)
from tpdist.control.passing_on import failure_to
from tpdist.control.progress import ProgressFile
from tpdist.errors import LostError
from tpdist.log import LogFormat

logger = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
KILL_GRACE_S = 10.0
REPORT_GRACE_S = 0.5
# Temporaries below this are kept by the allocator and used again; larger ones take long to compute compared with the
# page faults of new memory, and would leave holes.
MAPPED_BYTES = 32 * 1024**2
KEPT_BYTES = 128 * 1024**2


class Supervisor:
    """`report` receives every message of the ranks (RankUpdate, Listening) and every RankGone. `model` is the folder of
    the checkpoint, known once there is an assignment; `threads` is what this node's user set for its ranks."""

    def __init__(
        self,
        *,
        model: Callable[[], str],
        key_file: Path | None,
        engine_address: str,
        run_dir: Path,
        environ: Mapping[str, str],
        threads: int | None,
        log_level: str,
        log_format: LogFormat,
        trace_folder: Path | None,
        spawn: bool,
        report: Callable[[Message], Awaitable[None]],
    ) -> None:
        self._model = model
        self._key_file = None if key_file is None else str(key_file)
        self._engine_address = engine_address
        self._environ = environ
        self._threads = threads
        self._log_level = log_level
        self._log_format = log_format
        self._trace_folder = None if trace_folder is None else str(trace_folder)
        self._spawn = spawn
        self._report = report
        self._plan_address = f"ipc://{run_dir}/plan.sock"
        self._progress_path = run_dir / "progress"
        self._router = AsyncRouter(name="ranks", codec=Codec())
        self.address = self._router.bind(f"ipc://{run_dir}/ranks.sock")
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._listening = self._start_task(self._listen())
        self._closed = False
        self._end_lock = asyncio.Lock()
        self._forget()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(failure_to(self.broken))
        return task

    def _forget(self) -> None:
        """Be ready for the ranks of another epoch."""
        self._assign: Assign | None = None
        self._connect: Connect | None = None
        self._progress: ProgressFile | None = None
        self._hellos: dict[bytes, RankHello] = {}
        self._reported: dict[int, asyncio.Event] = {}
        self._children: list[Child] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False

    async def start(self, assign: Assign) -> None:
        """Start the ranks of an assignment (or, under torchrun, give it to those that have connected)."""
        if self._closed:
            return
        if self._threads is not None:
            assign = msgspec.structs.replace(assign, threads=self._threads)
        self._assign = assign
        self._progress = ProgressFile(
            self._progress_path, first_rank=assign.first_rank, num_ranks=assign.local_world_size
        )
        for local_rank in range(assign.local_world_size):
            self._reported[assign.first_rank + local_rank] = asyncio.Event()
            if self._spawn:
                self._start_child(local_rank, assign)
        for identity, hello in self._hellos.items():
            await self._give_orders(identity, hello)

    async def connect(self, connect: Connect) -> None:
        """Tell every rank, and every rank still to come, where rank 0 listens."""
        self._connect = connect
        for identity in self._hellos:
            await self._router.send(identity, connect)

    def progress(self) -> tuple[RankProgress, ...]:
        """How far the ranks are that have said hello, if all have."""
        hellos = sorted(self._hellos.values(), key=lambda hello: hello.local_rank)
        if self._assign is None or self._progress is None or len(hellos) < self._assign.local_world_size:
            return ()
        return self._progress.read([hello.pid for hello in hellos])

    async def end_epoch(self, *, grace_s: float = STOP_GRACE_S) -> None:
        """Ask the ranks to end, kill those that have not after a grace time, and wait until they are gone. Raises
        LostError when one does not die."""
        async with self._end_lock:
            left = await self._end_ranks(grace_s)
        if left:
            raise LostError(f"processes {left} do not die after SIGKILL, perhaps because a device does not answer")

    async def _end_ranks(self, grace_s: float) -> list[int]:
        """Returns the processes that are left."""
        self._ending = True
        for identity in self._hellos:
            await self._router.send(identity, RankStop())
        await _all_ended(self._children, grace_s)
        for child in self._children:
            child.kill()
        await _all_ended(self._children, KILL_GRACE_S)
        left = [child.pid for child in self._children if not child.exited.done()]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._forget()
        return left

    async def close(self, *, grace_s: float = STOP_GRACE_S) -> None:
        """End the ranks for good. Nothing happens the second time."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.end_epoch(grace_s=grace_s)
        except LostError as error:
            logger.error("%s", error)
        self.broken.cancel()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        self._router.close()

    def _start_child(self, local_rank: int, assign: Assign) -> None:
        rank = assign.first_rank + local_rank
        command = (
            *(sys.executable, "-m", "tpdist.worker", "--agent", self.address),
            *("--local-rank", str(local_rank), "--parent-pid", str(os.getpid())),
        )
        child = Child(command, rank_environment(self._environ, assign), rank=rank, epoch=assign.epoch)
        self._children.append(child)
        self._tasks.append(self._start_task(self._watch(rank, child)))

    async def _watch(self, rank: int, child: Child) -> None:
        """Pass the rank's log on, and report its end if nobody asked for it."""
        relay = self._start_task(child.relay())
        self._tasks.append(relay)
        exit_code = await child.exited
        await asyncio.wait({relay}, timeout=REPORT_GRACE_S)
        # A rank that was killed has not said why; what it said of others before must not wait for it.
        if self._ending or (exit_code >= 0 and await _happens(self._reported[rank], REPORT_GRACE_S)):
            return
        code = exit_code if exit_code > 0 else LostError.exit_code
        cause, lines = child.describe_end(), tuple(child.last_lines)
        await self._report(RankGone(rank=rank, exit_code=code, cause=cause, last_lines=lines))

    async def _listen(self) -> None:
        while True:
            identity, envelope = await self._router.receive()
            body = envelope.body
            if isinstance(body, RankHello):
                self._hellos[identity] = body
                await self._give_orders(identity, body)
                continue
            if not isinstance(body, RankUpdate | Listening | RankGone) or not self._is_current(envelope.epoch):
                logger.warning("unexpected %s of epoch %d from a rank", type(body).__name__, envelope.epoch)
                continue
            if isinstance(body, RankGone) and body.rank in self._reported:
                self._reported[body.rank].set()
            await self._report(body)

    def _is_current(self, epoch: int) -> bool:
        return self._assign is not None and self._assign.epoch == epoch

    async def _give_orders(self, identity: bytes, hello: RankHello) -> None:
        if self._assign is None:
            return
        start = RankStart(
            rank=self._assign.first_rank + hello.local_rank,
            local_rank=hello.local_rank,
            model=self._model(),
            log_level=self._log_level,
            log_format=self._log_format,
            assign=self._assign,
            key_file=self._key_file,
            engine_address=self._engine_address,
            plan_address=self._plan_address,
            progress_file=str(self._progress_path),
            trace_folder=self._trace_folder,
        )
        await self._router.send(identity, start)
        if self._connect is not None:
            await self._router.send(identity, self._connect)


def rank_environment(environ: Mapping[str, str], assign: Assign) -> dict[str, str]:
    """What a rank inherits: the thread count, the interface for collectives unless the user chose one, and an
    allocator that keeps the memory of large temporaries, which glibc would fault in anew for every layer."""
    child = {
        "MALLOC_MMAP_THRESHOLD_": str(MAPPED_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES),
        "TORCH_CPP_LOG_LEVEL": "FATAL",
        **environ,
        "OMP_NUM_THREADS": str(assign.threads),
        "PYTHONUNBUFFERED": "1",
    }
    if assign.interface is not None:
        for name, value in interface_variables(assign.interface).items():
            child.setdefault(name, value)
    return child


def interface_variables(interface: str) -> dict[str, str]:
    """How gloo and NCCL are told to use one network interface. NCCL takes a bare name for a prefix of names."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


async def _happens(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def _all_ended(children: Sequence[Child], timeout_s: float) -> None:
    if children:
        await asyncio.wait({child.exited for child in children}, timeout=timeout_s)
