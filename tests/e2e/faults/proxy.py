"""A link that can be made slow, silent or half-open: a TCP proxy in this process, with one thread."""

import heapq
import selectors
import socket
import threading
import time
from types import TracebackType
from typing import Self

CHUNK_BYTES = 65536
IDLE_S = 0.05


class Proxy:
    """Listens on a port of loopback and passes on what comes to another. `delay_s` holds each piece back; `stalled`
    passes nothing on, and closes nothing either."""

    def __init__(self, target_port: int) -> None:
        self.delay_s = 0.0
        self.stalled = False
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[socket.socket, socket.socket] = {}
        self._held: list[tuple[float, int, socket.socket, bytes]] = []
        self._num_held = 0
        self._forgotten: list[socket.socket] = []
        self._hang_up = threading.Event()
        self._cut = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(5)
        for end in [*self._peers, *self._forgotten, self._listener]:
            end.close()
        self._selector.close()

    def hang_up_on_the_target(self) -> None:
        """The target sees its connections closed; those who connected here keep theirs, silent from now on."""
        self._hang_up.set()

    def cut(self) -> None:
        """Both sides see their connections closed, and may connect again."""
        self._cut.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(IDLE_S):
                self._read(key.fileobj)
            if self._hang_up.is_set():
                self._hang_up.clear()
                self._half_open()
            if self._cut.is_set():
                self._cut.clear()
                for end in list(self._peers):
                    self._close(end)
            self._pass_on()

    def _read(self, source: object) -> None:
        assert isinstance(source, socket.socket)
        if source is self._listener:
            self._accept()
            return
        if self.stalled:
            time.sleep(IDLE_S)  # what has come stays in the kernel, and is there when the link works again
            return
        try:
            data = source.recv(CHUNK_BYTES)
        except OSError:
            data = b""
        if not data:
            self._close(source)
            return
        self._num_held += 1
        heapq.heappush(self._held, (time.monotonic() + self.delay_s, self._num_held, source, data))

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            target = socket.create_connection(("127.0.0.1", self._target_port), timeout=1)
        except OSError:
            client.close()
            return
        for end, other in ((client, target), (target, client)):
            end.settimeout(1)
            self._peers[end] = other
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self) -> None:
        while self._held and self._held[0][0] <= time.monotonic() and not self.stalled:
            _, _, source, data = heapq.heappop(self._held)
            if (target := self._peers.get(source)) is not None:
                try:
                    target.sendall(data)
                except OSError:
                    self._close(source)

    def _close(self, end: socket.socket) -> None:
        for each in (end, self._peers.get(end)):
            if each is not None and each in self._peers:
                del self._peers[each]
                self._selector.unregister(each)
                each.close()

    def _half_open(self) -> None:
        for end in [each for each in self._peers if each.getpeername()[1] == self._target_port]:
            self._forgotten.append(self._peers[end])
            for each in (end, self._peers[end]):
                del self._peers[each]
                self._selector.unregister(each)
            end.close()
