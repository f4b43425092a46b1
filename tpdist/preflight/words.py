"""What the doctors of a cluster say to each other, and what they find out. Plain data.

    worker -> head   Hello, Checkup, Done
    head -> worker   Heard (often, so that a worker notices when its head has gone), Refused, Order, Diagnosis

A word travels as MessagePack inside a control message (Preflight), so that it has the key, the size cap and the
protocol version of the control plane. Times are seconds, bandwidths bytes per second.
"""

from typing import Any

import msgspec

from tpdist.control.codec import MalformedFrameError
from tpdist.control.messages import Preflight, ProbeReport, Register


class Fact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what is found out."""


class Word(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of what is told apart by its name on the wire."""


# -- what one node is -------------------------------------------------------------------------------------------------


class Limits(Fact, frozen=True):
    """What the kernel grants. A limit of None is none. `infiniband`: whether there is such an adapter."""

    shm_bytes: int
    open_files: int | None
    locked_bytes: int | None
    infiniband: bool


class ModelFound(Fact, frozen=True):
    """A model whose headers are in order. `read_bytes` of its largest file took `read_s`; `from_disk` is False where
    the file system has no direct reads, so that the page cache may have answered."""

    folder: str
    total_bytes: int
    read_bytes: int
    read_s: float
    from_disk: bool
    digests: dict[str, str]


class Findings(Fact, frozen=True):
    """What a node finds out by itself. Where something could not be read its problem says why, and it is None. The
    model is None too if none was named; `model_exit_code` is of the kind of its problem."""

    limits: Limits
    probe: ProbeReport | None = None
    probe_problem: str = ""
    model: ModelFound | None = None
    model_problem: str = ""
    model_exit_code: int = 0
    explicit: dict[str, Any] = {}


# -- what is measured between nodes -----------------------------------------------------------------------------------


class Listen(Word, frozen=True):
    """Open a port on `host` for the measurements of others, who bring `token`."""

    host: str
    token: bytes


class Port(Word, frozen=True):
    port: int


class Reach(Word, frozen=True):
    """Measure the way to a listening peer."""

    host: str
    port: int
    token: bytes


class LinkFigures(Word, frozen=True):
    """`latency_s`: one way, half of the median round trip. `skew_s`: how much the peer's clock is ahead."""

    latency_s: float
    bandwidth: float
    skew_s: float


class Reduce(Word, frozen=True):
    """Run `num_ranks` ranks of an all-reduce, the first of them `first_rank`, which meet at the store."""

    backend: str
    first_rank: int
    num_ranks: int
    world_size: int
    host: str
    port: int
    interface: str | None
    timeout_s: float


class ReduceFigures(Word, frozen=True):
    """Seconds of an all-reduce of 16 KiB, which latency decides, and of 4 MiB, which bandwidth decides."""

    small_s: float
    large_s: float


class Failed(Word, frozen=True):
    """A work could not be done; `problem` says why."""

    problem: str


Work = Listen | Reach | Reduce
Answer = Port | LinkFigures | ReduceFigures | Failed


# -- words ------------------------------------------------------------------------------------------------------------


class Hello(Word, frozen=True):
    register: Register


class Heard(Word, frozen=True):
    """The head knows this worker, and lives."""


class Refused(Word, frozen=True):
    """The worker has no place in this cluster, for this reason."""

    reason: str


class Checkup(Word, frozen=True):
    findings: Findings


class Order(Word, frozen=True):
    number: int
    work: Work


class Done(Word, frozen=True):
    number: int
    answer: Answer


# -- the whole --------------------------------------------------------------------------------------------------------


class NodeExamined(Fact, frozen=True):
    """`findings` is None for a worker that came and did not say what it found."""

    register: Register
    findings: Findings | None


class LinkMeasured(Fact, frozen=True):
    """From one node to an address of another; nodes are counted in the order of ranks, the head being 0."""

    source: int
    target: int
    host: str
    port: int
    answer: LinkFigures | Failed


class ReduceMeasured(Fact, frozen=True):
    """`answers`: of each node that took part."""

    backend: str
    world_size: int
    nodes: tuple[int, ...]
    answers: tuple[ReduceFigures | Failed, ...]


class HeadUnreached(Fact, frozen=True):
    """A worker did not hear its head, or not to the end (`heard`). `addresses`: what the head's name stands for, empty
    if that cannot be found out (`problem` says why). Otherwise `problem` is the kernel's, which has no route to it
    (`routed` is False), or that of a plain TCP connection, empty if one came about while the worker waited. `waited_s`:
    since it began, or since it heard the head last."""

    host: str
    port: int
    addresses: tuple[str, ...]
    problem: str
    waited_s: float
    routed: bool = True
    heard: bool = False


class Examination(Fact, frozen=True):
    """All that was found out. Nodes are in the order of ranks, `nodes[0]` is the head's (on a worker that does not
    reach its head: its own). `missing`: worker ids that did not come within `waited_s` to `control`, where the head
    listens; `has_key`: with a key; `local_only`: to this machine alone. `settings` are the head's plan and engine
    settings."""

    nodes: tuple[NodeExamined, ...]
    missing: tuple[int, ...] = ()
    waited_s: float = 0.0
    control: str = ""
    has_key: bool = False
    local_only: bool = False
    device: str = "auto"
    global_world_size: int | None = None
    settings: dict[str, Any] = {}
    links: tuple[LinkMeasured, ...] = ()
    reduces: tuple[ReduceMeasured, ...] = ()
    unreached: HeadUnreached | None = None


class Line(Fact, frozen=True):
    """One line of the diagnosis. `state` is green, red or skipped. A red one has the next step, and the exit code of
    its kind of trouble."""

    check: str
    where: str
    state: str
    found: str
    next_step: str = ""
    exit_code: int = 0


class Diagnosis(Word, frozen=True):
    """The last word: what was found out, what it means, and what the planner makes of it."""

    examination: Examination
    lines: tuple[Line, ...]
    advice: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """The highest of the red lines': a node or link that is missing (5) before damaged files (4), a model that
        does not fit (3) and settings (2)."""
        return max((line.exit_code for line in self.lines), default=0)


_DECODER: msgspec.msgpack.Decoder[Hello | Heard | Refused | Checkup | Order | Done | Diagnosis] = (
    msgspec.msgpack.Decoder(Hello | Heard | Refused | Checkup | Order | Done | Diagnosis)
)


def pack(word: Word) -> Preflight:
    """As a control message."""
    return Preflight(word=msgspec.msgpack.encode(word))


def unpack(message: Preflight) -> Word:
    """Raises MalformedFrameError."""
    try:
        return _DECODER.decode(message.word)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise MalformedFrameError(f"no word of a doctor: {error}") from error
