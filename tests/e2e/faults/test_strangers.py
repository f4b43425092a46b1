"""Strangers who open very many connections, stall, replay what they have heard, or send too much: the cluster goes on
serving, and the memory of its agents stays bounded."""

import contextlib
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from e2e.clients import Stream, completed_tokens
from e2e.cluster import LOOPBACK, NodeProcess, Processes, free_port, head_variables, worker_variables
from tpdist.control.channel import ClusterKeys, Codec
from tpdist.control.messages import MAX_MESSAGE_BYTES, Fingerprint, Generate, Heartbeat, RankUpdate, Register
from tpdist.server.connections import Limits
from tpdist.server.open_files import MAX_OPEN_FILES

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_CONNECTIONS = 10_000
NUM_SPARE_FILES = 2000
NUM_STRANGERS = 3000
NUM_TOKENS = 200
CONTROL_MB = 200
HTTP_MB = 300
STRANGER_MS = 10_000
CURVE_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
"""ZMTP 3.1: signature, version, mechanism, as-server, filler. See https://rfc.zeromq.org/spec/37/"""


class Recorder(threading.Thread):
    """Stands between a node and its head, and keeps what the node says on each of its connections."""

    def __init__(self, port: int) -> None:
        super().__init__(name="recorder", daemon=True)
        self.heard: list[bytearray] = []
        self._port = port
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = self._listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                node, _ = self._listener.accept()
                head = socket.create_connection((LOOPBACK, self._port), timeout=5)
                self.heard.append(bytearray())
                for source, sink, said in ((node, head, self.heard[-1]), (head, node, bytearray())):
                    threading.Thread(target=_pass_on, args=(source, sink, said), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _pass_on(source: socket.socket, sink: socket.socket, said: bytearray) -> None:
    source.settimeout(None)
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            said += data
            sink.sendall(data)
    for connection in (source, sink):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "cluster.key"
    file.touch(mode=0o600)
    file.write_text(bytes(range(32)).hex())
    return file


@pytest.fixture(scope="module")
def control_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def recorder(control_port: int) -> Iterator[Recorder]:
    made = Recorder(control_port)
    yield made
    made.close()


@pytest.fixture(scope="module")
def with_key(model: Path, key: Path, control_port: int, recorder: Recorder) -> Iterator[Processes]:
    """A head on all interfaces and a worker that reaches it through the recorder."""
    with Processes({"TPDIST_KEY_FILE": str(key), "TPDIST_KV_CACHE_MEMORY_BYTES": "8MiB"}) as started:
        started.serve("head", model, head_variables(control_port, world_size=2, num_workers=1)).wait_for_log("HTTP on")
        started.serve("worker-0", model, worker_variables(0, recorder.port, world_size=2))
        started.wait_ready()
        yield started
        started.stop()


@pytest.fixture
def head(with_key: Processes) -> NodeProcess:
    return with_key.nodes[0]


@contextlib.contextmanager
def going_on(cluster: Processes) -> Iterator[None]:
    """Streams that run meanwhile come to their end, and no rank and no epoch is another afterwards."""
    before = [life_of(node) for node in cluster.nodes]
    streams = [Stream(node, [1, 2, 3], max_tokens=NUM_TOKENS).wait_first() for node in cluster.nodes]
    yield
    for stream in streams:
        assert stream.finish().done, stream.error
        assert len(stream.token_ids) == NUM_TOKENS
    assert [life_of(node) for node in cluster.nodes] == before
    assert_answers(cluster)


def assert_answers(cluster: Processes) -> None:
    for node in cluster.nodes:
        assert len(completed_tokens(node, [1, 2, 3], 5)) == 5


@pytest.fixture
def _goes_on(with_key: Processes) -> Iterator[None]:
    with going_on(with_key):
        yield


goes_on = pytest.mark.usefixtures("_goes_on")


def life_of(node: NodeProcess) -> list[int]:
    cluster = node.cluster()
    return [cluster["epoch"], *(rank["pid"] for each in cluster["nodes"] for rank in each["ranks"])]


def resident_mb(node: NodeProcess) -> float:
    pages = int(Path(f"/proc/{node.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def open_files(node: NodeProcess) -> int:
    return len(os.listdir(f"/proc/{node.pid}/fd"))


@contextlib.contextmanager
def many_files(count: int) -> Iterator[None]:
    """Room for so many files in this process. Skips the test where the machine does not allow that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + NUM_SPARE_FILES:
        pytest.skip(f"this machine allows {hard} open files, {count + NUM_SPARE_FILES} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def connections(port: int, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    with many_files(count), contextlib.ExitStack() as held:
        opened = []
        for _ in range(count):
            connection = held.enter_context(socket.create_connection((LOOPBACK, port), timeout=30))
            if sent:
                connection.sendall(sent)
            opened.append(connection)
        yield opened


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has hung up, after whatever it said."""
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            continue
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def stranger(
    port: int, keys: ClusterKeys | None, *, identity: bytes = b"stranger"
) -> Iterator[tuple["zmq.Socket[bytes]", "zmq.Socket[bytes]"]]:
    """A peer of ZeroMQ, and the events of its connection. Without `keys` it proposes no encryption."""
    context = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.linger = 0
    peer.setsockopt(zmq.IDENTITY, identity)
    if keys is not None:
        peer.curve_serverkey, peer.curve_publickey = keys.head_public, keys.node_public
        peer.curve_secretkey = keys.node_secret
    events = peer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
    peer.connect(f"tcp://{LOOPBACK}:{port}")
    try:
        yield peer, events
    finally:
        events.close(0)
        peer.close()
        context.term()


def next_event(events: "zmq.Socket[bytes]") -> int:
    assert events.poll(STRANGER_MS), "nothing happens to the connection"
    return int.from_bytes(events.recv_multipart()[0][:2], "little")


# -- the control port -------------------------------------------------------------------------------------------------


@goes_on
def test_ten_thousand_connections_to_the_control_port_do_not_keep_the_cluster_from_serving(
    with_key: Processes, head: NodeProcess, control_port: int
) -> None:
    before = resident_mb(head)
    with connections(control_port, NUM_CONNECTIONS, CURVE_GREETING) as strangers:
        head.wait_until(lambda: open_files(head) > NUM_CONNECTIONS, "did not accept them all", timeout_s=30)
        assert head.get("/readyz").status_code == 200
        assert_answers(with_key)
        assert resident_mb(head) - before < CONTROL_MB
        # Those who do not go on with the handshake are put out, one and all.
        head.wait_until(lambda: open_files(head) < NUM_CONNECTIONS, "keeps silent connections", timeout_s=60)
        head.wait_until(lambda: all(map(is_closed, strangers)), "keeps some silent connections", timeout_s=60)
    assert resident_mb(head) - before < CONTROL_MB


@goes_on
@pytest.mark.parametrize("seed", [bytes(32), None], ids=["another key", "no key"])
def test_a_peer_with_a_wrong_key_is_put_out(control_port: int, seed: bytes | None) -> None:
    keys = None if seed is None else ClusterKeys.from_seed(seed)
    with stranger(control_port, keys) as (peer, events):
        peer.send(b"anything")
        assert next_event(events) == zmq.EVENT_CONNECTED
        assert next_event(events) != zmq.EVENT_HANDSHAKE_SUCCEEDED


@goes_on
def test_frames_beyond_the_limit_are_not_read_before_or_after_the_handshake(
    head: NodeProcess, control_port: int, key: Path
) -> None:
    before = resident_mb(head)
    too_much = b"\x06" + (MAX_MESSAGE_BYTES + 1).to_bytes(8, "big")
    with connections(control_port, 50, CURVE_GREETING + too_much) as strangers:
        head.wait_until(lambda: all(map(is_closed, strangers)), "keeps those who announce too much", timeout_s=30)
    with stranger(control_port, ClusterKeys.read(key)) as (peer, events):
        assert [next_event(events), next_event(events)] == [zmq.EVENT_CONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED]
        peer.send(bytes(MAX_MESSAGE_BYTES + 1))
        assert next_event(events) == zmq.EVENT_DISCONNECTED
    assert resident_mb(head) - before < CONTROL_MB


@goes_on
def test_what_a_node_has_said_means_nothing_when_it_is_said_again(control_port: int, recorder: Recorder) -> None:
    """Registration, heartbeats, progress, requests: all of it, whole or in part, on connections of another."""
    recordings = [bytes(said) for said in recorder.heard]
    assert sum(map(len, recordings)) > 1000
    for recording in recordings:
        for said in (recording, recording + recording, CURVE_GREETING + recording[64:], recording[64:]):
            send_raw(control_port, said)


def test_without_a_key_too_what_a_node_has_said_means_nothing_from_another(processes: Processes, model: Path) -> None:
    port = free_port()
    recorder = Recorder(port)
    processes.serve("head", model, head_variables(port, world_size=2, num_workers=1)).wait_for_log("HTTP on")
    processes.serve("worker-0", model, worker_variables(0, recorder.port, world_size=2))
    processes.wait_ready()
    assert_answers(processes)
    frames = [frame for said in recorder.heard for frame in frames_of(bytes(said))]
    kinds = {type(Codec().decode(frame).body) for frame in frames}
    assert {Register, Fingerprint, Heartbeat, RankUpdate, Generate} <= kinds
    with going_on(processes):
        for identity in (b"another", b"another/heartbeat", b"\xff"):
            with stranger(port, None, identity=identity) as (peer, events):
                assert [next_event(events), next_event(events)] == [zmq.EVENT_CONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED]
                for frame in (*frames, *reversed(frames)):
                    peer.send(frame)
                peer.linger = STRANGER_MS
    recorder.close()


def frames_of(said: bytes) -> list[bytes]:
    """The messages in what a peer without encryption says: a greeting of 64 bytes, then frames of flags, size, body."""
    frames, at = [], 64
    while at < len(said):
        flags = said[at]
        width = 8 if flags & 2 else 1
        size = int.from_bytes(said[at + 1 : at + 1 + width], "big")
        at += 1 + width
        if not flags & 4:
            frames.append(said[at : at + size])
        at += size
    return frames


def send_raw(port: int, data: bytes) -> None:
    """Send bytes over a new connection, and read until the other side hangs up: it may do so at any time."""
    with socket.create_connection((LOOPBACK, port), timeout=30) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            continue


# -- HTTP -------------------------------------------------------------------------------------------------------------


@goes_on
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: head\r\nX-Slow: " + b"y" * 8000,
        b"POST /v1/completions HTTP/1.1\r\nHost: head\r\nContent-Length: 1000000\r\n\r\n" + b" " * 60_000,
    ],
    ids=["silent", "half a head", "half a body"],
)
def test_more_slow_clients_than_there_are_places_keep_nobody_out(head: NodeProcess, sent: bytes) -> None:
    before = resident_mb(head)
    port = int(head.url.rpartition(":")[2])
    assert Limits().max_connections < NUM_STRANGERS
    with connections(port, NUM_STRANGERS, sent) as strangers:
        assert len(completed_tokens(head, [1, 2, 3], 5)) == 5
        assert open_files(head) < NUM_STRANGERS
        assert resident_mb(head) - before < HTTP_MB
        assert is_closed(strangers[0])


# -- limits and keys --------------------------------------------------------------------------------------------------


def test_a_node_allows_itself_many_files(with_key: Processes) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for node in with_key.nodes:
        assert resource.prlimit(node.pid, resource.RLIMIT_NOFILE)[0] == min(hard, MAX_OPEN_FILES)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_node_does_not_start_with_a_key_that_others_can_read(
    processes: Processes, model: Path, tmp_path: Path, mode: int
) -> None:
    key = tmp_path / "cluster.key"
    key.write_text(bytes(32).hex())
    key.chmod(mode)
    node = processes.serve("head", model, {"TPDIST_KEY_FILE": str(key)})
    assert node.wait() == 2
    assert f"has mode {mode:04o}, so that others can read it" in node.log
    assert bytes(32).hex() not in node.log
