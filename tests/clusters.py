"""Nodes, messages and a driver for the head's pure functions, for tests of the control plane."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tpdist.control.events import Action, Event, Finish, Heard, Interrupt, Send, Tick
from tpdist.control.membership import advance
from tpdist.control.messages import (
    Assign,
    DeviceInfo,
    DrainRequest,
    Fingerprint,
    Heartbeat,
    Message,
    ProbeReport,
    RankUpdate,
    Register,
    StageAssign,
)
from tpdist.control.state import Key, Layout, NodeFacts, Rules, State, name_of

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "auto",
    "tensor_parallel_size": None,
    "pipeline_parallel_size": None,
    "pipeline_layers": None,
    "tensor_shares": None,
    "optimize": "throughput",
    "max_model_len": None,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "block_size": 16,
    "kv_cache_memory_bytes": None,
    "gpu_memory_utilization": 0.9,
    "max_seq_len": 4096,
    "max_batch_size": 1,
    "max_image_length": 1024,
    "max_num_images": 1,
}


def register_of(key: Key, **changes: Any) -> Register:
    """A node's first word; its instance is named after its place unless changed."""
    fields: dict[str, Any] = {
        "instance": name_of(key),
        "worker_id": key,
        "hostname": f"host-{name_of(key)}",
        "pid": 100,
        "address": "127.0.0.1",
        "head_address": "127.0.0.1",
        "interface": "lo",
        "global_world_size": None,
        "local_world_size": None,
    }
    return Register(**{**fields, **changes})


def probe_of(**changes: Any) -> ProbeReport:
    """A machine of eight CPUs and no GPU."""
    fields: dict[str, Any] = {
        "hostname": "h",
        "host_id": "machine",
        "num_cpus": 8,
        "memory_bytes": 1 << 38,
        "available_bytes": 1 << 37,
        "python": "3.11.4",
        "tpdist": "0.1.0",
        "torch": "2.13.0",
        "cuda": None,
        "nccl": None,
        "driver": None,
        "devices": (),
    }
    return ProbeReport(**{**fields, **changes})


def gpus(count: int) -> tuple[DeviceInfo, ...]:
    return tuple(
        DeviceInfo(kind="cuda", index=index, name="H", total_bytes=1 << 36, free_bytes=1 << 36)
        for index in range(count)
    )


def fingerprint_of(
    instance: str, *, model: dict[str, str] | None = None, explicit: dict[str, Any] | None = None, **probe: Any
) -> Fingerprint:
    return Fingerprint(
        instance=instance,
        probe=probe_of(**probe),
        model={"config.json": "abc"} if model is None else model,
        explicit=explicit or {},
    )


def assigns_of(sizes: Sequence[int]) -> tuple[Assign, ...]:
    """Assignments of nodes with these numbers of ranks, as a planner would make them."""
    return tuple(
        Assign(
            cluster_id="",
            epoch=0,
            node_index=index,
            first_rank=sum(sizes[:index]),
            local_world_size=size,
            world_size=sum(sizes),
            tp_size=sum(sizes),
            stages=(StageAssign(start=0, stop=3, shares=(1,) * sum(sizes)),),
            item_devices=(),
            most_blocks=100,
            backend="gloo",
            threads=1,
            interface=None,
            head_host="127.0.0.1",
            bind_host="127.0.0.1",
            load_timeout_s=60,
            collective_timeout_s=60,
            store_port=0,
            max_model_len=512,
            settings=SETTINGS,
        )
        for index, size in enumerate(sizes)
    )


def plan_one_rank_each(nodes: Sequence[NodeFacts]) -> Layout:
    return Layout(assigns_of([1] * len(nodes)), {"world_size": len(nodes)})


def rules_of(num_workers: int, **changes: Any) -> Rules:
    """Rules with short deadlines: silence is 10 s, and a heartbeat is due each second. Nothing is restarted."""
    rules = Rules(
        cluster_id="cluster",
        num_workers=num_workers,
        global_world_size=None,
        settings=SETTINGS,
        plan=plan_one_rank_each,
        register_timeout_s=600,
        fetch_timeout_s=700,
        load_timeout_s=800,
        heartbeat_interval_s=1,
        node_lost_s=10,
        hang_timeout_s=60,
        shutdown_timeout_s=30,
        max_restarts=0,
        retry_timeout_s=60,
    )
    return replace(rules, **changes)


class Head:
    """The head's state over time, with all that it wanted done. `now` is its clock, which only `wait` moves."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.state = State()
        self.now = 0.0
        self.actions: list[Action] = []

    def apply(self, event: Event) -> tuple[Action, ...]:
        self.state, actions = advance(self.state, event, self.now, self.rules)
        self.actions += actions
        return actions

    def hear(self, instance: str, body: Message) -> tuple[Action, ...]:
        return self.apply(Heard(instance, body, epoch=self.state.epoch))

    def tick(self, *, in_flight: int = 0) -> tuple[Action, ...]:
        return self.apply(Tick(in_flight=in_flight))

    def interrupt(self, **request: Any) -> tuple[Action, ...]:
        return self.apply(Interrupt(DrainRequest(**request)))

    def wait(self, seconds: float, *, alive: Sequence[str] = (), in_flight: int = 0) -> None:
        """Let time pass in half seconds; the instances in `alive` are heard from meanwhile."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            for instance in alive:
                self.apply(Heard(instance, Heartbeat(instance=instance), epoch=self.state.epoch))
            self.tick(in_flight=in_flight)

    def register(self, *keys: Key) -> None:
        for key in keys:
            self.hear(name_of(key), register_of(key))

    def start(self) -> None:
        """All nodes join, and ranks are assigned."""
        self.register(*self.rules.keys)
        for key in self.rules.keys:
            self.hear(name_of(key), fingerprint_of(name_of(key)))

    def update(self, phase: str, **changes: Any) -> None:
        """Every rank reports a phase."""
        for rank, key in enumerate(self.rules.keys):
            self.hear(name_of(key), update_of(rank, phase, **changes))

    def be_ready(self) -> None:
        self.start()
        self.update("ready", kv_blocks=32)

    @property
    def sent(self) -> list[tuple[str, Message]]:
        return [(action.instance, action.body) for action in self.actions if isinstance(action, Send)]

    @property
    def finishes(self) -> list[Finish]:
        return [action for action in self.actions if isinstance(action, Finish)]

    def told(self, instance: str, kind: type[Message]) -> list[Any]:
        """Messages of a kind that were sent to an instance."""
        return [body for to, body in self.sent if to == instance and isinstance(body, kind)]


def update_of(rank: int, phase: str, **changes: Any) -> RankUpdate:
    return RankUpdate(rank=rank, pid=1000 + rank, device="cpu", phase=phase, **changes)
