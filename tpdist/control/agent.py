"""One node's side of the control plane: joins the head, runs the node's ranks, and carries the node's requests.

The head's own node runs the same agent, connected to its coordinator over ipc, so there is one code path. An agent
holds no CUDA context and survives its ranks. It ends when the head says so, when the head has been silent for too
long, or when it could not join in time.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from tpdist.control.channel import AsyncDealer
from tpdist.control.messages import (
    Abort,
    Assign,
    ClusterState,
    Connect,
    DrainRequest,
    Fingerprint,
    Generate,
    Goodbye,
    Heartbeat,
    Message,
    RankUpdate,
    Register,
    RequestFailed,
    Shutdown,
    TokenOutput,
    Tokens,
    Wait,
    Welcome,
)
from tpdist.control.supervisor import STOP_GRACE_S, Supervisor
from tpdist.errors import InterruptedByUser, JoinError, LostError, RequestError, TpdistError

logger = logging.getLogger(__name__)

FAREWELL_S = 5.0
STARTING = ClusterState(state="starting", reason="waiting for the head", epoch=0, phase="register", nodes=(), plan={})


@dataclass(frozen=True)
class Outcome:
    """How a node ended."""

    exit_code: int
    cause: str


@dataclass(frozen=True, kw_only=True)
class Joining:
    """What an agent says to join, and how long it waits. `register` is asked anew for every attempt, because names
    and routes may come up late; it raises JoinError while there is no route."""

    instance: str
    head: str
    register: Callable[[], Register]
    fingerprint: Callable[[], Awaitable[Fingerprint]]
    register_timeout_s: float
    heartbeat_interval_s: float
    node_lost_s: float


class NodeAgent:
    """Also the EngineClient that the HTTP server and `LLM` talk to: state(), generate(), drain()."""

    def __init__(
        self,
        *,
        control: AsyncDealer,
        heartbeats: AsyncDealer,
        joining: Joining,
        on_rank_update: Callable[[RankUpdate], None] | None = None,
    ) -> None:
        self._control = control
        self._heartbeats = heartbeats
        self._joining = joining
        self._on_rank_update = on_rank_update
        self._supervisor: Supervisor | None = None
        self._state = STARTING
        self._state_changed = asyncio.Event()
        self._streams: dict[str, asyncio.Queue[TokenOutput | RequestFailed]] = {}
        self._welcomed = asyncio.Event()
        self._last_heard = time.monotonic()
        self._last_wait = ""
        self._abandoned = False
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._outcome.add_done_callback(lambda _: self._state_changed.set())
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self, supervisor: Supervisor) -> Outcome:
        """Join and serve until the end; afterwards the ranks are gone and the head has been told."""
        self._supervisor = supervisor
        for work in (self._receive(), self._receive_heartbeats(), self._join(), self._beat()):
            self._spawn(work)
        outcome = Outcome(TpdistError.exit_code, "the agent failed")
        try:
            outcome = await self._outcome
        except TpdistError as error:
            outcome = Outcome(error.exit_code, str(error))
        except Exception as error:
            logger.exception("the agent failed")
            outcome = Outcome(TpdistError.exit_code, f"internal error: {type(error).__name__}: {error}")
        finally:
            await self._end(outcome)
        instance = self._joining.instance
        await self._control.send(Goodbye(instance=instance, exit_code=outcome.exit_code, cause=outcome.cause))
        return outcome

    async def report(self, message: Message) -> None:
        """Pass what a rank says on to the head."""
        if isinstance(message, RankUpdate) and self._on_rank_update is not None:
            self._on_rank_update(message)
        await self._control.send(message)

    def close(self) -> None:
        self._control.close()
        self._heartbeats.close()

    async def wait_ready(self) -> None:
        """Return once requests are served. Raises what ended the node if that comes first."""
        while self._state.state != "ready" and not self._outcome.done():
            self._state_changed.clear()
            await self._state_changed.wait()
        if self._outcome.done():
            raise RequestError("the node ended before it was ready", status=503)

    def abandon(self, exit_code: int, cause: str) -> None:
        """End this node now, whatever the head thinks, and give the ranks no time to say goodbye."""
        self._abandoned = True
        self._finish(exit_code, cause)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._outcome.done():
            self._outcome.set_exception(error)

    def _finish(self, exit_code: int, cause: str) -> None:
        if not self._outcome.done():
            self._outcome.set_result(Outcome(exit_code, cause))

    async def _end(self, outcome: Outcome) -> None:
        """Fail what runs and end the ranks; from now on this node says how it ended."""
        cause = outcome.cause
        name = "draining" if outcome.exit_code in (0, InterruptedByUser.exit_code) else "failed"
        self._state = msgspec.structs.replace(self._state, state=name, reason=cause)
        for request_id, stream in self._streams.items():
            message = f"the node ended while it worked on this request: {cause or 'it was shut down'}"
            stream.put_nowait(RequestFailed(request_id=request_id, status=503, message=message))
        assert self._supervisor is not None
        await self._supervisor.stop(grace_s=0 if self._abandoned else STOP_GRACE_S)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            _, stuck = await asyncio.wait(self._tasks, timeout=STOP_GRACE_S)
            for task in stuck:
                logger.error("a task of the agent does not end: %s", task)

    # -- joining and staying ------------------------------------------------------------------------------------------

    async def _join(self) -> None:
        """Register until the head welcomes this node, then tell it what this node is.

        A node whose model is unusable joins all the same for a moment, so that the others learn why.
        """
        started = time.monotonic()
        deadline = started + self._joining.register_timeout_s
        fingerprint = asyncio.ensure_future(self._joining.fingerprint())
        problem = ""
        while not self._welcomed.is_set() and time.monotonic() < deadline:
            try:
                await self._control.send(await asyncio.to_thread(self._joining.register))
            except JoinError as error:
                problem = str(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._joining.heartbeat_interval_s):
                    await self._welcomed.wait()
            if fingerprint.done() and fingerprint.exception():
                deadline = min(deadline, started + FAREWELL_S)
        if not self._welcomed.is_set() and not (fingerprint.done() and fingerprint.exception()):
            fingerprint.cancel()
            raise JoinError(self._join_problem(problem))
        await self._control.send(await fingerprint)

    def _join_problem(self, problem: str) -> str:
        waited_s = self._joining.register_timeout_s
        if self._last_wait:
            return f"the head {self._joining.head} did not take this node within {waited_s:g} s: {self._last_wait}"
        detail = f" ({problem})" if problem else ""
        return (
            f"no head answered at {self._joining.head} within {waited_s:g} s{detail}. Check that the head is started "
            "with that MISTRALRS_MN_HEAD_PORT, that a firewall lets it through, and that all nodes have the same "
            "TPDIST_KEY_FILE; TPDIST_REGISTER_TIMEOUT_S waits longer"
        )

    async def _beat(self) -> None:
        """Say that this node lives, and notice when the head does not."""
        await self._welcomed.wait()
        interval_s = self._joining.heartbeat_interval_s
        while True:
            await self._heartbeats.send(Heartbeat(instance=self._joining.instance))
            slept_at = time.monotonic()
            await asyncio.sleep(interval_s)
            if time.monotonic() - slept_at > 2 * interval_s:
                # This process itself stood still: what the head sent meanwhile has not been read yet.
                self._last_heard = time.monotonic()
            silent_s = time.monotonic() - self._last_heard
            if silent_s > self._joining.node_lost_s:
                raise LostError(
                    f"the head {self._joining.head} has not been heard for {silent_s:.1f} s "
                    f"(TPDIST_NODE_LOST_S={self._joining.node_lost_s:g}); the ranks of this node were ended"
                )

    async def _receive_heartbeats(self) -> None:
        while True:
            await self._heartbeats.receive()
            self._last_heard = time.monotonic()

    async def _receive(self) -> None:
        while True:
            envelope = await self._control.receive()
            self._last_heard = time.monotonic()
            await self._handle(envelope.body, epoch=envelope.epoch)

    async def _handle(self, body: Message, *, epoch: int) -> None:
        assert self._supervisor is not None
        match body:
            case Tokens(outputs=outputs):
                for output in outputs:
                    self._to_stream(output.request_id, output)
            case RequestFailed(request_id=request_id):
                self._to_stream(request_id, body)
            case ClusterState():
                self._state = body
                self._state_changed.set()
            case Welcome(cluster_id=cluster_id):
                self._control.codec.cluster_id = cluster_id
                self._heartbeats.codec.cluster_id = cluster_id
                self._welcomed.set()
            case Wait(reason=reason):
                if reason != self._last_wait:
                    logger.info("waiting to join: %s", reason)
                self._last_wait = reason
            case Assign() if body.epoch > self._control.codec.epoch:
                self._control.codec.epoch = body.epoch
                await self._supervisor.start(body)
            case Connect() if epoch == self._control.codec.epoch:
                await self._supervisor.connect(body)
            case Shutdown(exit_code=exit_code, cause=cause):
                self._finish(exit_code, cause)
            case _:
                logger.warning("unexpected %s of epoch %d from the head", type(body).__name__, epoch)

    # -- requests -----------------------------------------------------------------------------------------------------

    def state(self) -> ClusterState:
        """The cluster as the head last described it."""
        return self._state

    async def generate(self, request: Generate) -> AsyncGenerator[TokenOutput, None]:
        """Yield the tokens of one request as they come. Raises RequestError (400, or 503 when the cluster cannot).

        Closing the iterator early aborts the request on all ranks.
        """
        if self._outcome.done() or self._state.state != "ready":
            raise RequestError(f"the cluster is {self._state.state}: {self._state.reason}", status=503)
        stream: asyncio.Queue[TokenOutput | RequestFailed] = asyncio.Queue()
        self._streams[request.request_id] = stream
        finished = False
        try:
            await self._control.send(request)
            while not finished:
                output = await stream.get()
                finished = isinstance(output, RequestFailed) or output.finish_reason is not None
                if isinstance(output, RequestFailed):
                    raise RequestError(output.message, param=output.param, status=output.status)
                yield output
        finally:
            del self._streams[request.request_id]
            if not finished:
                await self._control.send(Abort(request_id=request.request_id))

    async def drain(self, request: DrainRequest) -> None:
        """Ask the head to end the cluster; while nodes still gather, this one simply leaves."""
        if self._welcomed.is_set() and self._state.phase != "register":
            await self._control.send(request)
        else:
            self._finish(request.exit_code, request.reason)

    def _to_stream(self, request_id: str, output: TokenOutput | RequestFailed) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put_nowait(output)
