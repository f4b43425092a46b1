"""How doctors meet: the head's, which gathers the workers and asks them for work, and a worker's, which answers.

Over the control plane's sockets, with its key. Every wait has a deadline; what it means that one has passed is for
verdicts.py.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tpdist.control.channel import AsyncDealer, AsyncRouter
from tpdist.control.codec import MalformedFrameError
from tpdist.control.messages import Preflight, Register, Wait
from tpdist.errors import JoinError
from tpdist.preflight.orders import Station
from tpdist.preflight.words import (
    Answer,
    Checkup,
    Diagnosis,
    Done,
    Failed,
    Findings,
    Heard,
    Hello,
    Order,
    Refused,
    Word,
    Work,
    pack,
    unpack,
)

logger = logging.getLogger(__name__)

BEAT_S = 2.0
SILENCE_S = 20.0
"""A head that is not heard for so long has gone."""
HELLO_S = 1.0
CHECKUP_S = 75.0
"""For what a worker finds out by itself: its children's deadlines are shorter."""


# -- the head's side --------------------------------------------------------------------------------------------------


@dataclass
class _Visitor:
    """A worker that came."""

    identity: bytes
    register: Register
    findings: Findings | None = None


@dataclass(frozen=True)
class LocalColleague:
    """The head's own node."""

    station: Station

    async def ask(self, work: Work, *, timeout_s: float) -> Answer:
        try:
            async with asyncio.timeout(timeout_s):
                return await self.station.carry_out(work)
        except TimeoutError:
            return Failed(problem=f"no answer within {timeout_s:g} s")


@dataclass
class Practice:
    """The head's doctor: who came, and what is asked of whom."""

    router: AsyncRouter
    num_workers: int
    _visitors: dict[int, _Visitor] = field(default_factory=dict)
    _asked: dict[int, asyncio.Future[Answer]] = field(default_factory=dict)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def open(self) -> None:
        """Receive and give signs of life, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive())
            tasks.create_task(self._beat())

    async def gather(self, *, timeout_s: float) -> list[tuple[int, Register, Findings | None]]:
        """The workers that come within `timeout_s`, by worker id, with what they find. Ends early if all have come."""
        await self._wait_for(lambda: len(self._visitors) == self.num_workers, timeout_s)
        await self._wait_for(lambda: all(each.findings for each in self._visitors.values()), CHECKUP_S)
        return [(key, each.register, each.findings) for key, each in sorted(self._visitors.items())]

    async def ask(self, worker_id: int, work: Work, *, timeout_s: float) -> Answer:
        """What a worker answers; Failed if it does not in time."""
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await self.router.send(self._visitors[worker_id].identity, pack(Order(number=number, work=work)))
                return await self._asked[number]
        except TimeoutError:
            return Failed(problem=f"the node did not answer within {timeout_s:g} s")
        finally:
            del self._asked[number]

    async def tell(self, diagnosis: Diagnosis) -> None:
        """The last word to everybody who came."""
        await self.router.send_all([each.identity for each in self._visitors.values()], pack(diagnosis))

    async def _wait_for(self, happened: Callable[[], bool], timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(happened)

    async def _beat(self) -> None:
        while True:
            await self.router.send_all([each.identity for each in self._visitors.values()], pack(Heard()))
            await asyncio.sleep(BEAT_S)

    async def _receive(self) -> None:
        while True:
            identity, envelope = await self.router.receive()
            if not isinstance(envelope.body, Preflight):
                logger.warning("a node came that does not run `tpdist doctor` (%s)", type(envelope.body).__name__)
                await self.router.send(identity, Wait(reason="the head runs `tpdist doctor`, not `tpdist serve`"))
                continue
            try:
                await self._take(identity, unpack(envelope.body))
            except MalformedFrameError as error:
                logger.warning("dropped a word of %s: %s", identity.hex(), error)

    async def _take(self, identity: bytes, word: Word) -> None:
        match word:
            case Hello(register=register):
                await self._admit(identity, register)
            case Checkup(findings=findings):
                for visitor in self._visitors.values():
                    if visitor.identity == identity:
                        visitor.findings = findings
            case Done(number=number, answer=answer):
                if number in self._asked and not self._asked[number].done():
                    self._asked[number].set_result(answer)
        async with self._news:
            self._news.notify_all()

    async def _admit(self, identity: bytes, register: Register) -> None:
        if reason := self._refusal(identity, register):
            await self.router.send(identity, pack(Refused(reason=reason)))
            return
        assert register.worker_id is not None
        if register.worker_id not in self._visitors:
            self._visitors[register.worker_id] = _Visitor(identity, register)
        await self.router.send(identity, pack(Heard()))

    def _refusal(self, identity: bytes, register: Register) -> str:
        worker_id = register.worker_id
        if worker_id is None or worker_id >= self.num_workers:
            return (
                f"MISTRALRS_MN_WORKER_ID={worker_id}, but the head's MISTRALRS_MN_HEAD_NUM_WORKERS={self.num_workers} "
                "allows ids below that"
            )
        present = self._visitors.get(worker_id)
        if present is not None and present.identity != identity:
            other = present.register
            return (
                f"MISTRALRS_MN_WORKER_ID={worker_id} is taken by {other.hostname}, pid {other.pid}; give each its own"
            )
        return ""


@dataclass(frozen=True)
class RemoteColleague:
    """A worker that came."""

    practice: Practice
    worker_id: int

    async def ask(self, work: Work, *, timeout_s: float) -> Answer:
        return await self.practice.ask(self.worker_id, work, timeout_s=timeout_s)


# -- a worker's side --------------------------------------------------------------------------------------------------


class HeadSilentError(JoinError):
    """No doctor answered at the head's address, or it stopped to. `heard`: whether it ever did."""

    def __init__(self, message: str, *, heard: bool) -> None:
        super().__init__(message)
        self.heard = heard


@dataclass
class Visit:
    """A worker's doctor at the head's."""

    dealer: AsyncDealer
    register: Register
    station: Station
    _heard: asyncio.Event = field(default_factory=asyncio.Event)

    async def pay(self, findings: Awaitable[Findings], *, timeout_s: float) -> Diagnosis:
        """Say hello until the head hears it, tell it the findings, do what it asks for, and return its last word.

        Raises HeadSilentError, and JoinError when the head refuses this worker.
        """
        telling = asyncio.create_task(self._tell(findings))
        working: set[asyncio.Task[None]] = set()
        greeting = asyncio.create_task(self._greet())
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                word = await self._next(deadline)
                self._heard.set()
                deadline = time.monotonic() + SILENCE_S
                match word:
                    case Order():
                        task = asyncio.create_task(self._work(word))
                        working.add(task)
                        task.add_done_callback(working.discard)
                    case Refused(reason=reason):
                        raise JoinError(f"the head at {self.dealer.address} refuses this worker: {reason}")
                    case Diagnosis():
                        return word
        finally:
            await _end((telling, greeting, *working))

    async def _next(self, deadline: float) -> Word:
        """The next word. Raises HeadSilentError at the deadline."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while True:
                    envelope = await self.dealer.receive()
                    if isinstance(envelope.body, Preflight):
                        return unpack(envelope.body)
        except TimeoutError as error:
            heard = self._heard.is_set()
            what = "fell silent" if heard else "did not answer"
            raise HeadSilentError(f"the head's doctor at {self.dealer.address} {what}", heard=heard) from error

    async def _greet(self) -> None:
        """More than once: the head may start later, and be started again."""
        while not self._heard.is_set():
            await self.dealer.send(pack(Hello(register=self.register)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HELLO_S):
                    await self._heard.wait()

    async def _tell(self, findings: Awaitable[Findings]) -> None:
        checkup = Checkup(findings=await findings)
        await self._heard.wait()
        await self.dealer.send(pack(checkup))

    async def _work(self, order: Order) -> None:
        await self.dealer.send(pack(Done(number=order.number, answer=await self.station.carry_out(order.work))))


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel what still runs. Raises what one of them failed with: it is the first cause."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
