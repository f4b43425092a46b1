"""One node from joining to its end, without HTTP: sockets, coordinator (on the head), agent and ranks in one object.

`tpdist serve`, `tpdist generate`, torchrun and `LLM` all run a Node. It knows nothing of text, HTTP or the terminal.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tpdist.checkpoint.index import CheckpointIndex, check_names, model_fingerprint
from tpdist.checkpoint.resolve import resolve_model
from tpdist.control.agent import NodeAgent, Outcome
from tpdist.control.channel import AsyncRouter, ClusterKeys, Codec, tcp_address
from tpdist.control.child import output_of_module
from tpdist.control.coordinator import Coordinator
from tpdist.control.head_link import Joining
from tpdist.control.layout import make_layout
from tpdist.control.messages import DrainRequest, Fingerprint, ProbeReport, RankUpdate, Register
from tpdist.control.placing import OneProcess
from tpdist.control.route import LOOPBACK, interface_of
from tpdist.control.state import Layout, NodeFacts, Rules
from tpdist.control.supervisor import Supervisor
from tpdist.errors import InterruptedByUser, JoinError, LostError, SettingsError, TpdistError
from tpdist.introduction import control_host, introduce
from tpdist.models import registry
from tpdist.place import place_of
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.placement import Placement
from tpdist.settings import Settings

logger = logging.getLogger(__name__)

PROBE = ("tpdist.probe", "--json", "--parent-pid")
PROBE_TIMEOUT_S = 120.0
COLLECTIVE_HEARTBEATS = 10


@dataclass(frozen=True)
class Model:
    """A checkpoint whose headers and names have been checked."""

    folder: Path
    config: ModelConfig
    dtype: str
    digests: Mapping[str, str]


def open_model(model: str, *, revision: str | None) -> Model:
    """Fetch MODEL if it is a hub id, and check everything that its headers can tell. Raises CheckpointError or
    PlanError."""
    folder = resolve_model(model, revision=revision, progress=sys.stderr.isatty())
    config = registry.load_config(folder)
    index = CheckpointIndex.read(folder)
    check_names(index, registry.weights(config))
    return Model(folder, config, config.dtype or index.dtype or "float32", model_fingerprint(folder))


async def open_model_later(model: str, *, revision: str | None) -> Model:
    """open_model on a thread, so that a download does not keep this node from joining; a daemon's, so that it does not
    keep it from ending either."""
    opened: Future[Model] = Future()
    opened.set_running_or_notify_cancel()

    def work() -> None:
        try:
            opened.set_result(open_model(model, revision=revision))
        except Exception as error:
            opened.set_exception(error)

    threading.Thread(target=work, name="open-model", daemon=True).start()
    return await asyncio.wrap_future(opened)


class Node:
    """One node of a cluster. `model` may still be downloading: the node joins meanwhile. `environ` is what ranks
    inherit. `supervise` False: torchrun started the ranks. `on_plan` hears, on a head, what was planned before anything
    starts, and again when a later epoch is planned otherwise."""

    def __init__(
        self,
        settings: Settings,
        model: asyncio.Task[Model],
        *,
        environ: Mapping[str, str],
        run_dir: Path,
        supervise: bool = True,
        on_rank_update: Callable[[RankUpdate], None] | None = None,
        on_plan: Callable[[Model, Placement], None] | None = None,
    ) -> None:
        """Binds the control port. Raises SettingsError when it is taken or must not be opened."""
        self._settings = settings
        self._model = model
        self._on_plan = on_plan
        self._planned: Placement | None = None
        self._keys = ClusterKeys.read(settings.key_file) if settings.key_file else None
        self._place = place_of(settings)
        self._run_dir = run_dir
        self._supervises = supervise
        self._restarts = settings.max_restarts if supervise else 0
        self._coordinator = self._make_coordinator() if self._place.is_head else None
        joining = Joining(
            head=self._head_address(),
            keys=self._keys,
            register=self._register,
            register_timeout_s=settings.register_timeout_s,
            heartbeat_interval_s=settings.heartbeat_interval_s,
            node_lost_s=settings.node_lost_s,
            comes_back=not self._place.is_head and self._restarts > 0,
            standby=self._place.standby,
        )
        self.agent = NodeAgent(joining, fingerprint=self._fingerprint, on_rank_update=on_rank_update)
        self._supervisor = Supervisor(
            model=lambda: str(model.result().folder),
            key_file=settings.key_file,
            engine_address=_engine_address(run_dir),
            run_dir=run_dir,
            environ=environ,
            threads=settings.threads,
            log_level=settings.log_level,
            log_format=settings.log_format,
            trace_folder=settings.trace_folder,
            spawn=supervise,
            report=self.agent.report,
        )
        self._interrupted = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> Outcome:
        """Join, serve, and end. The outcome is the cluster's, with the first cause."""
        coordinator = asyncio.create_task(self._coordinator.run()) if self._coordinator else None
        agent = asyncio.create_task(self.agent.run(self._supervisor))
        try:
            waited = {task for task in (agent, coordinator) if task is not None}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if coordinator is not None and coordinator.done() and not agent.done():
                self.agent.abandon(TpdistError.exit_code, "the coordinator ended")
            outcome = await agent
            if self._coordinator is None or coordinator is None:
                return outcome
            # An agent that ends before the head knows it cannot tell it why: this does, and does nothing otherwise.
            await self._coordinator.interrupt(
                DrainRequest(reason=outcome.cause, immediate=True, exit_code=outcome.exit_code)
            )
            return Outcome(*await coordinator)
        finally:
            for task in (agent, coordinator):
                if task is not None and not task.done():
                    task.cancel()
            self.agent.close()
            if self._coordinator is not None:
                self._engine_router.close()
                self._router.close()

    async def interrupt(self, number: signal.Signals) -> None:
        """A signal: SIGTERM or SIGHUP drains the cluster, Ctrl-C does not wait, and a second one ends this node at
        once. SIGUSR1 comes from the kernel when the rank that started this agent under torchrun has gone."""
        if number == signal.SIGUSR1:
            self.agent.abandon(LostError.exit_code, "the rank that started this agent has gone")
            return
        self._interrupted += 1
        code = InterruptedByUser.exit_code if number == signal.SIGINT else 0
        reason = f"{number.name} on {self._place.name}"
        if self._interrupted > 1:
            self.agent.abandon(code or LostError.exit_code, f"second signal: {reason}")
            return
        logger.info("%s: %s", number.name, "ending" if code else "draining, no new requests")
        await self.agent.leave(DrainRequest(reason=reason, immediate=bool(code), exit_code=code))

    # -- parts --------------------------------------------------------------------------------------------------------

    def _make_coordinator(self) -> Coordinator:
        settings, place = self._settings, self._place
        self._router = AsyncRouter(name="control", codec=Codec(), keys=self._keys)
        self._router.bind(f"ipc://{self._run_dir}/control.sock")
        if place.control_port is not None:
            host = control_host(settings)
            self._bind_control(host, place.control_port)
            _explain_control(settings, host, place.control_port)
        rules = Rules(
            cluster_id=uuid.uuid4().hex,
            num_workers=place.num_workers,
            global_world_size=place.global_world_size,
            settings=settings.shared(),
            plan=self._plan,
            register_timeout_s=settings.register_timeout_s,
            fetch_timeout_s=settings.fetch_timeout_s,
            load_timeout_s=settings.load_timeout_s,
            heartbeat_interval_s=settings.heartbeat_interval_s,
            node_lost_s=settings.node_lost_s,
            hang_timeout_s=settings.hang_timeout_s,
            shutdown_timeout_s=settings.shutdown_timeout_s,
            max_restarts=self._restarts,
            retry_timeout_s=settings.retry_timeout_s,
        )
        self._engine_router = AsyncRouter(name="engine", codec=Codec())
        self._engine_router.bind(_engine_address(self._run_dir))
        return Coordinator(router=self._router, engine=self._engine_router, rules=rules)

    def _bind_control(self, host: str, port: int) -> None:
        try:
            self._router.bind(tcp_address(host, port))
        except SettingsError as error:
            raise SettingsError(
                f"{error}: set another MISTRALRS_MN_HEAD_PORT here and in each worker's MISTRALRS_MN_WORKER_SERVER_ADDR"
            ) from error

    def _plan(self, nodes: Sequence[NodeFacts]) -> Layout:
        settings, model = self._settings, self._model.result()
        layout = make_layout(
            nodes,
            config=model.config,
            weights=registry.weights(model.config),
            settings=settings.shared(),
            explicit=settings.explicit(),
            one_process=one_process_of(settings),
            checkpoint_dtype=model.dtype,
            global_world_size=self._place.global_world_size,
            store_port=settings.store_port,
            load_timeout_s=settings.load_timeout_s,
            collective_timeout_s=self._collective_timeout_s(),
            local_interface=interface_of,
        )
        if self._on_plan is not None and layout.placement not in (None, self._planned):
            self._on_plan(model, layout.placement)
        self._planned = layout.placement
        return layout

    def _collective_timeout_s(self) -> float:
        """How long a rank waits for others. What hangs is for the head to see, which knows whether any rank advances;
        a stage may wait long for a slow one. Ranks that nobody kills give up by themselves, after the head has had time
        to see which one hangs."""
        settings = self._settings
        if self._supervises:
            return settings.load_timeout_s
        return settings.hang_timeout_s + COLLECTIVE_HEARTBEATS * settings.heartbeat_interval_s

    def _head_address(self) -> str:
        if self._place.head is None:
            return f"ipc://{self._run_dir}/control.sock"
        return tcp_address(*self._place.head)

    def _register(self, instance: str) -> Register:
        """What this node says first. Raises JoinError or SettingsError."""
        return introduce(self._settings, self._place, instance=instance, head=self._place.head)

    async def _fingerprint(self) -> Fingerprint:
        report, model = await asyncio.gather(probe_in_child(), self._model)
        return Fingerprint(
            instance="",
            probe=report,
            model=dict(model.digests),
            explicit=self._settings.explicit(),
        )


def one_process_of(settings: Settings) -> OneProcess | None:
    """What is asked of the placement over the devices of one process; None if there are ranks instead."""
    if not settings.one_process:
        return None
    return OneProcess(
        placement=settings.placement,
        device_layers=settings.device_layers,
        device_map=settings.device_map,
        max_memory=settings.max_memory,
        disk=settings.offload_folder is not None,
        optimize=settings.optimize,
    )


def _engine_address(run_dir: Path) -> str:
    return f"ipc://{run_dir}/engine.sock"


def _explain_control(settings: Settings, host: str, port: int) -> None:
    if host == LOOPBACK:
        logger.info(
            "control plane on %s:%d, this machine only; for other machines run `tpdist keygen FILE` and set "
            "TPDIST_KEY_FILE on all nodes",
            host,
            port,
        )
    elif settings.key_file is None:
        logger.warning("control plane on port %d of all interfaces WITHOUT a key (TPDIST_INSECURE=1)", port)
    else:
        logger.info("control plane on port %d of all interfaces, encrypted with %s", port, settings.key_file)


@contextlib.contextmanager
def handled_signals(node: Node) -> Iterator[None]:
    """Signals that end a program go to the node while this lasts."""
    loop = asyncio.get_running_loop()
    interrupts: set[asyncio.Task[None]] = set()

    def interrupt(number: signal.Signals) -> None:
        task = asyncio.ensure_future(node.interrupt(number))
        interrupts.add(task)
        task.add_done_callback(interrupts.discard)

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
    for number in numbers:
        loop.add_signal_handler(number, interrupt, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def probe_in_child() -> ProbeReport:
    """Versions, devices and memory of this machine, read by a process of its own so that this one needs no torch."""
    name = os.uname().nodename
    try:
        code, output, said = await output_of_module(*PROBE, f"{os.getpid()}", timeout_s=PROBE_TIMEOUT_S)
    except TimeoutError as error:
        raise JoinError(
            f"`tpdist probe` on {name} did not answer within {PROBE_TIMEOUT_S:g} s: is a GPU stuck? `nvidia-smi` tells"
        ) from error
    if code != 0:
        raise JoinError(f"`tpdist probe` on {name} ended with {code}: {said}")
    return msgspec.json.decode(output, type=ProbeReport)
