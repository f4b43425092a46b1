"""One node's side of the control plane: joins the head, runs the node's ranks, and carries the node's requests.

The head's own node runs the same agent, connected to its coordinator over ipc, so there is one code path. An agent
holds no CUDA context and survives its ranks. It ends when the head says so, or when it could not join in time; one
that loses its head ends its ranks, so that no old epoch answers, and registers again.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from tpdist import log
from tpdist.control.channel import HeadLostError, needs_ipv6
from tpdist.control.head_link import HeadLink, Joining
from tpdist.control.messages import (
    Abort,
    Assign,
    ClusterNews,
    ClusterState,
    Connect,
    DrainRequest,
    EndEpoch,
    Envelope,
    EpochEnded,
    Fingerprint,
    Generate,
    Goodbye,
    Heartbeat,
    Message,
    RankProgress,
    RankUpdate,
    RequestFailed,
    Shutdown,
    TokenOutput,
    Tokens,
    Wait,
)
from tpdist.control.passing_on import failure_to
from tpdist.control.supervisor import STOP_GRACE_S, Supervisor
from tpdist.control.view import with_news
from tpdist.errors import InterruptedByUser, LostError, RequestError, TpdistError

logger = logging.getLogger(__name__)

EPOCH_GRACE_S = 0.5
STARTING = ClusterState(state="starting", reason="waiting for the head", epoch=0, phase="register", nodes=(), plan={})


@dataclass(frozen=True)
class Outcome:
    """How a node ended."""

    exit_code: int
    cause: str


class NodeAgent:
    """Also the EngineClient that the HTTP server and `LLM` talk to: state(), generate(), drain()."""

    def __init__(
        self,
        joining: Joining,
        *,
        fingerprint: Callable[[], Awaitable[Fingerprint]],
        on_rank_update: Callable[[RankUpdate], None] | None = None,
    ) -> None:
        self._joining = joining
        self._fingerprint = asyncio.ensure_future(fingerprint())
        self._on_rank_update = on_rank_update
        self._supervisor: Supervisor | None = None
        self._state = STARTING
        self._state_changed = asyncio.Event()
        self._streams: dict[str, asyncio.Queue[TokenOutput | RequestFailed]] = {}
        self._abandoned = False
        self._leaving: DrainRequest | None = None
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._outcome.add_done_callback(lambda _: self._state_changed.set())
        self._tasks: set[asyncio.Task[None]] = set()
        self._link = self._new_link()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self, supervisor: Supervisor) -> Outcome:
        """Join and serve until the end; afterwards the ranks are gone and the head has been told."""
        self._supervisor = supervisor
        self._spawn(self._stay_joined())
        supervisor.broken.add_done_callback(failure_to(self._outcome))
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
        await self._link.send(Goodbye(instance=self._link.instance, exit_code=outcome.exit_code, cause=outcome.cause))
        return outcome

    async def report(self, message: Message) -> None:
        """Pass what a rank says on to the head."""
        if isinstance(message, RankUpdate) and self._on_rank_update is not None:
            self._on_rank_update(message)
        await self._link.send(message)

    def close(self) -> None:
        self._link.close(linger=True)

    async def wait_ready(self) -> None:
        """Return once requests are served. Raises what ended the node if that comes first."""
        await self.wait_until(lambda state: state.state == "ready")

    async def wait_until(self, met: Callable[[ClusterState], bool]) -> None:
        """Return once the state of the cluster is as asked for. Raises RequestError when the node ends first."""
        while not met(self._state) and not self._outcome.done():
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
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(failure_to(self._outcome))

    def _finish(self, exit_code: int, cause: str) -> None:
        if not self._outcome.done():
            self._outcome.set_result(Outcome(exit_code, cause))

    async def _end(self, outcome: Outcome) -> None:
        """Fail what runs and end the ranks; from now on this node says how it ended."""
        cause = outcome.cause
        name = "draining" if outcome.exit_code in (0, InterruptedByUser.exit_code) else "failed"
        self._state = msgspec.structs.replace(self._state, state=name, reason=cause)
        self._fail_streams(f"the node ended while it worked on this request: {cause or 'it was shut down'}")
        assert self._supervisor is not None
        await self._supervisor.close(grace_s=0 if self._abandoned else STOP_GRACE_S)
        self._fingerprint.cancel()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            _, stuck = await asyncio.wait(self._tasks, timeout=STOP_GRACE_S)
            for task in stuck:
                logger.error("a task of the agent does not end: %s", task)

    # -- the head -----------------------------------------------------------------------------------------------------

    def _new_link(self, *, lost: str = "", ipv6: bool | None = None) -> HeadLink:
        return HeadLink(
            self._joining,
            fingerprint=self._fingerprint,
            handle=self._handle,
            progress=self._progress,
            lost=lost,
            ipv6=ipv6,
        )

    def _progress(self) -> tuple[RankProgress, ...]:
        return () if self._supervisor is None else self._supervisor.progress()

    async def _stay_joined(self) -> None:
        """Be with a head; with the next one when that is lost. Raises LostError if this node may not come back."""
        while True:
            try:
                await self._link.run()
            except HeadLostError as error:
                cause = str(error)
            if self._outcome.done():
                return  # the head has said how it ends, and ended
            if self._leaving is not None or self._state.state == "draining":
                code = 0 if self._leaving is None else self._leaving.exit_code
                self._finish(code, f"{cause}, while this node was to end")
                return
            if not self._joining.comes_back:
                raise LostError(f"{cause}; the ranks of this node were ended")
            self._link.welcomed.clear()
            await self._leave(cause)
            ipv6 = await asyncio.to_thread(needs_ipv6, self._joining.head)
            self._link.close(linger=False)
            self._link = self._new_link(lost=cause, ipv6=ipv6)

    async def _leave(self, cause: str) -> None:
        """No rank of this node works for a head that is lost, and nobody waits for its answers."""
        logger.warning("%s; ending the ranks of this node and registering again", cause)
        self._state = msgspec.structs.replace(STARTING, state="recovering", reason=cause, epoch=self._state.epoch)
        self._state_changed.set()
        self._fail_streams(f"this node lost its head while it worked on this request: {cause}")
        assert self._supervisor is not None
        await self._supervisor.end_epoch(grace_s=EPOCH_GRACE_S)

    async def _end_epoch(self, epoch: int, cause: str) -> None:
        assert self._supervisor is not None
        logger.info("ending the ranks of epoch %d: %s", epoch, cause.partition("\n")[0])
        link = self._link
        await self._supervisor.end_epoch(grace_s=EPOCH_GRACE_S)
        if link is self._link:
            await link.send(EpochEnded(instance=link.instance))

    async def _handle(self, envelope: Envelope) -> None:
        if self._outcome.done():
            return
        assert self._supervisor is not None
        body, codec = envelope.body, self._link.codec
        match body:
            case Heartbeat(stats=stats):
                if stats is not None:
                    self._state = msgspec.structs.replace(self._state, stats=stats)
            case Tokens(outputs=outputs):
                for output in outputs:
                    self._to_stream(output.request_id, output)
            case RequestFailed(request_id=request_id):
                self._to_stream(request_id, body)
            case ClusterState():
                self._state = body
                self._state_changed.set()
            case ClusterNews():
                self._state = with_news(self._state, body)
                self._state_changed.set()
            case Assign() if body.epoch > codec.epoch:
                codec.epoch = body.epoch
                log.add_context(epoch=body.epoch)
                await self._supervisor.start(body)
            case Connect() if envelope.epoch == codec.epoch:
                await self._supervisor.connect(body)
            case Wait(reason=reason):
                self._state = msgspec.structs.replace(self._state, reason=reason)
                self._state_changed.set()
            case EndEpoch(cause=cause) if envelope.epoch == codec.epoch:
                self._spawn(self._end_epoch(envelope.epoch, cause))
            case Shutdown(exit_code=exit_code, cause=cause):
                self._finish(exit_code, cause)
            case _:
                logger.warning("unexpected %s of epoch %d from the head", type(body).__name__, envelope.epoch)

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
        link, finished = self._link, False
        try:
            await link.send(request)
            while not finished:
                output = await stream.get()
                finished = isinstance(output, RequestFailed) or output.finish_reason is not None
                if isinstance(output, RequestFailed):
                    raise RequestError(output.message, param=output.param, status=output.status)
                yield output
        finally:
            del self._streams[request.request_id]
            if not finished and link is self._link and not self._outcome.done():
                await link.send(Abort(request_id=request.request_id))

    async def drain(self, request: DrainRequest) -> None:
        """Ask the head to end the cluster. Raises RequestError 503 if this node has no place from which to ask."""
        if not self._has_place:
            raise RequestError(
                f"this node has no place in the cluster, and cannot end it ({self._state.reason or 'a standby'}): "
                "ask the head, or a node that has one",
                status=503,
            )
        await self.leave(request)

    async def leave(self, request: DrainRequest) -> None:
        """This node is to end: it asks the head to end the cluster; while nodes still gather for the first time, or as
        long as this one has no place, it simply leaves. It does not come back if the head is lost before that."""
        self._leaving = request
        gathering = self._state.phase == "register" and self._state.epoch == 0
        if self._has_place and not gathering:
            await self._link.send(request)
        else:
            self._finish(request.exit_code, request.reason)

    @property
    def _has_place(self) -> bool:
        return self._link.welcomed.is_set() and (self._link.codec.epoch > 0 or not self._joining.standby)

    def _fail_streams(self, message: str) -> None:
        for request_id, stream in self._streams.items():
            stream.put_nowait(RequestFailed(request_id=request_id, status=503, message=message))

    def _to_stream(self, request_id: str, output: TokenOutput | RequestFailed) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put_nowait(output)
