"""Anybody on this machine may reach a keyless control port: whatever comes in, the cluster goes on serving."""

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from e2e.clients import Stream
from e2e.cluster import LOOPBACK, NodeProcess, Processes, free_port, head_variables
from tpdist.control.channel import Codec
from tpdist.control.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Abort,
    DrainRequest,
    EngineStats,
    Generate,
    Goodbye,
    Heartbeat,
    Message,
    RankGone,
    RankUpdate,
    Register,
    StepOutputs,
    TokenOutput,
    Wait,
)
from tpdist.sampling_params import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
goes_on = pytest.mark.usefixtures("_cluster_that_goes_on")

NUM_FRAMES = 300
NUM_CONNECTIONS = 200
NUM_TOKENS = 60
ANSWER_MS = 10_000
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
"""ZMTP 3.1: signature, version, mechanism, as-server, filler. See https://rfc.zeromq.org/spec/37/"""
FOREIGN = Register(
    instance="stranger",
    worker_id=0,
    hostname="elsewhere",
    pid=1,
    address=LOOPBACK,
    head_address=LOOPBACK,
    interface=None,
    global_world_size=3,
    local_world_size=None,
)
HARMLESS = (
    Heartbeat(instance="stranger"),
    Goodbye(instance="stranger", exit_code=1, cause="I was never here"),
    Abort(request_id="none"),
    DrainRequest(reason="because", immediate=True, exit_code=9),
    RankGone(rank=0, exit_code=1, cause="no"),
    RankUpdate(rank=99, pid=1, device="cpu", phase="no phase"),
    StepOutputs(step=1, outputs=(TokenOutput("none", (1,), "stop"),), stats=EngineStats()),
    FOREIGN,
    Register(**{**msgspec.structs.asdict(FOREIGN), "worker_id": None}),
    Generate(request_id="empty", prompt_token_ids=(), sampling=SamplingParams()),
    Generate(request_id="beyond", prompt_token_ids=(2**63,), sampling=SamplingParams()),
    Generate(request_id="long", prompt_token_ids=(1,) * 9000, sampling=SamplingParams()),
)
"""Well-formed messages of a peer that has not joined, or of nodes at the wrong time."""


@pytest.fixture
def head(three_nodes: Processes) -> NodeProcess:
    return next(node for node in three_nodes.nodes if node.name == "head")


@pytest.fixture
def port(head: NodeProcess) -> int:
    """The head's control port, as its log names it."""
    return int(head.log.partition(f"control plane on {LOOPBACK}:")[2].partition(",")[0])


@pytest.fixture
def _cluster_that_goes_on(three_nodes: Processes) -> Iterator[None]:
    """Streams that run meanwhile come to their end, and no rank and no epoch is another afterwards."""
    before = [identity_of(node.cluster()) for node in three_nodes.nodes]
    streams = [Stream(node, [1, 2, 3], max_tokens=NUM_TOKENS) for node in three_nodes.nodes]
    yield
    for stream in streams:
        assert stream.finish().done, stream.error
        assert len(stream.token_ids) == NUM_TOKENS
    assert [identity_of(node.cluster()) for node in three_nodes.nodes] == before
    assert {node.get("/readyz").status_code for node in three_nodes.nodes} == {200}


def identity_of(cluster: dict[str, Any]) -> list[int]:
    return [cluster["epoch"], *(rank["pid"] for node in cluster["nodes"] for rank in node["ranks"])]


@contextlib.contextmanager
def dealer(port: int, identity: bytes | None = None) -> Iterator[zmq.Socket[bytes]]:
    """A peer that speaks ZeroMQ. What it has sent leaves before it closes."""
    context = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.linger = ANSWER_MS
    if identity is not None:
        peer.setsockopt(zmq.IDENTITY, identity)
    peer.connect(f"tcp://{LOOPBACK}:{port}")
    try:
        yield peer
    finally:
        peer.close()
        context.term()


def wait_for_answer(peer: "zmq.Socket[bytes]") -> Message:
    """Register, as a second worker 0, and return what the head says to it: all that was sent before has been read by
    then. The answer goes to the instance that is named, so the peer's identity must be that."""
    peer.send(Codec().encode(FOREIGN))
    assert peer.poll(ANSWER_MS), "the head does not answer"
    return Codec().decode(peer.recv()).body


@goes_on
def test_random_bytes_are_no_harm(port: int) -> None:
    chance = random.Random(0)
    for size in [*range(40), 64, 1000, 100_000, 1_000_000]:
        send_raw(port, chance.randbytes(size))
    send_raw(port, b"GET / HTTP/1.1\r\nHost: head\r\n\r\n")


@goes_on
def test_garbage_after_a_valid_greeting_is_no_harm(port: int) -> None:
    chance = random.Random(1)
    for size in (0, 1, 2, 9, 100, 10_000):
        send_raw(port, GREETING + chance.randbytes(size))
        send_raw(port, GREETING[: chance.randrange(64)])
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    for size in (1, 50, 5000):
        send_raw(port, GREETING + ready + chance.randbytes(size))


@goes_on
def test_random_frames_are_counted_and_dropped(port: int, head: NodeProcess) -> None:
    chance = random.Random(2)
    with dealer(port, b"stranger") as peer:
        for _ in range(NUM_FRAMES):
            peer.send(chance.randbytes(chance.randrange(200)))
        for parts in (2, 3, 50):
            peer.send_multipart([chance.randbytes(5)] * parts)
        assert isinstance(wait_for_answer(peer), Wait)

        def is_named() -> bool:
            """One line a second is logged of all peers: again until it is this one's."""
            peer.send(b"garbage")
            return f"control: dropped a message from {b'stranger'.hex()}" in head.log

        head.wait_until(is_named, "does not name the peer of a dropped message", timeout_s=10)


@goes_on
def test_frames_that_are_nearly_messages_are_dropped(port: int) -> None:
    envelope = [PROTOCOL_VERSION, "", 0, {"type": "Heartbeat", "instance": "stranger"}]
    nearly = [
        [],
        [PROTOCOL_VERSION],
        [PROTOCOL_VERSION, "", 0, {}],
        [PROTOCOL_VERSION, "", 0, {"type": "Nothing"}],
        [PROTOCOL_VERSION, "", 0, {"type": "Heartbeat", "instance": "stranger", "extra": 1}],
        [PROTOCOL_VERSION, "", 0, {"type": "Heartbeat", "instance": 5}],
        [PROTOCOL_VERSION, "", "0", envelope[3]],
        [*envelope, 1],
        ["1", "", 0, envelope[3]],
        [2**64 - 1, "", 0, envelope[3]],
        [99, "", 0, {"type": "Heartbeat", "instance": "stranger"}],
        [
            PROTOCOL_VERSION,
            "",
            0,
            {"type": "Generate", "request_id": "x", "prompt_token_ids": [1], "sampling": {"n": -1}},
        ],
        {"type": "Heartbeat", "instance": "stranger"},
        None,
    ]
    with dealer(port, b"stranger") as peer:
        for value in nearly:
            peer.send(msgspec.msgpack.encode(value))
        peer.send(b"\x94\x01\xa0\x00" + b"\x91" * 100_000)
        for cut in range(1, 40):
            peer.send(msgspec.msgpack.encode(envelope)[:-cut])
        assert isinstance(wait_for_answer(peer), Wait)


@goes_on
@pytest.mark.parametrize("identity", [b"stranger", b"\xff\xfe", b"\xff\xfe/heartbeat", b"/heartbeat", b"s" * 255])
def test_messages_of_a_peer_that_has_not_joined_change_nothing(port: int, identity: bytes) -> None:
    with dealer(port, identity) as peer:
        for body in HARMLESS:
            peer.send(Codec().encode(body))
    with dealer(port, b"stranger") as peer:
        assert isinstance(wait_for_answer(peer), Wait)


@goes_on
def test_a_frame_beyond_the_limit_costs_its_sender_the_connection(port: int) -> None:
    context = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.linger = 0
    peer.connect(f"tcp://{LOOPBACK}:{port}")
    events = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    peer.send(bytes(MAX_MESSAGE_BYTES + 1))
    assert events.poll(ANSWER_MS), "the connection is still open"
    context.destroy(linger=0)


@goes_on
def test_many_connections_opened_and_closed_leave_it_serving(port: int) -> None:
    for _ in range(NUM_CONNECTIONS):
        socket.create_connection((LOOPBACK, port), timeout=5).close()


@goes_on
def test_many_idle_connections_leave_room_for_a_node(port: int) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(NUM_CONNECTIONS):
            held.enter_context(socket.create_connection((LOOPBACK, port), timeout=5))
        with dealer(port, b"stranger") as peer:
            assert isinstance(wait_for_answer(peer), Wait)


def test_a_peer_that_calls_itself_the_engine_is_not_believed(processes: Processes, model: Path) -> None:
    port = free_port()
    node = processes.serve("head", model, head_variables(port, world_size=1, num_workers=0)).wait_ready()
    with dealer(port, b"engine") as peer:
        peer.send(b"garbage")
        peer.send(Codec().encode(Heartbeat(instance="engine")))
        stream = Stream(node, [1, 2, 3], max_tokens=NUM_TOKENS).finish(timeout_s=ANSWER_MS / 1000)
        assert stream.done
        while peer.poll(0):
            assert not isinstance(Codec().decode(peer.recv()).body, Generate)


def send_raw(port: int, data: bytes) -> None:
    """Send bytes over a new connection; the other side may hang up at any time."""
    with socket.create_connection((LOOPBACK, port), timeout=5) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            continue
