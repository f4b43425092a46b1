"""One registration of a node with its head, under an instance id of its own, until the head or the place is lost.

It registers until it is welcomed, says what the node is, beats, and hands on what the head says. Once it is welcome, a
connection that closes ends the link, on both sides: zmq would connect again, but what was on its way is lost, and
nobody would know. A node whose head is lost makes another link, which the head takes for another process: nothing of
the earlier one reaches it.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from tpdist.control.channel import AsyncDealer, ClusterKeys, Codec, HeadLostError
from tpdist.control.messages import (
    HEARTBEAT_SUFFIX,
    Envelope,
    Fingerprint,
    Heartbeat,
    Message,
    RankProgress,
    Register,
    Rejoin,
    Wait,
    Welcome,
)
from tpdist.errors import JoinError, LostError

logger = logging.getLogger(__name__)

FAREWELL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Joining:
    """What a node says to join, and how long it waits. `register` is asked anew for every attempt, because names and
    routes may come up late; it raises JoinError while there is no route. `comes_back`: a node that loses its head
    registers again."""

    head: str
    keys: ClusterKeys | None
    register: Callable[[str], Register]
    register_timeout_s: float
    heartbeat_interval_s: float
    node_lost_s: float
    comes_back: bool
    standby: bool = False


class HeadLink:
    """`fingerprint` is what this node is, once that is known; `handle` gets the head's messages, `progress` is asked
    with every heartbeat. `lost` is why the head was lost before, for the message when nobody answers. `ipv6`: whether
    the head's name stands for such addresses alone; asked here if it is not known, which may take its time."""

    def __init__(
        self,
        joining: Joining,
        *,
        fingerprint: "asyncio.Future[Fingerprint]",
        handle: Callable[[Envelope], Awaitable[None]],
        progress: Callable[[], tuple[RankProgress, ...]],
        lost: str = "",
        ipv6: bool | None = None,
    ) -> None:
        self.instance = uuid.uuid4().hex
        self.welcomed = asyncio.Event()
        self.codec = Codec()
        self._joining = joining
        self._fingerprint = fingerprint
        self._handle = handle
        self._progress = progress
        self._lost = lost
        identity = self.instance.encode()
        connect = partial(AsyncDealer, address=joining.head, codec=self.codec, keys=joining.keys, ipv6=ipv6)
        self._control, self._heartbeats = connect(identity=identity), connect(identity=identity + HEARTBEAT_SUFFIX)
        self._answered = asyncio.Event()
        self._last_heard = time.monotonic()
        self._last_wait = ""

    async def run(self) -> None:
        """Until something ends it: raises HeadLostError, JoinError when nobody takes this node in time, or what
        `handle` and `fingerprint` raise."""
        works = (self._receive(), self._receive_heartbeats(), self._join(), self._beat())
        watches = (self._watch(dealer) for dealer in (self._control, self._heartbeats))
        tasks = [asyncio.ensure_future(work) for work in (*works, *watches)]
        try:
            while tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    tasks.remove(task)
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def send(self, message: Message) -> None:
        """Queue a message for the head."""
        await self._control.send(message)

    def close(self, *, linger: bool) -> None:
        """With `linger` what is queued is given a moment to leave."""
        self._control.close(linger=linger)
        self._heartbeats.close(linger=False)

    # -- joining ------------------------------------------------------------------------------------------------------

    async def _join(self) -> None:
        """Register until the head welcomes this node, then tell it what this node is.

        A node whose model is unusable joins all the same for a moment, so that the others learn why.
        """
        started = time.monotonic()
        deadline = started + self._joining.register_timeout_s
        problem = ""
        while not self.welcomed.is_set() and time.monotonic() < deadline:
            try:
                await self.send(await asyncio.to_thread(self._joining.register, self.instance))
            except JoinError as error:
                problem = str(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._joining.heartbeat_interval_s):
                    await self.welcomed.wait()
            if self._is_unusable():
                deadline = min(deadline, started + FAREWELL_S)
        if not self.welcomed.is_set() and not self._is_unusable():
            raise self._nobody_answers(problem)
        fingerprint = await asyncio.shield(self._fingerprint)
        await self.send(msgspec.structs.replace(fingerprint, instance=self.instance))

    def _is_unusable(self) -> bool:
        return self._fingerprint.done() and self._fingerprint.exception() is not None

    def _nobody_answers(self, problem: str) -> JoinError | LostError:
        head, waited_s = self._joining.head, self._joining.register_timeout_s
        if self._last_wait:
            return JoinError(f"the head {head} did not take this node within {waited_s:g} s: {self._last_wait}")
        if self._lost:
            return LostError(
                f"{self._lost}; it did not come back within {waited_s:g} s (TPDIST_REGISTER_TIMEOUT_S waits longer)"
            )
        detail = f" ({problem})" if problem else ""
        return JoinError(
            f"no head answered at {head} within {waited_s:g} s{detail}. Check that the head is started "
            "with that MISTRALRS_MN_HEAD_PORT, that a firewall lets it through, and that all nodes have the same "
            "TPDIST_KEY_FILE; TPDIST_REGISTER_TIMEOUT_S waits longer; `tpdist doctor` on all nodes tells what is wrong"
        )

    # -- staying ------------------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Say that this node lives and how far its ranks are, and notice when the head does not. The next word comes
        an interval after the head's answer: so nodes that it answers together wake it together."""
        await self.welcomed.wait()
        interval_s = self._joining.heartbeat_interval_s
        while True:
            self._answered.clear()
            await self._heartbeats.send(Heartbeat(instance=self.instance, ranks=self._progress()))
            sent_at = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._answered.wait()
                await asyncio.sleep(interval_s)
            if time.monotonic() - sent_at > 3 * interval_s:
                # This process itself stood still: what the head sent meanwhile has not been read yet.
                self._last_heard = time.monotonic()
            self._check_head()

    def _check_head(self) -> None:
        silent_s = time.monotonic() - self._last_heard
        if silent_s > self._joining.node_lost_s:
            raise HeadLostError(
                f"the head {self._joining.head} has not been heard for {silent_s:.1f} s "
                f"(TPDIST_NODE_LOST_S={self._joining.node_lost_s:g})"
            )

    async def _watch(self, dealer: AsyncDealer) -> None:
        while True:
            await dealer.hangup()
            if self.welcomed.is_set():
                raise HeadLostError(f"the head {self._joining.head} closed its connection: was it killed?")

    async def _receive_heartbeats(self) -> None:
        while True:
            envelope = await self._heartbeats.receive()
            self._last_heard = time.monotonic()
            self._answered.set()
            await self._handle(envelope)

    async def _receive(self) -> None:
        while True:
            envelope = await self._control.receive()
            self._last_heard = time.monotonic()
            match envelope.body:
                case Welcome(cluster_id=cluster_id):
                    self.codec.cluster_id = cluster_id
                    self.welcomed.set()
                case Wait(reason=reason):
                    if reason != self._last_wait:
                        logger.info("waiting to join: %s", reason)
                        await self._handle(envelope)
                    self._last_wait = reason
                case Rejoin(reason=reason):
                    raise HeadLostError(f"the head {self._joining.head} does not know this instance: {reason}")
                case _:
                    await self._handle(envelope)
