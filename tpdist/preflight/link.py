"""The way from this node to another over plain TCP: whether it is open, how long it takes, how much it carries.

A node listens on a port that the kernel picks, and answers those who bring the token of this examination: everybody
else is hung up on. Sizes are fixed here and not taken from the peer. Every wait has a deadline.
"""

import asyncio
import contextlib
import hmac
import logging
import socket
import statistics
import struct
import time

from tpdist.preflight.words import LinkFigures

logger = logging.getLogger(__name__)

TOKEN_BYTES = 16
CONNECT_S = 5.0
IO_S = 10.0
NUM_PINGS = 200
PING_S = 1.0
STREAM_S = 0.5
MOST_BYTES = 1024**3
CHUNK_BYTES = 256 * 1024
PING, STREAM = b"p", b"s"
CLOCK = struct.Struct("!q")
RECEIVED = struct.Struct("!qq")


class LinkError(Exception):
    """The peer cannot be reached or stopped answering: the message says how that showed."""


# -- the side that listens --------------------------------------------------------------------------------------------


async def answer_peers(listener: socket.socket, token: bytes) -> None:
    """Answer whoever brings the token, until cancelled. A thread for each peer gives exact times; deadlines end it."""
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as answering:
        while True:
            connection, _ = await loop.sock_accept(listener)
            answering.create_task(asyncio.to_thread(answer, connection, token))


def answer(connection: socket.socket, token: bytes) -> None:
    """Serve one measurement. A peer that goes away is for the peer to report."""
    try:
        with connection:
            _prepare(connection)
            if not hmac.compare_digest(_receive(connection, TOKEN_BYTES), token):
                return
            if _receive(connection, 1) == PING:
                _echo(connection)
            else:
                _drain(connection)
    except (OSError, LinkError) as error:
        logger.debug("a peer's measurement broke off: %s", error)


def _echo(connection: socket.socket) -> None:
    """Answer each ping with this machine's clock."""
    while connection.recv(1):
        connection.sendall(CLOCK.pack(time.time_ns()))


def _drain(connection: socket.socket) -> None:
    """Take what comes until the peer has no more, and say how much that was and how long it took."""
    buffer, total = bytearray(CHUNK_BYTES), connection.recv_into(bytearray(1))
    started = time.perf_counter_ns()
    while (count := connection.recv_into(buffer)) and time.perf_counter_ns() - started < IO_S * 1e9:
        total += count
    connection.sendall(RECEIVED.pack(total, time.perf_counter_ns() - started))


# -- the side that asks -----------------------------------------------------------------------------------------------


def try_connection(host: str, port: int, *, timeout_s: float = CONNECT_S) -> str:
    """Why no TCP connection to host:port comes about; empty if one does."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return _why(error, timeout_s)
    return ""


async def watch_way(host: str, port: int, *, every_s: float, until: asyncio.Event) -> str:
    """Try connections until one comes about: empty then. If none has when `until` is set, why the last one did not."""
    while problem := await asyncio.to_thread(try_connection, host, port):
        if until.is_set():
            break
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every_s):
                await until.wait()
    return problem


def measure(host: str, port: int, token: bytes) -> LinkFigures:
    """Latency and bandwidth to a listening peer, and how far its clock is ahead. Raises LinkError."""
    try:
        with _connect(host, port, token, PING) as connection:
            trips, skew_s = _ping(connection)
        with _connect(host, port, token, STREAM) as connection:
            bandwidth = _stream(connection)
    except OSError as error:
        raise LinkError(f"the connection broke: {_why(error, IO_S)}") from error
    return LinkFigures(latency_s=statistics.median(trips) / 2, bandwidth=bandwidth, skew_s=skew_s)


def _connect(host: str, port: int, token: bytes, mode: bytes) -> socket.socket:
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_S)
    except OSError as error:
        raise LinkError(_why(error, CONNECT_S)) from error
    _prepare(connection)
    connection.sendall(token + mode)
    return connection


def _ping(connection: socket.socket) -> tuple[list[float], float]:
    """Round trips in seconds, and the clock's skew as the fastest of them shows it: the peer's time against the middle
    of the trip."""
    trips: list[float] = []
    skews: list[float] = []
    ends = time.perf_counter() + PING_S
    while len(trips) < NUM_PINGS and (not trips or time.perf_counter() < ends):
        sent_at, started = time.time_ns(), time.perf_counter()
        connection.sendall(PING)
        (theirs,) = CLOCK.unpack(_receive(connection, CLOCK.size))
        trips.append(time.perf_counter() - started)
        skews.append((theirs - sent_at) / 1e9 - trips[-1] / 2)
    return trips, skews[trips.index(min(trips))]


def _stream(connection: socket.socket) -> float:
    """Bytes per second as the peer received them."""
    chunk, sent = bytes(CHUNK_BYTES), 0
    ends = time.perf_counter() + STREAM_S
    while sent < MOST_BYTES and time.perf_counter() < ends:
        connection.sendall(chunk)
        sent += CHUNK_BYTES
    connection.shutdown(socket.SHUT_WR)
    # What still lies in buffers has to get through first, for as long as the peer takes it.
    connection.settimeout(2 * IO_S)
    total, nanoseconds = RECEIVED.unpack(_receive(connection, RECEIVED.size))
    return float(total / max(nanoseconds, 1) * 1e9)


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(IO_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        part = connection.recv(num_bytes - len(received))
        if not part:
            raise LinkError("the peer hung up")
        received += part
    return received


def _why(error: OSError, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s, so that something on the way drops the packets"
    if isinstance(error, ConnectionRefusedError):
        return "refused: nothing listens there, or a firewall rejects it"
    return error.strerror or str(error)
