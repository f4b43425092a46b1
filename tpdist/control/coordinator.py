"""The head's side of the control plane: sockets and request routing around the pure membership function.

    ownership   who is in the cluster and how it ends    membership.State, changed by _apply alone
                which node waits for which request       _origins, from Generate to its last token
                when the engine last finished a step     _progress, from StepOutputs

Requests of all nodes, the head's own too, arrive here over the same socket, go on to rank 0, and their tokens go back
to the node that asked.
"""

import asyncio
import contextlib
import logging
import time

from tpdist.control.channel import AsyncRouter
from tpdist.control.events import Action, Event, Finish, Heard, Interrupt, Publish, Send, Tick
from tpdist.control.membership import advance
from tpdist.control.messages import (
    Abort,
    DrainRequest,
    EngineStats,
    Envelope,
    Generate,
    Goodbye,
    Heartbeat,
    Message,
    RequestFailed,
    StepOutputs,
    TokenOutput,
    Tokens,
)
from tpdist.control.state import Rules, State
from tpdist.control.view import view

logger = logging.getLogger(__name__)

ENGINE_IDENTITY = b"engine"
HEARTBEAT_SUFFIX = b"/heartbeat"
PUBLISH_S_PER_NODE = 0.001


class Coordinator:
    """Runs on the head's agent from before the first node registers until everybody has said goodbye."""

    def __init__(self, *, router: AsyncRouter, engine: AsyncRouter, rules: Rules) -> None:
        """`engine` is the socket that rank 0 connects to, on a path that only this user can reach: whoever is behind
        it answers every request."""
        self._router = router
        self._engine = engine
        self._rules = rules
        self._state = State(phase_since=time.monotonic())
        self._stats = EngineStats()
        self._origins: dict[str, bytes] = {}
        self._progress = 0.0
        self._news = asyncio.Event()
        self._outcome: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        router.codec.cluster_id = rules.cluster_id

    async def run(self) -> tuple[int, str]:
        """Serve until the cluster has ended; returns (exit code, cause)."""
        works = (self._receive(), self._receive_outputs(), self._keep_time(), self._publish())
        tasks = [asyncio.create_task(work) for work in works]
        for task in tasks:
            task.add_done_callback(self._fail_on_bug)
        try:
            return await self._outcome
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def interrupt(self, request: DrainRequest) -> None:
        """Drain, or end at once, from outside the control plane."""
        await self._apply(Interrupt(request))

    def _fail_on_bug(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self._outcome.done():
            self._outcome.set_exception(error)

    async def _keep_time(self) -> None:
        interval_s = self._rules.heartbeat_interval_s / 2
        while True:
            await asyncio.sleep(interval_s)
            stalled_s = time.monotonic() - self._progress if self._origins else 0.0
            await self._apply(Tick(in_flight=len(self._origins), stalled_s=stalled_s))

    async def _receive(self) -> None:
        while True:
            identity, envelope = await self._router.receive()
            if identity.endswith(HEARTBEAT_SUFFIX):
                await self._from_heartbeat(identity, envelope)
            else:
                await self._from_node(identity, envelope)

    async def _receive_outputs(self) -> None:
        while True:
            _, envelope = await self._engine.receive()
            await self._from_engine(envelope)

    async def _from_heartbeat(self, identity: bytes, envelope: Envelope) -> None:
        """Only members are answered: an instance that has lost its place must not believe that all is well."""
        instance = _name(identity.removesuffix(HEARTBEAT_SUFFIX))
        await self._apply(Heard(instance, envelope.body, epoch=envelope.epoch))
        if instance in self._state.members:
            await self._router.send(identity, Heartbeat(instance=self._rules.cluster_id))

    # -- membership ---------------------------------------------------------------------------------------------------

    async def _apply(self, event: Event) -> None:
        before = self._state
        self._state, actions = advance(before, event, time.monotonic(), self._rules)
        self._router.codec.epoch = self._state.epoch
        if self._state.phase != before.phase:
            took_s = self._state.phase_since - before.phase_since
            logger.info("phase %s took %.1f s, now %s", before.phase, took_s, self._state.phase)
        if self._state.outcome is not None and before.outcome is None:
            await self._fail_requests(self._state.outcome[1])
        for action in actions:
            await self._act(action)

    async def _act(self, action: Action) -> None:
        match action:
            case Send(instance=instance, body=body):
                await self._router.send(instance.encode(), body)
            case Publish():
                self._news.set()
            case Finish(exit_code=exit_code, cause=cause):
                if not self._outcome.done():
                    self._outcome.set_result((exit_code, cause))

    async def _publish(self) -> None:
        """Send the view to every node on news and with every heartbeat, the less often the more nodes there are, so
        that the cost stays linear."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rules.heartbeat_interval_s):
                    await self._news.wait()
            self._news.clear()
            state = view(self._state, time.monotonic(), stats=self._stats)
            await self._router.send_all([instance.encode() for instance in self._state.members], state)
            await asyncio.sleep(len(self._state.members) * PUBLISH_S_PER_NODE)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _from_node(self, identity: bytes, envelope: Envelope) -> None:
        instance = _name(identity)
        if isinstance(envelope.body, Generate | Abort) and instance in self._state.members:
            await self._from_client(identity, envelope.body)
            return
        if isinstance(envelope.body, Goodbye):
            await self._abort_requests_of(identity)
        await self._apply(Heard(instance, envelope.body, epoch=envelope.epoch))

    async def _from_client(self, origin: bytes, body: Generate | Abort) -> None:
        request_id = body.request_id
        if isinstance(body, Abort):
            if self._origins.get(request_id) == origin:
                del self._origins[request_id]
                await self._engine.send(ENGINE_IDENTITY, body)
            return
        problem = None
        if self._state.phase != "ready":
            problem = 503, f"the cluster is not ready: phase {self._state.phase}"
        elif request_id in self._origins:
            problem = 400, f"request {request_id} is already running"
        if problem is not None:
            status, message = problem
            await self._router.send(origin, RequestFailed(request_id=request_id, status=status, message=message))
            return
        if not self._origins:
            self._progress = time.monotonic()
        self._origins[request_id] = origin
        await self._engine.send(ENGINE_IDENTITY, body)

    async def _abort_requests_of(self, origin: bytes) -> None:
        for request_id in [key for key, value in self._origins.items() if value == origin]:
            del self._origins[request_id]
            await self._engine.send(ENGINE_IDENTITY, Abort(request_id=request_id))

    async def _fail_requests(self, cause: str) -> None:
        message = f"the cluster ended while it worked on this request: {cause or 'it was shut down'}"
        for request_id, origin in self._origins.items():
            await self._router.send(origin, RequestFailed(request_id=request_id, status=503, message=message))
        self._origins.clear()

    async def _from_engine(self, envelope: Envelope) -> None:
        if envelope.epoch != self._state.epoch:
            logger.warning("dropped a message of the engine of epoch %d, now %d", envelope.epoch, self._state.epoch)
            return
        body: Message = envelope.body
        match body:
            case StepOutputs(outputs=outputs, stats=stats):
                self._stats = stats
                self._progress = time.monotonic()
                await self._deliver(outputs)
            case Heartbeat():
                await self._engine.send(ENGINE_IDENTITY, body)
            case RequestFailed(request_id=request_id):
                if origin := self._origins.pop(request_id, None):
                    await self._router.send(origin, body)
            case _:
                logger.warning("unexpected %s from the engine", type(body).__name__)

    async def _deliver(self, outputs: tuple[TokenOutput, ...]) -> None:
        by_origin: dict[bytes, list[TokenOutput]] = {}
        for output in outputs:
            origin = self._origins.get(output.request_id)
            if origin is None:
                continue
            by_origin.setdefault(origin, []).append(output)
            if output.finish_reason is not None:
                del self._origins[output.request_id]
        for origin, mine in by_origin.items():
            await self._router.send(origin, Tokens(outputs=tuple(mine)))


def _name(identity: bytes) -> str:
    """A node's instance from its socket's identity, which a stranger may have chosen: any bytes are a name."""
    return identity.decode(errors="replace")
