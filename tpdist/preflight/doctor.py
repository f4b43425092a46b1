"""One run of `tpdist doctor` on this node: alone, as the head's, or as a worker's.

The order: what the node is by itself, who comes, every link, sums over all nodes, the diagnosis. A node that is missing
or a link that is broken ends nothing: it becomes a line.
"""

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from tpdist.control.channel import AsyncDealer, AsyncRouter, ClusterKeys, Codec, tcp_address
from tpdist.control.messages import Register
from tpdist.control.route import LOOPBACK, interface_of
from tpdist.errors import JoinError, SettingsError, TpdistError
from tpdist.introduction import control_host, introduce
from tpdist.place import place_of
from tpdist.preflight.consult import (
    HELLO_S,
    SILENCE_S,
    HeadSilentError,
    LocalColleague,
    Practice,
    RemoteColleague,
    Visit,
)
from tpdist.preflight.examine import Colleague, make_head_address, measure_links, measure_reduce, nccl_ranks
from tpdist.preflight.link import watch_way
from tpdist.preflight.machine_verdicts import red
from tpdist.preflight.orders import Station
from tpdist.preflight.verdicts import diagnose
from tpdist.preflight.words import (
    Diagnosis,
    Examination,
    Failed,
    Findings,
    HeadUnreached,
    NodeExamined,
    ReduceMeasured,
)
from tpdist.settings import HostPort, Role, Settings


class NoRouteError(JoinError):
    """The kernel knows no way to the head, or its name stands for no address."""


Advise = Callable[[Examination], tuple[str, ...]]


@dataclass(frozen=True)
class Doctor:
    """What a run is made of. `advise` turns what was measured into sentences about the model, and may raise
    TpdistError. `say` hears what is being done, for people who wait."""

    settings: Settings
    model: str | None
    environ: Mapping[str, str]
    timeout_s: float
    advise: Advise
    say: Callable[[str], None]

    async def run(self) -> Diagnosis:
        """Raises SettingsError for what is wrong before anything is measured, JoinError when the head refuses."""
        settings = self.settings
        if settings.role is Role.TORCHRUN:
            raise SettingsError("`tpdist doctor` examines machines, not ranks: start it without torchrun, once on each")
        if settings.standby:
            raise SettingsError(
                "a standby has no place among the nodes that `tpdist doctor` examines: run it there with "
                "MISTRALRS_MN_WORKER_ID instead of TPDIST_STANDBY, in the place of that worker"
            )
        async with _station(self.environ) as station:
            if settings.head_address is not None:
                return await self._as_worker(station, settings.head_address)
            if settings.head_num_workers:
                return await self._as_head(station)
            return await self._alone(station)

    # -- alone --------------------------------------------------------------------------------------------------------

    async def _alone(self, station: Station) -> Diagnosis:
        self.say("examining this machine")
        node = NodeExamined(register=_introduction(self.settings), findings=await self._findings(station))
        examination = Examination(nodes=(node,), device=self.settings.device, settings=self.settings.shared())
        local = [LocalColleague(station)]
        self.say("adding up over ranks of this machine")
        return self._diagnosis(await self._with_reduces(examination, local, station, gloo_ranks=2))

    async def _findings(self, station: Station) -> Findings:
        settings = self.settings
        return await station.findings(self.model, revision=settings.revision, explicit=settings.explicit())

    # -- the head -----------------------------------------------------------------------------------------------------

    async def _as_head(self, station: Station) -> Diagnosis:
        async with self._practice() as practice:
            examination = await self._gathered(station, practice)
            others = [node.register.worker_id for node in examination.nodes[1:]]
            remote = [RemoteColleague(practice, key) for key in others if key is not None]
            examination = await self._measured(examination, [LocalColleague(station), *remote], station)
            diagnosis = self._diagnosis(examination)
            await practice.tell(diagnosis)
            return diagnosis

    @asynccontextmanager
    async def _practice(self) -> AsyncIterator[Practice]:
        settings = self.settings
        keys = ClusterKeys.read(settings.key_file) if settings.key_file else None
        router = AsyncRouter(name="doctor", codec=Codec(), keys=keys)
        try:
            _bind(router, control_host(settings), settings.head_port)
            practice = Practice(router, settings.head_num_workers or 0)
            async with _running(practice):
                yield practice
        finally:
            router.close()

    async def _gathered(self, station: Station, practice: Practice) -> Examination:
        settings = self.settings
        host = control_host(settings)
        control = f"port {settings.head_port} of {'all interfaces' if host == '*' else host}"
        self.say(f"waiting for {settings.head_num_workers} workers on {control}, at most {self.timeout_s:g} s")
        own, came = await asyncio.gather(self._findings(station), practice.gather(timeout_s=self.timeout_s))
        nodes = [NodeExamined(register=_introduction(self.settings), findings=own)]
        nodes += [NodeExamined(register=register, findings=findings) for _, register, findings in came]
        present = {worker_id for worker_id, _, _ in came}
        return Examination(
            nodes=tuple(nodes),
            missing=tuple(key for key in range(practice.num_workers) if key not in present),
            waited_s=self.timeout_s,
            control=control,
            has_key=settings.key_file is not None,
            local_only=host == LOOPBACK,
            device=settings.device,
            global_world_size=settings.global_world_size,
            settings=settings.shared(),
        )

    async def _measured(
        self, examination: Examination, colleagues: Sequence[Colleague], station: Station
    ) -> Examination:
        """With links and sums, as far as nodes came; sums are not tried over links that are broken."""
        if len(colleagues) < 2:
            return examination
        head = make_head_address(examination.nodes, interface_of)
        self.say(f"measuring the links between {len(colleagues)} nodes")
        registers = [node.register for node in examination.nodes]
        links = tuple(await measure_links(colleagues, registers, head))
        examination = msgspec.structs.replace(examination, links=links)
        if any(isinstance(link.answer, Failed) for link in links):
            return examination
        self.say("adding up over all nodes")
        return await self._with_reduces(examination, colleagues, station, gloo_ranks=1)

    async def _with_reduces(
        self, examination: Examination, colleagues: Sequence[Colleague], station: Station, *, gloo_ranks: int
    ) -> Examination:
        nodes = examination.nodes
        head = make_head_address(nodes, interface_of)
        plans = {"gloo": [gloo_ranks] * len(nodes), "nccl": nccl_ranks(nodes)}
        done: list[ReduceMeasured] = []
        for backend, ranks in plans.items():
            if ranks is not None:
                done.append(
                    await measure_reduce(
                        colleagues,
                        nodes,
                        head,
                        backend=backend,
                        num_ranks=ranks,
                        open_store=lambda host: station.open_store(host, self.settings.store_port),
                    )
                )
        return msgspec.structs.replace(examination, reduces=tuple(done))

    def _diagnosis(self, examination: Examination) -> Diagnosis:
        lines = diagnose(examination)
        try:
            advice = self.advise(examination)
        except TpdistError as error:
            step = "`tpdist plan` shows what would fit, and why"
            lines += (red("plan", "all nodes", str(error), step, error.exit_code),)
            advice = ()
        return Diagnosis(examination=examination, lines=lines, advice=advice)

    # -- a worker -----------------------------------------------------------------------------------------------------

    async def _as_worker(self, station: Station, head: HostPort) -> Diagnosis:
        findings = asyncio.create_task(self._findings(station))
        try:
            register = _introduction(self.settings, head=head)
            return await self._visit_or_say_why_not(station, register, head, findings)
        except NoRouteError as error:
            unreached = await _unreached(head, problem=str(error), routed=False)
            return await self._without_head(_introduction(self.settings), unreached, findings)
        finally:
            findings.cancel()

    async def _visit_or_say_why_not(
        self, station: Station, register: Register, head: HostPort, findings: asyncio.Task[Findings]
    ) -> Diagnosis:
        """The way is tried while the head is awaited: afterwards its doctor has ended, and nothing listens there."""
        over = asyncio.Event()
        watching = asyncio.create_task(watch_way(*head, every_s=HELLO_S, until=over))
        try:
            return await self._visit(station, register, head, findings)
        except HeadSilentError as error:
            over.set()
            waited_s = SILENCE_S if error.heard else self.timeout_s
            unreached = await _unreached(head, problem=await watching, waited_s=waited_s, heard=error.heard)
            return await self._without_head(register, unreached, findings)
        finally:
            over.set()
            watching.cancel()

    async def _visit(
        self, station: Station, register: Register, head: HostPort, findings: asyncio.Task[Findings]
    ) -> Diagnosis:
        """Raises HeadSilentError or JoinError."""
        self.say(f"waiting for the head's doctor at {head.host}:{head.port}, at most {self.timeout_s:g} s")
        key_file, address = self.settings.key_file, tcp_address(*head)
        keys = ClusterKeys.read(key_file) if key_file else None
        identity = register.instance.encode()
        with contextlib.closing(AsyncDealer(address=address, identity=identity, codec=Codec(), keys=keys)) as dealer:
            return await Visit(dealer, register, station).pay(asyncio.shield(findings), timeout_s=self.timeout_s)

    async def _without_head(
        self, register: Register, unreached: HeadUnreached, findings: Awaitable[Findings]
    ) -> Diagnosis:
        """What this node is by itself, and why it does not reach its head."""
        node = NodeExamined(register=register, findings=await findings)
        examination = Examination(nodes=(node,), unreached=unreached, device=self.settings.device)
        return Diagnosis(examination=examination, lines=diagnose(examination))


@asynccontextmanager
async def _station(environ: Mapping[str, str]) -> AsyncIterator[Station]:
    station = Station(environ=environ)
    try:
        yield station
    finally:
        await station.close()


@asynccontextmanager
async def _running(practice: Practice) -> AsyncIterator[None]:
    """The head's doctor receives while this lasts."""
    receiving = asyncio.create_task(practice.open())
    try:
        yield
    finally:
        receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await receiving


async def _unreached(
    head: HostPort, *, problem: str, waited_s: float = 0.0, routed: bool = True, heard: bool = False
) -> HeadUnreached:
    """With what the head's name stands for; one that stands for nothing is the first cause."""
    addresses, unresolved = await asyncio.to_thread(resolve, head.host)
    why = unresolved or problem
    return HeadUnreached(
        host=head.host, port=head.port, addresses=addresses, problem=why, waited_s=waited_s, routed=routed, heard=heard
    )


def resolve(host: str) -> tuple[tuple[str, ...], str]:
    """The addresses that a name stands for; or none, and why."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return (), error.strerror or str(error)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found)), ""


def _bind(router: AsyncRouter, host: str, port: int | None) -> None:
    assert port is not None, "a head has a port"
    try:
        router.bind(tcp_address(host, port))
    except SettingsError as error:
        raise SettingsError(
            f"{error}: if a cluster runs here (`tpdist status`), end it first, since the doctor uses its control port; "
            "or set another MISTRALRS_MN_HEAD_PORT here and in each worker's MISTRALRS_MN_WORKER_SERVER_ADDR"
        ) from error


def _introduction(settings: Settings, *, head: HostPort | None = None) -> Register:
    """Who this node is. Raises NoRouteError, or SettingsError without a key that is needed."""
    try:
        return introduce(settings, place_of(settings), instance=uuid.uuid4().hex, head=head)
    except JoinError as error:
        raise NoRouteError(str(error.__cause__ or error)) from error
