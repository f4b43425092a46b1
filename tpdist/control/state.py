"""What the head knows of its cluster at one moment: plain immutable data, no decisions, no sockets, no clock.

membership.py makes the next State from the last, deadlines.py looks for what took too long, view.py shows it to people.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import msgspec

from tpdist.control.messages import Assign, EngineInfo, Fingerprint, RankProgress, RankUpdate, Register
from tpdist.plan.placement import Placement

RANK_PHASES = ("start", "connect", "load", "warmup", "ready")
# Requests are at the engine; and: there are ranks.
SERVING = ("ready", "draining")
RUNNING = (*RANK_PHASES, "draining")

# A node's place in the cluster: its worker id, or None for the head's own node.
Key = int | None


@dataclass(frozen=True)
class NodeFacts:
    """What the planner may know of a node."""

    register: Register
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Layout:
    """The planner's answer: one assignment a node, and a summary for people, made of `placement`."""

    assigns: tuple[Assign, ...]
    plan: dict[str, Any]
    placement: Placement | None = None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the head was told. `plan` turns the nodes' facts into assignments (node order: head, worker 0, 1, ...)
    and raises PlanError or JoinError when that is impossible."""

    cluster_id: str
    num_workers: int
    global_world_size: int | None
    settings: Mapping[str, Any]
    plan: Callable[[Sequence[NodeFacts]], Layout]
    register_timeout_s: float
    fetch_timeout_s: float
    load_timeout_s: float
    heartbeat_interval_s: float
    node_lost_s: float
    hang_timeout_s: float
    shutdown_timeout_s: float
    max_restarts: int
    retry_timeout_s: float

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """The places of this cluster, in the order of global ranks."""
        return (None, *range(self.num_workers))


@dataclass(frozen=True)
class RankPace:
    """How far a rank is, since when it has not advanced, and since when its process has been stopped, if it is."""

    progress: RankProgress
    advanced_at: float
    stopped_at: float | None


@dataclass(frozen=True)
class Node:
    """One node. `updated_at`: when each of its `ranks` reported last. `last_seen` is when it was heard last, `seen_at`
    the number of the tick before that. `has_run`: it has had ranks, in an epoch that was aborted. `ended`: none of
    those is left. `gone`: it has said goodbye, or cannot any more."""

    register: Register
    last_seen: float
    seen_at: int
    fingerprint: Fingerprint | None = None
    ranks: Mapping[int, RankUpdate] = field(default_factory=dict)
    updated_at: Mapping[int, float] = field(default_factory=dict)
    paces: Mapping[int, RankPace] = field(default_factory=dict)
    has_run: bool = False
    ended: bool = False
    gone: bool = False

    @property
    def where(self) -> str:
        return where(self.register)

    def where_is(self, rank: int) -> str:
        """Where one of its ranks is, with the number of that process once it is known."""
        known = self.ranks.get(rank)
        return where(self.register, pid=None if known is None else known.pid)


@dataclass(frozen=True)
class Failure:
    """Something ended that should not have. `reason` is its kind, for metrics: rank_lost, rank_failed, node_lost or
    hang; `exit_code` what the cluster ends with if it is not restarted; `instance` the node that is lost with it."""

    reason: str
    cause: str
    exit_code: int
    instance: str | None = None

    @property
    def headline(self) -> str:
        """The cause without what a rank logged before it ended."""
        return self.cause.partition("\n")[0]


@dataclass(frozen=True)
class Restart:
    """An epoch that was aborted, when and why."""

    epoch: int
    failure: Failure
    at: float


@dataclass(frozen=True)
class State:
    """`nodes` by place; `members` finds the place of an instance; `standbys`, by instance, have none. `num_ranks_at`
    counts ranks by RANK_PHASES, so that a rank's progress costs the same in a cluster of any size. `advanced_at` is
    when any rank advanced last. `suspect` is the lowest rank's report that its peers had gone, (since, rank, cause),
    which waits a moment for the first cause. `startup_s`: what the phases of this epoch took. `restarts` are the last
    few, `aborts` counts all by their reasons. `was_ready`: some epoch has served. `outcome` is how the cluster ends,
    (exit code, cause); set once."""

    phase: str = "register"
    phase_since: float = 0.0
    epoch: int = 0
    ticks: int = 0
    nodes: Mapping[Key, Node] = field(default_factory=dict)
    members: Mapping[str, Key] = field(default_factory=dict)
    standbys: Mapping[str, Node] = field(default_factory=dict)
    num_ranks_at: tuple[int, ...] = (0,) * len(RANK_PHASES)
    layout: Layout | None = None
    advanced_at: float = 0.0
    suspect: tuple[float, int, str] | None = None
    startup_s: Mapping[str, float] = field(default_factory=dict)
    restarts: tuple[Restart, ...] = ()
    aborts: Mapping[str, int] = field(default_factory=dict)
    was_ready: bool = False
    draining_reason: str = ""
    outcome: tuple[int, str] | None = None
    engine: EngineInfo | None = None

    @property
    def ordered(self) -> list[Node]:
        """Head first, then worker 0, worker 1, ...: the order of global ranks."""
        return [self.nodes[key] for key in sorted(self.nodes, key=node_index)]

    def assign_of(self, key: Key) -> Assign:
        """The ranks of a node. There must be a layout."""
        assert self.layout is not None
        return self.layout.assigns[node_index(key)]

    def enter(self, phase: str, now: float) -> "State":
        """In the next phase."""
        took_s = {**self.startup_s, self.phase: now - self.phase_since}
        return replace(self, phase=phase, phase_since=now, startup_s=took_s)

    def admit(self, key: Key, node: Node) -> "State":
        """With a new instance in a place; who held it before is no member any more."""
        left = self.dismiss(key) if key in self.nodes else self
        return replace(left, nodes={**left.nodes, key: node}, members={**left.members, node.register.instance: key})

    def dismiss(self, key: Key) -> "State":
        """With nobody in a place."""
        nodes = {other: node for other, node in self.nodes.items() if other != key}
        return replace(self, nodes=nodes, members={i: other for i, other in self.members.items() if other != key})

    def update(self, key: Key, node: Node) -> "State":
        """With news of a member."""
        return replace(self, nodes={**self.nodes, key: node})

    def heard(self, key: Key, now: float) -> "State":
        """With a sign of life of a member."""
        return self.update(key, seen(self.nodes[key], now, self.ticks))

    def without_standby(self, instance: str) -> "State":
        return replace(self, standbys={other: node for other, node in self.standbys.items() if other != instance})


def seen(node: Node, now: float, ticks: int) -> Node:
    """The node with a sign of life."""
    return replace(node, last_seen=now, seen_at=ticks)


def promoted(node: Node, key: Key) -> Node:
    """A standby that takes the place of worker `key`."""
    register = msgspec.structs.replace(node.register, worker_id=key, standby=False)
    return replace(node, register=register)


def name_of(key: Key) -> str:
    return "head" if key is None else f"worker {key}"


def node_id(key: Key) -> str:
    """A node as /v1/cluster calls it."""
    return "head" if key is None else f"worker-{key}"


def where(register: Register, *, pid: int | None = None) -> str:
    """A node as error messages name it, by its agent or another process of it."""
    name = "standby" if register.standby else name_of(register.worker_id)
    return f"{name} ({register.hostname}, pid {pid or register.pid})"


def node_index(key: Key) -> int:
    return 0 if key is None else key + 1
