"""Many nodes in one process, without ranks: for a head they are real ones, with the two sockets that each node has.

They say what agents say (control/head_link.py, control/agent.py) in the real messages: they register until they are
welcomed, tell what they are, beat, report their ranks from start to ready, end them when they are told, and begin
again. The views of the cluster are counted; only the first node of a process decodes them, since on real machines that
costs each node its own time.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import zmq

from tpdist.control.channel import ClusterKeys, Codec
from tpdist.control.messages import (
    HEARTBEAT_SUFFIX,
    Assign,
    Connect,
    DeviceInfo,
    EndEpoch,
    EpochEnded,
    Fingerprint,
    Heartbeat,
    Listening,
    Message,
    ProbeReport,
    RankGone,
    RankProgress,
    RankUpdate,
    Register,
    Rejoin,
    Shutdown,
    Welcome,
)
from tpdist.control.state import Key, node_index

GPU_BYTES = 80 * 2**30
MEMORY_BYTES = 2**40
CHECKPOINT_BYTES = 2**30
VIEW = msgspec.msgpack.encode("ClusterState")
NEWS = msgspec.msgpack.encode("ClusterNews")
SERVING = msgspec.msgpack.encode("state") + msgspec.msgpack.encode("ready")
TAG_BYTES = 128
MOMENTS = ("assigned", "ready", "served", "shown", "ended")
"""Of a node: it has its Assign, its rank is ready, it knows that the cluster is, it has the whole view of that, it was
told that the epoch ended."""


def register_of(key: Key, instance: str) -> Register:
    """The first word of a node with one rank."""
    return Register(
        instance=instance,
        worker_id=key,
        hostname=f"host-{node_index(key):05}",
        pid=1000 + node_index(key),
        address="127.0.0.1",
        head_address="127.0.0.1",
        interface="lo",
        global_world_size=None,
        local_world_size=1,
    )


def fingerprint_of(key: Key, instance: str) -> Fingerprint:
    """A machine of its own, with one GPU."""
    gpu = DeviceInfo(
        kind="cuda", index=0, name="NVIDIA H100 80GB HBM3", total_bytes=GPU_BYTES, free_bytes=GPU_BYTES - 2**30
    )
    probe = ProbeReport(
        hostname=f"host-{node_index(key):05}",
        host_id=f"{node_index(key):032x}",
        num_cpus=64,
        memory_bytes=MEMORY_BYTES,
        available_bytes=MEMORY_BYTES // 2,
        python="3.11.9",
        tpdist="0.1.0",
        torch="2.13.0",
        cuda="13.0",
        nccl="2.28.9",
        driver="580.1",
        devices=(gpu,),
    )
    files = ("config.json", "tokenizer.json", *(f"model-{number:05}.safetensors" for number in range(8)))
    model = {name: f"{number:064x}" for number, name in enumerate(files)}
    return Fingerprint(instance=instance, probe=probe, model=model, explicit={})


class Line:
    """One socket to the head. What arrives goes to `on_frame`; nothing here blocks."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: str,
        *,
        identity: bytes,
        keys: ClusterKeys | None,
        on_frame: Callable[[bytes], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_frame = on_frame
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.linger = 0
        self._socket.sndhwm = 0
        if keys is not None:
            self._socket.curve_serverkey = keys.head_public
            self._socket.curve_secretkey = keys.node_secret
            self._socket.curve_publickey = keys.node_public
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._drain)
        self._socket.connect(address)

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)
        # The descriptor tells of changes only, and sending may have swallowed one.
        self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        while not self._socket.closed:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_frame(frame)

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        self._socket.close()


@dataclass
class Counts:
    """What the nodes of one process have done and seen. `at` tells when the last of them came to a moment; `due`
    counts those that have not yet."""

    num_bytes: Counter[str] = field(default_factory=Counter)
    num_messages: Counter[str] = field(default_factory=Counter)
    at: dict[str, float] = field(default_factory=dict)
    first_at: dict[str, float] = field(default_factory=dict)
    due: dict[str, set[str]] = field(default_factory=dict)
    reached: dict[str, asyncio.Event] = field(default_factory=dict)

    def expect(self, instances: set[str]) -> None:
        """From now on, wait for these nodes anew."""
        for moment in MOMENTS:
            self.due[moment] = set(instances)
            self.reached[moment] = asyncio.Event()
            self.at.pop(moment, None)
            self.first_at.pop(moment, None)

    def forget(self, instance: str) -> None:
        """A node is not waited for any more."""
        for moment, due in self.due.items():
            due.discard(instance)
            if not due:
                self.reached[moment].set()

    def received(self, kind: str, frame: bytes) -> None:
        self.num_bytes[kind] += len(frame)
        self.num_messages[kind] += 1

    def come(self, moment: str, instance: str) -> None:
        """A node comes to a moment."""
        due = self.due[moment]
        if instance not in due:
            return
        due.discard(instance)
        self.at[moment] = time.monotonic()
        self.first_at.setdefault(moment, self.at[moment])
        if not due:
            self.reached[moment].set()


class SimulatedNode:
    """One node with one rank."""

    def __init__(self, nodes: "SimulatedNodes", key: Key, life: int) -> None:
        self.key = key
        self.instance = f"{node_index(key):08x}{life:024x}"
        self._nodes = nodes
        self._codec = Codec()
        self._step = 0
        self._rank: int | None = None
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}
        identity = self.instance.encode()
        self._control = nodes.line(identity, self._on_control)
        self._beats = nodes.line(identity + HEARTBEAT_SUFFIX, self._on_beat)
        self._register()

    def close(self) -> None:
        """As a process that is killed: no word, and the connections close."""
        self.fall_silent()
        self._control.close()
        self._beats.close()

    def fall_silent(self) -> None:
        """As a machine that loses its network: the connections stay."""
        for timer in self._timers.values():
            timer.cancel()

    def lose_rank(self) -> None:
        """The rank of this node is killed."""
        assert self._rank is not None
        self._say(RankGone(rank=self._rank, exit_code=-9, cause="it was killed"))

    def _say(self, body: Message) -> None:
        self._control.send(self._codec.encode(body))

    def _later(self, work: Callable[[], None]) -> None:
        if work in self._timers:
            self._timers[work].cancel()
        self._timers[work] = asyncio.get_running_loop().call_later(self._nodes.heartbeat_interval_s, work)

    def _register(self) -> None:
        if not self._codec.cluster_id:
            self._say(register_of(self.key, self.instance))
            self._later(self._register)

    def _beat(self) -> None:
        self._step += 1
        progress = ()
        if self._rank is not None:
            progress = (RankProgress(self._rank, self._step, 40 * self._step, "all_reduce", False, "S"),)
        self._beats.send(self._codec.encode(Heartbeat(instance=self.instance, ranks=progress)))
        self._later(self._beat)

    def _on_beat(self, frame: bytes) -> None:
        self._nodes.counts.received("Heartbeat", frame)
        self._codec.decode(frame)
        if not self._timers[self._beat].cancelled():
            self._later(self._beat)

    def _on_control(self, frame: bytes) -> None:
        counts = self._nodes.counts
        beginning = frame[:TAG_BYTES]
        if SERVING in beginning and any(kind in beginning for kind in (VIEW, NEWS)):
            counts.come("served", self.instance)
            if VIEW in beginning:
                counts.come("shown", self.instance)
        if VIEW in beginning and not self._nodes.decodes_views(self):
            counts.received("ClusterState", frame)
            return
        envelope = self._codec.decode(frame)
        counts.received(type(envelope.body).__name__, frame)
        self._hear(envelope.body, envelope.epoch)

    def _hear(self, body: Message, epoch: int) -> None:
        match body:
            case Welcome(cluster_id=cluster_id) if not self._codec.cluster_id:
                self._codec.cluster_id = cluster_id
                self._say(fingerprint_of(self.key, self.instance))
                self._beat()
            case Assign() if body.epoch > self._codec.epoch:
                self._start(body)
            case Connect() if epoch == self._codec.epoch:
                self._become_ready()
            case EndEpoch() if epoch == self._codec.epoch:
                self._rank = None
                self._nodes.counts.come("ended", self.instance)
                self._say(EpochEnded(instance=self.instance))
            case Rejoin():
                self._nodes.replace(self.key)
            case Shutdown(cause=cause):
                self._nodes.fail(f"node {self.key} was told to end: {cause}")
            case _:
                pass

    def _start(self, assign: Assign) -> None:
        self._codec.epoch = assign.epoch
        self._rank = assign.first_rank
        self._nodes.counts.come("assigned", self.instance)
        self._update("start")
        if self.key is None:
            self._say(Listening(store_port=1, plan_port=2))

    def _become_ready(self) -> None:
        self._update("connect")
        self._update("load", total=CHECKPOINT_BYTES)
        self._update("load", total=CHECKPOINT_BYTES, done=CHECKPOINT_BYTES, load_s=1.5)
        self._update("warmup")
        self._update("ready", weight_bytes=CHECKPOINT_BYTES, kv_blocks=1000)
        self._nodes.counts.come("ready", self.instance)

    def _update(self, phase: str, **more: float) -> None:
        assert self._rank is not None
        self._say(RankUpdate(rank=self._rank, pid=2000 + self._rank, device="cuda:0", phase=phase, **more))


class SimulatedNodes:
    """The nodes of one process, by place."""

    def __init__(self, *, address: str, keys: ClusterKeys | None, heartbeat_interval_s: float) -> None:
        self.heartbeat_interval_s = heartbeat_interval_s
        self.counts = Counts()
        self.failed = ""
        self._address = address
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.max_sockets = 65536
        self._nodes: dict[Key, SimulatedNode] = {}
        self._lives = 0

    def line(self, identity: bytes, on_frame: Callable[[bytes], None]) -> Line:
        return Line(self._context, self._address, identity=identity, keys=self._keys, on_frame=on_frame)

    def join(self, keys: list[Key]) -> float:
        """All go at once; returns when."""
        started = time.monotonic()
        self._nodes = {key: self._new(key) for key in keys}
        self.expect()
        return started

    def expect(self) -> None:
        """Wait anew for what comes to all nodes that are here."""
        self.counts.expect({node.instance for node in self._nodes.values()})

    def lose(self, key: Key, how: str) -> float:
        """A node is killed (`close`) or falls `silent`, or its rank is killed (`rank`); returns when."""
        node = self._nodes[key]
        if how == "rank":
            self.expect()
            at = time.monotonic()
            node.lose_rank()
            return at
        del self._nodes[key]
        self.expect()
        at = time.monotonic()
        if how == "close":
            node.close()
        else:
            node.fall_silent()
            self._nodes[key] = node
        return at

    def replace(self, key: Key) -> None:
        """A node is started again."""
        if key in self._nodes:
            self._nodes[key].close()
            self.counts.forget(self._nodes[key].instance)
        self._nodes[key] = self._new(key)
        for moment in ("assigned", "ready", "served", "shown"):
            self.counts.due[moment].add(self._nodes[key].instance)

    def decodes_views(self, node: SimulatedNode) -> bool:
        return next(iter(self._nodes.values()), None) is node

    def fail(self, why: str) -> None:
        self.failed = why

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()
        self._context.term()

    def _new(self, key: Key) -> SimulatedNode:
        self._lives += 1
        return SimulatedNode(self, key, self._lives)
