"""ZeroMQ sockets that carry Envelopes: the only file that knows zmq.

A Router answers many peers, a Dealer talks to one; each has an asyncio form (agents) and a blocking form (ranks). All
of them cap frame sizes, drop what does not decode (counted, logged with its peer at most once a second), and use CURVE
in both directions when a cluster key is given. They know nothing of what the messages mean.
"""

import asyncio
import errno
import hashlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from tpdist.control.codec import Codec, MalformedFrameError, OtherClusterError, OtherVersionError
from tpdist.control.messages import MAX_MESSAGE_BYTES, Envelope, Message, Wait
from tpdist.errors import JoinError, LostError, SettingsError

__all__ = [
    "AsyncDealer",
    "AsyncRouter",
    "ClusterKeys",
    "Codec",
    "Dealer",
    "HeadLostError",
    "PeerGoneError",
    "Router",
    "close_blocking_sockets",
    "needs_ipv6",
    "tcp_address",
    "wait_any",
]

logger = logging.getLogger(__name__)

KEY_BYTES = 32
OTHERS_MODE = 0o077
LINGER_MS = 2000
NO_DESCRIPTOR = -1
HANDSHAKE_MS = 5_000
BACKLOG = 4096
MAX_AT_ONCE = 64
CLOSING_S = 0.05


# -- keys -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class ClusterKeys:
    """CURVE key pairs derived from the cluster's 32-byte seed. Whoever holds the seed can pose as any node."""

    head_public: bytes
    head_secret: bytes
    node_public: bytes
    node_secret: bytes

    @classmethod
    def from_seed(cls, seed: bytes) -> "ClusterKeys":
        secrets = [_derive(seed, person) for person in (b"tpdist-head", b"tpdist-node")]
        head, node = [(zmq.curve_public(secret), secret) for secret in secrets]
        return cls(*head, *node)

    @classmethod
    def read(cls, path: Path) -> "ClusterKeys":
        """Read a file made by `tpdist keygen`. Raises SettingsError when it does not hold a key, or others can read
        it."""
        try:
            seed = bytes.fromhex(path.read_text(encoding="ascii").strip())
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            raise SettingsError(f"cannot read the cluster key {path}: {error}") from error
        if len(seed) != KEY_BYTES:
            raise SettingsError(f"{path} holds {len(seed)} bytes, a cluster key has {KEY_BYTES}; run `tpdist keygen`")
        if mode & OTHERS_MODE:
            raise SettingsError(f"{path} has mode {mode & 0o7777:04o}, so that others can read it; chmod 600 it")
        return cls.from_seed(seed)


def _derive(seed: bytes, person: bytes) -> bytes:
    return z85.encode(hashlib.blake2b(seed, digest_size=KEY_BYTES, person=person).digest())


@dataclass(frozen=True)
class _OnlyNodes:
    """ZAP allow-list with one entry: the key that all nodes of the cluster share."""

    node_public: bytes

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self.node_public


class _Authenticator(Protocol):
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def configure_curve_callback(self, domain: str, credentials_provider: object) -> None: ...


def _start_authenticator(make: Callable[[Any], _Authenticator], context: Any, keys: ClusterKeys) -> _Authenticator:
    """Answer libzmq's ZAP questions for every CURVE server socket of `context`."""
    authenticator = make(context)
    authenticator.start()
    authenticator.configure_curve_callback(domain="*", credentials_provider=_OnlyNodes(keys.node_public))
    return authenticator


# -- sockets ----------------------------------------------------------------------------------------------------------


class _Complaints:
    """Counts dropped frames and logs them, at most one line a second."""

    def __init__(self, where: str) -> None:
        self.count = 0
        self._where = where
        self._next_line_at = 0.0

    def add(self, peer: str, error: Exception) -> None:
        self.count += 1
        if time.monotonic() >= self._next_line_at:
            self._next_line_at = time.monotonic() + 1
            logger.warning("%s: dropped a message from %s: %s (%d so far)", self._where, peer, error, self.count)


def _prepare(zmq_socket: Any) -> None:
    """Never block a sender; a peer that sends faster than we read is slowed down by TCP (zmq's receive limit).

    A connection whose other machine has gone without a word is closed by TCP's keepalive, after about a minute.
    """
    zmq_socket.linger = LINGER_MS
    zmq_socket.maxmsgsize = MAX_MESSAGE_BYTES
    zmq_socket.sndhwm = 0
    zmq_socket.tcp_keepalive = 1
    zmq_socket.tcp_keepalive_idle = 30
    zmq_socket.tcp_keepalive_intvl = 10
    zmq_socket.tcp_keepalive_cnt = 3


def _prepare_server(zmq_socket: Any, keys: ClusterKeys | None) -> None:
    """A peer that comes again, under its own name, takes over from its broken connection. One that does not say who
    it is in time is closed, and many that come at once wait their turn."""
    _prepare(zmq_socket)
    zmq_socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    zmq_socket.handshake_ivl = HANDSHAKE_MS
    zmq_socket.backlog = BACKLOG
    if keys is not None:
        zmq_socket.curve_server = True
        zmq_socket.curve_secretkey = keys.head_secret
        zmq_socket.curve_publickey = keys.head_public


def _connect(
    zmq_socket: Any, address: str, *, identity: bytes, keys: ClusterKeys | None, ipv6: bool | None = None
) -> None:
    """Raises SettingsError for what is no address; whether anybody listens there shows later."""
    _prepare(zmq_socket)
    zmq_socket.setsockopt(zmq.IDENTITY, identity)
    zmq_socket.ipv6 = needs_ipv6(address) if ipv6 is None else ipv6
    zmq_socket.reconnect_ivl = 100
    zmq_socket.reconnect_ivl_max = 1000
    if keys is not None:
        zmq_socket.curve_serverkey = keys.head_public
        zmq_socket.curve_secretkey = keys.node_secret
        zmq_socket.curve_publickey = keys.node_public
    try:
        zmq_socket.connect(address)
    except zmq.ZMQError as error:
        raise SettingsError(f"cannot connect to {address}: {error}") from error


def needs_ipv6(address: str) -> bool:
    """Whether to connect over IPv6: for its addresses, and for names that have no other. Waits for the resolver.

    With IPv6 on, zmq resolves a name to an IPv6 address alone: "localhost" to ::1, where a head without a key does not
    listen. (libzmq, ip_resolver.cpp.)
    """
    if not address.startswith("tcp://") or "[" in address:
        return address.startswith("tcp://[")
    host = address.removeprefix("tcp://").rpartition(":")[0]
    return not _resolves(host, socket.AF_INET) and _resolves(host, socket.AF_INET6)


def _resolves(host: str, family: socket.AddressFamily) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None, family))
    except OSError:
        return False


def tcp_address(host: str, port: int | str) -> str:
    """A ZeroMQ address; IPv6 hosts get their brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _bind(zmq_socket: Any, address: str) -> str:
    """Listen; "*" means all interfaces over IPv4 and IPv6."""
    zmq_socket.ipv6 = address.startswith(("tcp://*", "tcp://["))
    try:
        zmq_socket.bind(address)
    except zmq.ZMQError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(f"{address} is taken by another process; choose another port") from error
        raise SettingsError(f"cannot listen on {address}: {error}") from error
    return str(zmq_socket.getsockopt_string(zmq.LAST_ENDPOINT))


def _only(frames: list[bytes]) -> bytes:
    """The frame of a message that has one."""
    if len(frames) != 1:
        raise MalformedFrameError(f"{len(frames)} frames instead of 1")
    return frames[0]


class PeerGoneError(LostError):
    """A message could not be sent because its receiver has gone. Seldom the first cause: the receiver has that."""


class HeadLostError(LostError):
    """The head is gone, or does not know this node any more. The node may register again."""


def _descriptor(frame: Any) -> int:
    """Of the connection that a frame came over; NO_DESCRIPTOR for peers of old protocols, of which none is told."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return NO_DESCRIPTOR


def _socket_at(descriptor: int) -> int:
    """The number that the kernel gave the socket behind a descriptor, which no later one has; NO_DESCRIPTOR if there
    is none."""
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return NO_DESCRIPTOR


class _Hangups:
    """The closed connections of a socket, by their descriptors. Nobody asked, nothing is watched: the events of a
    socket that are not read would block it in the end."""

    def __init__(self, watched: Any) -> None:
        self._watched = watched
        self._events: Any = None

    async def next(self) -> int:
        if self._events is None:
            self._events = self._watched.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        return int(parse_monitor_message(await self._events.recv_multipart())["value"])

    def close(self) -> None:
        if self._events is not None:
            self._watched.disable_monitor()
            self._events.close(0)


class _Arrivals:
    """Messages of a socket that is read when its descriptor says so, as many as there are.

    zmq.asyncio wraps every message in futures and asks for the socket's events after each, which is most of what a
    heartbeat costs a head of a thousand nodes. The descriptor tells of changes only, and every use of the socket may
    swallow one: after sending, `read` is due.
    """

    def __init__(self, zmq_socket: Any) -> None:
        self._socket = zmq_socket
        self._frames: deque[list[Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._watching: asyncio.AbstractEventLoop | None = None

    async def next(self) -> list[Any]:
        """The frames of the next message. Where there are always more, others have a turn between them."""
        while not self._frames:
            self.read()
            await (asyncio.sleep(0) if self._frames else self._wait())
        return self._frames.popleft()

    def read(self) -> None:
        """Take what has arrived, for whoever waits or will ask. Where nobody does, it stays in the socket."""
        try:
            while len(self._frames) < MAX_AT_ONCE:
                self._frames.append(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
            self.close()
        except zmq.Again:
            pass
        if self._frames and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Watch the descriptor no more, until somebody waits again."""
        if self._watching is not None and not self._watching.is_closed():
            self._watching.remove_reader(self._socket.getsockopt(zmq.FD))
        self._watching = None

    async def _wait(self) -> None:
        if self._watching is None:
            self._watching = asyncio.get_running_loop()
            self._watching.add_reader(self._socket.getsockopt(zmq.FD), self.read)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class AsyncRouter:
    """The head's control socket, and an agent's socket for its ranks. Peers are told apart by their identity."""

    def __init__(self, *, name: str, codec: Codec, keys: ClusterKeys | None = None) -> None:
        self._context = zmq.asyncio.Context()
        self._authenticator = _start_authenticator(AsyncioAuthenticator, self._context, keys) if keys else None
        self._socket = zmq.Socket(self._context, zmq.ROUTER)
        _prepare_server(self._socket, keys)
        self._arrivals = _Arrivals(self._socket)
        self._hangups = _Hangups(self._socket)
        self._connections: dict[int, tuple[bytes, int]] = {}
        self._superseded: deque[bytes] = deque()
        self._complaints = _Complaints(name)
        self.codec = codec

    @property
    def num_dropped(self) -> int:
        """Frames that were no message, since the start."""
        return self._complaints.count

    def bind(self, address: str) -> str:
        """Listen; returns the address with the port that was chosen. Raises SettingsError when it is taken."""
        return _bind(self._socket, address)

    async def receive(self) -> tuple[bytes, Envelope]:
        """The next well-formed message and its peer's identity; everything else is counted and dropped.

        A peer of another release or another cluster gets an answer, which tells it so: its own receive() raises.
        """
        while True:
            first, *parts = await self._arrivals.next()
            identity, frames = first.bytes, [part.bytes for part in parts]
            self._note_connection(identity, _descriptor(first))
            try:
                return identity, self.codec.decode(_only(frames))
            except (OtherVersionError, OtherClusterError) as error:
                self._complaints.add(identity.hex(), error)
                await self.send(identity, Wait(reason=str(error)))
            except MalformedFrameError as error:
                self._complaints.add(identity.hex(), error)

    async def next_hangup(self) -> bytes:
        """The identity of the next peer whose connection has closed; one that has sent nothing has none. What it sent
        before may still come, and it may connect again.

        A descriptor is used again at once, and the event of the connection before may be read after the first message
        of the next: only what is not open any more has closed, and who had the descriptor of another."""
        while True:
            if self._superseded:
                return self._superseded.popleft()
            descriptor = await self._hangups.next()
            if descriptor not in self._connections:
                continue
            if self._is_open(descriptor):
                # Of the connection before; or it has not been closed yet, which zmq does just after the event.
                await asyncio.sleep(CLOSING_S)
            if not self._is_open(descriptor):
                return self._connections.pop(descriptor)[0]

    def _is_open(self, descriptor: int) -> bool:
        known = self._connections.get(descriptor)
        return known is not None and _socket_at(descriptor) == known[1]

    def _note_connection(self, identity: bytes, descriptor: int) -> None:
        known = self._connections.get(descriptor)
        if known is None or known[0] != identity:
            if known is not None:
                self._superseded.append(known[0])
            self._connections[descriptor] = identity, _socket_at(descriptor)

    async def send(self, identity: bytes, body: Message) -> None:
        """Queue a message for a peer; nothing happens if the peer is not connected."""
        await self.send_all((identity,), body)

    async def send_all(self, identities: Iterable[bytes], body: Message) -> None:
        """Queue one message for several peers, encoded once."""
        self.send_frame(identities, self.frame_of(body))

    def frame_of(self, body: Message) -> zmq.Frame:
        """A message that is going to be sent several times, encoded."""
        return zmq.Frame(self.codec.encode(body), copy=True)

    def send_frame(self, identities: Iterable[bytes], frame: zmq.Frame) -> None:
        """Queue a message for several peers, which share its memory. A router never blocks."""
        for identity in identities:
            self._socket.send_multipart([identity, frame], zmq.NOBLOCK, copy=False)
        self._arrivals.read()

    def close(self) -> None:
        self._arrivals.close()
        self._hangups.close()
        _close(self._socket, self._context, self._authenticator)


class AsyncDealer:
    """A node's connection to its head. It connects, and connects again, by itself."""

    def __init__(
        self,
        *,
        address: str,
        identity: bytes,
        codec: Codec,
        keys: ClusterKeys | None = None,
        ipv6: bool | None = None,
    ) -> None:
        """`ipv6`: what needs_ipv6 says of the address; asked here if it is not known."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._hangups = _Hangups(self._socket)
        self._complaints = _Complaints("node")
        self.address = address
        self.codec = codec
        _connect(self._socket, address, identity=identity, keys=keys, ipv6=ipv6)

    async def hangup(self) -> None:
        """Return when the connection has closed next. It connects again by itself."""
        await self._hangups.next()

    async def receive(self) -> Envelope:
        """The next well-formed message. Raises JoinError when the head speaks another protocol version,
        HeadLostError when it serves another cluster than the one that this node has joined."""
        while True:
            frames = await self._socket.recv_multipart()
            try:
                return self.codec.decode(_only(frames))
            except OtherVersionError as error:
                raise JoinError(f"{self.address}: {error}; install the same tpdist release on all nodes") from error
            except OtherClusterError as error:
                raise HeadLostError(f"{self.address}: {error}; the head was started again") from error
            except MalformedFrameError as error:
                self._complaints.add(self.address, error)

    async def send(self, body: Message) -> None:
        """Queue a message; it leaves once the head can be reached."""
        await self._socket.send(self.codec.encode(body))

    def close(self, *, linger: bool = True) -> None:
        """Give what is queued LINGER_MS to leave, or drop it."""
        self._hangups.close()
        if not linger:
            self._socket.linger = 0
        _close(self._socket, self._context, None)


class Router:
    """Blocking: rank 0's socket for step plans, one ordered stream to each other rank, and for what they answer.

    Listens on a port of `host` for ranks on other nodes, and on `ipc_address` for those on its own.
    """

    def __init__(self, *, host: str, ipc_address: str, codec: Codec, keys: ClusterKeys | None) -> None:
        self._context: Any = zmq.Context()
        self._authenticator = _start_authenticator(ThreadAuthenticator, self._context, keys) if keys else None
        self._socket = self._context.socket(zmq.ROUTER)
        _prepare_server(self._socket, keys)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._complaints = _Complaints("step plans")
        self._codec = codec
        _bind(self._socket, ipc_address)
        self.port = int(_bind(self._socket, tcp_address(host, "*")).rsplit(":", 1)[1])

    def wait_for(self, identities: set[bytes], *, timeout_s: float) -> None:
        """Block until each of `identities` has sent its first message of this cluster and epoch. Raises JoinError
        naming those missing."""
        missing = set(identities)
        deadline = time.monotonic() + timeout_s
        while missing:
            if not self._socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                names = ", ".join(sorted(identity.decode() for identity in missing))
                raise JoinError(f"{names} did not connect to rank 0's port {self.port} within {timeout_s:g} s")
            missing.discard(self._greeting())

    def send(self, identities: list[bytes], body: Message) -> None:
        """Send one message to several peers, encoded once. Raises PeerGoneError when one is not connected."""
        frame = self._codec.encode(body)
        for identity in identities:
            try:
                self._socket.send_multipart([identity, frame], zmq.DONTWAIT)
            except zmq.ZMQError as error:
                raise PeerGoneError(f"{identity.decode()} is not connected to rank 0 any more: {error}") from error

    def receive(self) -> Envelope | None:
        """The next message of a peer if one has arrived; what is none of ours is counted and dropped."""
        while True:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            if (envelope := self._decode(identity, frames)) is not None:
                return envelope

    def _greeting(self) -> bytes | None:
        """Who sent the message that has arrived, if it is one of ours."""
        identity, *frames = self._socket.recv_multipart()
        return None if self._decode(identity, frames) is None else bytes(identity)

    def _decode(self, identity: bytes, frames: list[bytes]) -> Envelope | None:
        try:
            envelope = self._codec.decode(_only(frames))
            if envelope.epoch != self._codec.epoch:
                raise MalformedFrameError(f"a message of epoch {envelope.epoch} in epoch {self._codec.epoch}")
        except (OtherVersionError, OtherClusterError, MalformedFrameError) as error:
            self._complaints.add(identity.hex(), error)
            return None
        return envelope

    def close(self) -> None:
        _close(self._socket, self._context, self._authenticator)


class Dealer:
    """Blocking: a rank's connection to its agent, to the head's engine socket, or to rank 0's step plans."""

    def __init__(self, *, address: str, identity: bytes, codec: Codec, keys: ClusterKeys | None = None) -> None:
        self._socket: Any = zmq.Context.instance().socket(zmq.DEALER)
        self.codec = codec
        _connect(self._socket, address, identity=identity, keys=keys)

    def send(self, body: Message) -> None:
        """Queue a message; it leaves once the peer can be reached."""
        self._socket.send(self.codec.encode(body))

    def receive(self) -> Envelope | None:
        """The next message if one has arrived. A frame that is none of ours is an error here: the peer is our own."""
        try:
            frames = self._socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        return self.codec.decode(_only(frames))


def wait_any(links: Sequence[Dealer | Router], *, timeout_s: float | None) -> bool:
    """Block until one of `links` has a message; False after `timeout_s`."""
    poller = zmq.Poller()
    for link in links:
        poller.register(link._socket, zmq.POLLIN)
    return bool(poller.poll(None if timeout_s is None else int(timeout_s * 1000)))


def close_blocking_sockets() -> None:
    """Close every Dealer of this process; what is queued still leaves within LINGER_MS."""
    zmq.Context.instance().destroy(LINGER_MS)


def _close(zmq_socket: Any, context: Any, authenticator: _Authenticator | None) -> None:
    """Block until what is queued has left, LINGER_MS at most; then the context goes."""
    if authenticator is not None:
        authenticator.stop()
    zmq_socket.close()
    context.term()
