"""The head's side of the control plane: sockets and request routing around the pure membership function.

    ownership   who is in the cluster and how it ends    membership.State, changed by _apply alone
                which node waits for which request       _requests, from Generate to its last token
                since when the engine owes an answer     _owed_since, from what it gets to what it says next

Requests of all nodes, the head's own too, arrive here over the same socket, go on to rank 0, and their tokens go back
to the node that asked. When an epoch is aborted, those that have produced nothing wait for the next.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from itertools import islice

import msgspec

from tpdist.control.channel import AsyncRouter
from tpdist.control.events import Action, Beats, Event, Finish, Heard, HungUp, Interrupt, Publish, Send, Tick
from tpdist.control.membership import advance
from tpdist.control.messages import (
    ENGINE_IDENTITY,
    HEARTBEAT_SUFFIX,
    Abort,
    ClusterState,
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
from tpdist.control.passing_on import failure_to
from tpdist.control.publishing import Publisher
from tpdist.control.requests import Requests
from tpdist.control.state import RUNNING, SERVING, Rules, State
from tpdist.control.view import view

logger = logging.getLogger(__name__)

STANDSTILL_TICKS = 4
MOMENT_HEARTBEATS = 0.02
MIN_AT_ONCE = 32


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
        self._requests = Requests()
        self._owed_since: float | None = None
        self._beats: dict[bytes, Heard] = {}
        self._beaten = asyncio.Event()
        self._publisher = Publisher(
            router, everybody=self._everybody, view=self._view, heartbeat_interval_s=rules.heartbeat_interval_s
        )
        self._outcome: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        router.codec.cluster_id = rules.cluster_id

    async def run(self) -> tuple[int, str]:
        """Serve until the cluster has ended; returns (exit code, cause)."""
        works = (self._receive(), self._answer_heartbeats(), self._receive_outputs(), self._watch(), self._keep_time())
        tasks = [asyncio.create_task(work) for work in (*works, self._publisher.run())]
        for task in tasks:
            task.add_done_callback(failure_to(self._outcome))
        try:
            return await self._outcome
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def interrupt(self, request: DrainRequest) -> None:
        """Drain, or end at once, from outside the control plane."""
        await self._apply(Interrupt(request))

    async def _keep_time(self) -> None:
        interval_s = self._rules.heartbeat_interval_s / 2
        while True:
            slept_at = time.monotonic()
            await asyncio.sleep(interval_s)
            now = time.monotonic()
            stood_still = now - slept_at > STANDSTILL_TICKS * interval_s
            if stood_still and self._owed_since is not None:
                self._owed_since = now
            owed_s = 0.0 if self._owed_since is None else now - self._owed_since
            await self._apply(Tick(in_flight=self._requests.num_running, stalled_s=owed_s, stood_still=stood_still))
            late = self._requests.overdue(now, self._rules.retry_timeout_s)
            limit_s = self._rules.retry_timeout_s
            await self._fail(late, f"the cluster did not recover within {limit_s:g} s: {self._why()}")

    async def _receive(self) -> None:
        while True:
            identity, envelope = await self._router.receive()
            if identity.endswith(HEARTBEAT_SUFFIX):
                await self._from_heartbeat(identity, envelope)
            else:
                await self._from_node(identity, envelope)

    async def _watch(self) -> None:
        """Closed connections: a node that was killed is known at once."""
        while True:
            identity = await self._router.next_hangup()
            await self._apply(HungUp(_name(identity.removesuffix(HEARTBEAT_SUFFIX))))

    async def _receive_outputs(self) -> None:
        while True:
            _, envelope = await self._engine.receive()
            await self._from_engine(envelope)

    async def _from_heartbeat(self, identity: bytes, envelope: Envelope) -> None:
        """Of a member the latest waits for the others of its moment. An instance that has lost its place must not
        believe that all is well."""
        heard = Heard(_name(identity.removesuffix(HEARTBEAT_SUFFIX)), envelope.body, epoch=envelope.epoch)
        if isinstance(heard.body, Heartbeat) and self._knows(heard.instance):
            self._beats[identity] = heard
            self._beaten.set()
        else:
            await self._apply(heard)

    async def _answer_heartbeats(self) -> None:
        """Those that came within a moment together: one change of the state, one message, and one thread woken up to
        send it. A node beats again an interval after its answer, so those that were answered together wake this
        process together the next time; a moment takes no more than twice its share, lest they become one crowd.
        """
        while True:
            await self._beaten.wait()
            await asyncio.sleep(MOMENT_HEARTBEATS * self._rules.heartbeat_interval_s)
            most = max(MIN_AT_ONCE, int(2 * MOMENT_HEARTBEATS * len(self._rules.keys)))
            together = {identity: self._beats.pop(identity) for identity in list(islice(self._beats, most))}
            if not self._beats:
                self._beaten.clear()
            await self._apply(Beats(tuple(together.values())))
            known = [identity for identity, heard in together.items() if self._knows(heard.instance)]
            await self._router.send_all(known, Heartbeat(instance=self._rules.cluster_id, stats=self._stats))

    def _knows(self, instance: str) -> bool:
        return instance in self._state.members or instance in self._state.standbys

    def _instances(self) -> set[str]:
        return self._state.members.keys() | self._state.standbys.keys()

    # -- membership ---------------------------------------------------------------------------------------------------

    async def _apply(self, event: Event) -> None:
        before = self._state
        self._state, actions = advance(before, event, time.monotonic(), self._rules)
        self._router.codec.epoch = self._state.epoch
        if self._state.phase != before.phase:
            took_s = self._state.phase_since - before.phase_since
            logger.info("phase %s took %.1f s, now %s", before.phase, took_s, self._state.phase)
            await self._phase_changed(before)
        if self._state.members is not before.members or self._state.standbys is not before.standbys:
            for instance in (before.members.keys() | before.standbys.keys()) - self._instances():
                await self._abort_requests_of(instance.encode())
        for action in actions:
            await self._act(action)

    async def _phase_changed(self, before: State) -> None:
        """Requests follow the engine: they fail or wait when it is gone, and go to the next when that is ready."""
        if self._state.outcome is not None:
            cause = self._state.outcome[1] or "it was shut down"
            await self._fail(self._requests.clear(), f"the cluster ended while it worked on this request: {cause}")
        elif before.phase in SERVING and self._state.phase not in SERVING:
            lost = self._requests.end_epoch(time.monotonic())
            self._stats = EngineStats()
            await self._fail(lost, f"the cluster lost a part of itself while it worked on this request: {self._why()}")
            logger.warning(
                "epoch %d ended: %d requests failed, %d wait for the next: %s",
                *(self._state.epoch, len(lost), self._requests.num_waiting, self._state.restarts[-1].failure.cause),
            )
        elif self._state.phase == "ready":
            self._owed_since = None
            for request in self._requests.resume():
                await self._hand_over(request)

    def _why(self) -> str:
        """The first line: what a rank logged before it ended is for the log."""
        return self._state.restarts[-1].failure.headline if self._state.restarts else ""

    async def _act(self, action: Action) -> None:
        match action:
            case Send(instance=instance, body=body):
                await self._router.send(instance.encode(), body)
            case Publish():
                self._publisher.tell()
            case Finish(exit_code=exit_code, cause=cause):
                if not self._outcome.done():
                    self._outcome.set_result((exit_code, cause))

    def _everybody(self) -> list[bytes]:
        """The sockets of all nodes, the head's first."""
        nodes = (*self._state.ordered, *self._state.standbys.values())
        return [node.register.instance.encode() for node in nodes]

    def _view(self) -> ClusterState:
        return view(self._state, time.monotonic(), stats=self._stats, retried=self._requests.num_retried)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _from_node(self, identity: bytes, envelope: Envelope) -> None:
        instance = _name(identity)
        if isinstance(envelope.body, Generate | Abort) and self._knows(instance):
            await self._from_client(identity, envelope.body)
            return
        if isinstance(envelope.body, Goodbye):
            await self._abort_requests_of(identity)
        await self._apply(Heard(instance, envelope.body, epoch=envelope.epoch))

    async def _from_client(self, origin: bytes, body: Generate | Abort) -> None:
        if isinstance(body, Abort):
            if self._requests.origin_of(body.request_id) == origin:
                await self._abort(body.request_id)
        elif body.request_id in self._requests:
            await self._fail([(body.request_id, origin)], f"request {body.request_id} is already running", status=400)
        elif self._state.phase == "ready":
            self._requests.add(body, origin)
            await self._hand_over(body)
        elif self._state.outcome is None and self._state.restarts and self._state.phase not in SERVING:
            # Its node had not heard yet that the cluster recovers.
            self._requests.add_waiting(body, origin, time.monotonic())
        else:
            await self._fail([(body.request_id, origin)], f"the cluster is not ready: phase {self._state.phase}")

    async def _hand_over(self, request: Generate) -> None:
        """Rank 0 reads between two steps: how long a request waits for that is known by its stamp alone."""
        now = time.monotonic()
        self._owe(now)
        await self._engine.send(ENGINE_IDENTITY, msgspec.structs.replace(request, handed_over_s=now))

    def _owe(self, now: float) -> None:
        """The engine answers everything, an abort too: a client that gives up does not settle what it owes."""
        if self._owed_since is None:
            self._owed_since = now

    async def _abort(self, request_id: str) -> None:
        self._requests.remove(request_id)
        if self._state.phase in SERVING:
            self._owe(time.monotonic())
            await self._engine.send(ENGINE_IDENTITY, Abort(request_id=request_id))

    async def _abort_requests_of(self, origin: bytes) -> None:
        for request_id in self._requests.of(origin):
            await self._abort(request_id)

    async def _fail(self, requests: Iterable[tuple[str, bytes]], message: str, *, status: int = 503) -> None:
        for request_id, origin in requests:
            await self._router.send(origin, RequestFailed(request_id=request_id, status=status, message=message))

    async def _from_engine(self, envelope: Envelope) -> None:
        if envelope.epoch != self._state.epoch or self._state.phase not in RUNNING:
            logger.debug("dropped a message of the engine of epoch %d, now %d", envelope.epoch, self._state.epoch)
            return
        body: Message = envelope.body
        match body:
            case StepOutputs(outputs=outputs, stats=stats):
                self._stats = stats
                await self._deliver(outputs)
                self._owed_since = time.monotonic() if self._requests.num_running else None
            case Heartbeat():
                await self._engine.send(ENGINE_IDENTITY, body)
            case RequestFailed(request_id=request_id):
                if origin := self._requests.remove(request_id):
                    await self._router.send(origin, body)
                self._owed_since = time.monotonic() if self._requests.num_running else None
            case _:
                logger.warning("unexpected %s from the engine", type(body).__name__)

    async def _deliver(self, outputs: tuple[TokenOutput, ...]) -> None:
        by_origin: dict[bytes, list[TokenOutput]] = {}
        for output in outputs:
            origin = self._requests.origin_of(output.request_id)
            if origin is not None:
                by_origin.setdefault(origin, []).append(output)
                self._requests.delivered(output)
        for origin, mine in by_origin.items():
            await self._router.send(origin, Tokens(outputs=tuple(mine)))


def _name(identity: bytes) -> str:
    """A node's instance from its socket's identity, which a stranger may have chosen: any bytes are a name."""
    return identity.decode(errors="replace")
