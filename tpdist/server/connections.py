"""The HTTP server's connections: how many may be open, and how long each may keep the others waiting.

    TLS handshake   until it is done                                                head_s
    idle            from its beginning, or its last answer, to a request's head     head_s
    receiving       from the head to the end of the body                            body_s
    answering       as long as it takes: a stream may run for hours
    in all of them  bytes that the client does not take, none of them               stall_s

Beyond max_connections a new connection takes the place of the one that has been without a whole request for longest;
when all are being answered it is refused with 503. So those who open connections and say nothing, or little, or slowly
keep nobody out. Knows nothing of what requests mean.
"""

import asyncio
import functools
import logging
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from tpdist.errors import SettingsError
from tpdist.server.errors import error_body

logger = logging.getLogger(__name__)

BACKLOG = 2048
ACCEPT_AGAIN_S = 0.1
COMPLAINT_S = 10.0
MAX_HEAD_BYTES = 16 * 1024
MANY_PIECES = 1024
MIN_MEAN_PIECE_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server's connections may do; see above."""

    max_connections: int = 2048
    head_s: float = 10.0
    body_s: float = 60.0
    stall_s: float = 300.0


class Connections:
    """Counts a server's connections, and makes room for new ones.

    Every one has a Slot until it ends. `_idle` holds, in the order in which they became so, those that have no whole
    request, with what ends each.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: set[Slot] = set()
        self._idle: dict[Slot, Callable[[], None]] = {}
        self._complained_at = -COMPLAINT_S

    def __len__(self) -> int:
        return len(self._open)

    def enter(self) -> "Slot | None":
        """A place for a new connection; None if there is none to be had."""
        if len(self._open) >= self.limits.max_connections:
            self._complain()
            if not self._idle:
                return None
            oldest = next(iter(self._idle))
            end = self._idle[oldest]
            oldest.leave()
            end()
        slot = Slot(self._open, self._idle)
        self._open.add(slot)
        return slot

    def _complain(self) -> None:
        if time.monotonic() >= self._complained_at + COMPLAINT_S:
            self._complained_at = time.monotonic()
            logger.warning("HTTP: all %d connections are taken; ending idle ones for new ones", len(self._open))


class Slot:
    """One connection's place."""

    def __init__(self, opened: "set[Slot]", idle: "dict[Slot, Callable[[], None]]") -> None:
        self._open = opened
        self._idle = idle

    def wait(self, end: Callable[[], None]) -> None:
        """No whole request is here: `end` may be called to make room for another connection."""
        self._idle.pop(self, None)
        if self in self._open:
            self._idle[self] = end

    def work(self) -> None:
        """A request is being answered: the connection stays."""
        self._idle.pop(self, None)

    def leave(self) -> None:
        """The connection has ended, or will now."""
        self._open.discard(self)
        self._idle.pop(self, None)


class Listener:
    """Accepts the connections of one socket, with what uvicorn's server asks of asyncio's: close and wait_closed.

    asyncio's own would accept without end, and counts nobody in a TLS handshake. Must be made in the event loop. Raises
    SettingsError when the port has been taken since.
    """

    def __init__(
        self,
        sock: socket.socket,
        protocol: "Callable[[Slot], GuardedProtocol]",
        *,
        connections: Connections,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._socket = sock
        self._protocol = protocol
        self._connections = connections
        self._tls = tls
        self._opening: set[asyncio.Task[None]] = set()
        try:
            sock.listen(BACKLOG)
        except OSError as error:
            # Bound sockets that do not listen yet may share a port: another has been quicker.
            address = ":".join(map(str, sock.getsockname()[:2]))
            raise SettingsError(f"cannot listen on {address}: {error.strerror}; set --host and --port") from error
        self._accepting = asyncio.create_task(self._accept(), name="http-accept")

    def close(self) -> None:
        for task in (self._accepting, *self._opening):
            task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._accepting, *self._opening, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                logger.warning("HTTP: cannot accept a connection: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            self._admit(connection)
            # Connections that wait to be accepted must not keep the loop from its other work.
            await asyncio.sleep(0)

    def _admit(self, connection: socket.socket) -> None:
        slot = self._connections.enter()
        if slot is None:
            _refuse(connection, tls=self._tls is not None)
            return
        task = asyncio.create_task(self._open(connection, slot))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        slot.wait(functools.partial(_cancel, task))

    async def _open(self, connection: socket.socket, slot: Slot) -> None:
        loop = asyncio.get_running_loop()
        timeout_s = None if self._tls is None else self._connections.limits.head_s
        protocol = self._protocol(slot)
        try:
            await loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self._tls, ssl_handshake_timeout=timeout_s
            )
        except OSError as error:
            logger.debug("HTTP: a connection did not come about: %s", error)
        finally:
            if protocol.transport is None:
                slot.leave()


def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()


def _refuse(connection: socket.socket, *, tls: bool) -> None:
    connection.setblocking(False)
    with connection:
        if not tls:
            connection.send(_answer(503, "Service Unavailable", "too many connections; come again"))


def _answer(status: int, phrase: str, message: str) -> bytes:
    """An answer to a client that is given up."""
    body = msgspec.json.encode(error_body(status, message))
    head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


class _StrictConnection(h11.Connection):
    """Refuses a long head, in however few packets it comes, and a body in very many, very small pieces: each costs
    this process more than its sender."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._num_pieces = 0
        self._num_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
            size = len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
            if size > MAX_HEAD_BYTES:
                raise h11.RemoteProtocolError(f"the head has {size} bytes, at most {MAX_HEAD_BYTES} are read")
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > MANY_PIECES and self._num_bytes < MIN_MEAN_PIECE_BYTES * self._num_pieces:
                raise h11.RemoteProtocolError("the body comes in too many small pieces")
        return event


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with the deadlines above."""

    def __init__(self, slot: Slot, *, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self.conn = _StrictConnection()
        self._slot = slot
        self._limits = limits
        self._stage: tuple[str, object] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    # -- what happens to the connection -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._slot.leave()
        for timer in (self._deadline, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._follow()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None and not self.transport.is_closing():
            self._stall.cancel()
            self._stall = None

    def send_400_response(self, msg: str) -> None:
        """An answer that has begun cannot be replaced by another."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
        else:
            super().send_400_response(msg)

    # -- deadlines ----------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Set the deadline of the stage that the connection is in now. Each request begins its stages anew."""
        if self.transport.is_closing():
            self._watch_writing()
            return
        stage = self._stage_now()
        if stage == self._stage:
            return
        self._stage = stage
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if stage[0] == "answering":
            self._slot.work()
            return
        self._slot.wait(self.transport.abort)
        if stage[0] == "idle":
            self._deadline = self.loop.call_later(self._limits.head_s, self._end_idle)
        else:
            self._deadline = self.loop.call_later(self._limits.body_s, self._end_receiving)

    def _stage_now(self) -> tuple[str, object]:
        """idle, receiving or answering, and the request that it belongs to."""
        if self.cycle is None or self.cycle.response_complete:
            return "idle", self.cycle
        return "receiving" if self.cycle.more_body else "answering", self.cycle

    def _end_idle(self) -> None:
        self.transport.close()
        self._watch_writing()

    def _end_receiving(self) -> None:
        if not self.cycle.response_started:
            message = f"the body did not come within {self._limits.body_s:g} s"
            self.transport.write(_answer(408, "Request Timeout", message))
        self._end_idle()

    def _watch_writing(self) -> None:
        """Look again in stall_s whether the client has taken any of what waits for it."""
        if self._stall is None and (unsent := self.transport.get_write_buffer_size()):
            self._stall = self.loop.call_later(self._limits.stall_s, self._check_writing, unsent)

    def _check_writing(self, before: int) -> None:
        self._stall = None
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        elif self.flow.write_paused or self.transport.is_closing():
            self._watch_writing()
