"""The head's side of the control plane: sockets and request routing around the pure membership function.

    ownership   who is in the cluster and how it ends    membership.State, changed by _apply alone
                which node waits for which request       _requests, from Generate to its last token
                when the engine last said something      _progress, from StepOutputs

Requests of all nodes, the head's own too, arrive here over the same socket, go on to rank 0, and their tokens go back
to the node that asked. When an epoch is aborted, those that have produced nothing wait for the next.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable

import msgspec

from tpdist.control.channel import AsyncRouter
from tpdist.control.events import Action, Event, Finish, Heard, HungUp, Interrupt, Publish, Send, Tick
from tpdist.control.head_link import HEARTBEAT_SUFFIX
from tpdist.control.membership import advance
from tpdist.control.messages import (
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
from tpdist.control.requests import Requests
from tpdist.control.state import Rules, State
from tpdist.control.view import news_of, view

logger = logging.getLogger(__name__)

ENGINE_IDENTITY = b"engine"
SERVING = ("ready", "draining")
AT_ONCE_BYTES = 1 << 20
PUBLISH_BYTES_PER_S = 10e6
REFRESH_BYTES_PER_S = 4e6
OWN_HEARTBEATS = 5


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
        self._progress = 0.0
        self._news = asyncio.Event()
        self._outcome: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        router.codec.cluster_id = rules.cluster_id

    async def run(self) -> tuple[int, str]:
        """Serve until the cluster has ended; returns (exit code, cause)."""
        works = (self._receive(), self._receive_outputs(), self._watch(), self._keep_time(), self._publish())
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
            now, running = time.monotonic(), self._requests.num_running
            await self._apply(Tick(in_flight=running, stalled_s=now - self._progress if running else 0.0))
            late = self._requests.overdue(now, self._rules.retry_timeout_s)
            await self._fail(
                late, f"the cluster did not recover within {self._rules.retry_timeout_s:g} s: {self._why()}"
            )

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
            if identity.endswith(HEARTBEAT_SUFFIX):
                await self._apply(HungUp(_name(identity.removesuffix(HEARTBEAT_SUFFIX))))

    async def _receive_outputs(self) -> None:
        while True:
            _, envelope = await self._engine.receive()
            await self._from_engine(envelope)

    async def _from_heartbeat(self, identity: bytes, envelope: Envelope) -> None:
        """Only members are answered: an instance that has lost its place must not believe that all is well."""
        instance = _name(identity.removesuffix(HEARTBEAT_SUFFIX))
        await self._apply(Heard(instance, envelope.body, epoch=envelope.epoch))
        if self._knows(instance):
            await self._router.send(identity, Heartbeat(instance=self._rules.cluster_id, stats=self._stats))

    def _knows(self, instance: str) -> bool:
        return instance in self._state.members or instance in self._state.standbys

    # -- membership ---------------------------------------------------------------------------------------------------

    async def _apply(self, event: Event) -> None:
        before = self._state
        self._state, actions = advance(before, event, time.monotonic(), self._rules)
        self._router.codec.epoch = self._state.epoch
        if self._state.phase != before.phase:
            took_s = self._state.phase_since - before.phase_since
            logger.info("phase %s took %.1f s, now %s", before.phase, took_s, self._state.phase)
            await self._phase_changed(before)
        if self._state.members is not before.members:
            for instance in before.members.keys() - self._state.members.keys():
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
            self._progress = time.monotonic()
            for request in self._requests.resume():
                await self._hand_over(request)

    def _why(self) -> str:
        """The first line: what a rank logged before it ended is for the log."""
        return self._state.restarts[-1].failure.cause.partition("\n")[0] if self._state.restarts else ""

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
        """Send the view to every node on news, and now and then for steps and ages.

        Its size grows with the number of nodes, and so does the number of its readers. Where it is too large for all
        at once, they get the news alone first, and then the view, a few of them at a time: the head's own node, then
        those that have waited longest.
        """
        waiting: list[bytes] = []
        total_bytes = 0
        while True:
            if not waiting:
                await self._wait_for_news(total_bytes / REFRESH_BYTES_PER_S)
            sent_bytes = 0
            if not waiting or self._news.is_set():
                self._news.clear()
                shown, is_behind = self._view(), set(waiting)
                frame = self._router.frame_of(shown)
                nodes = (*self._state.ordered, *self._state.standbys.values())
                everybody = [node.register.instance.encode() for node in nodes]
                is_behind.update(everybody[:1])
                waiting = sorted(everybody, key=lambda identity: identity not in is_behind)
                total_bytes = len(everybody) * len(frame)
                if total_bytes > AT_ONCE_BYTES:
                    news = self._router.frame_of(news_of(shown))
                    self._router.send_frame(everybody, news)
                    sent_bytes = len(everybody) * len(news)
            num_next = max(1, AT_ONCE_BYTES // len(frame))
            self._router.send_frame(waiting[:num_next], frame)
            sent_bytes += len(waiting[:num_next]) * len(frame)
            waiting = waiting[num_next:]
            await asyncio.sleep(sent_bytes / PUBLISH_BYTES_PER_S)

    async def _wait_for_news(self, refresh_s: float) -> None:
        """Until there are some, or the view is due again. The head's own node is shown it more often meanwhile."""
        until = time.monotonic() + max(refresh_s, self._rules.heartbeat_interval_s)
        while (left_s := until - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, OWN_HEARTBEATS * self._rules.heartbeat_interval_s)):
                    await self._news.wait()
                    return
            if (head := self._state.nodes.get(None)) is not None:
                await self._router.send(head.register.instance.encode(), self._view())

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
            if not self._requests.num_running:
                self._progress = time.monotonic()
            self._requests.add(body, origin)
            await self._hand_over(body)
        elif self._state.outcome is None and self._state.restarts and self._state.phase not in SERVING:
            # Its node had not heard yet that the cluster recovers.
            self._requests.add_waiting(body, origin, time.monotonic())
        else:
            await self._fail([(body.request_id, origin)], f"the cluster is not ready: phase {self._state.phase}")

    async def _hand_over(self, request: Generate) -> None:
        """Rank 0 reads between two steps: how long a request waits for that is known by its stamp alone."""
        await self._engine.send(ENGINE_IDENTITY, msgspec.structs.replace(request, handed_over_s=time.monotonic()))

    async def _abort(self, request_id: str) -> None:
        self._requests.remove(request_id)
        await self._engine.send(ENGINE_IDENTITY, Abort(request_id=request_id))

    async def _abort_requests_of(self, origin: bytes) -> None:
        for request_id in self._requests.of(origin):
            await self._abort(request_id)

    async def _fail(self, requests: Iterable[tuple[str, bytes]], message: str, *, status: int = 503) -> None:
        for request_id, origin in requests:
            await self._router.send(origin, RequestFailed(request_id=request_id, status=status, message=message))

    async def _from_engine(self, envelope: Envelope) -> None:
        is_over = self._state.phase in ("recover", "register", "compare", "ended")
        if envelope.epoch != self._state.epoch or is_over:
            logger.debug("dropped a message of the engine of epoch %d, now %d", envelope.epoch, self._state.epoch)
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
                if origin := self._requests.remove(request_id):
                    await self._router.send(origin, body)
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
