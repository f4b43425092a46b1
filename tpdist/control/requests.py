"""Whose requests run, which of them have produced something, and which may be tried again in the next epoch.

The head owns a request until its first output is out: up to there a lost rank costs it nothing but time. Afterwards
its client has seen a part of an answer, which nobody may change, so it fails. Pure: no clock, no sockets.

    waiting   not at the engine: it came, or came back, while the cluster recovers
    running   at the engine; `started` once anything of it has been delivered
"""

from dataclasses import dataclass

from tpdist.control.messages import Generate, TokenOutput

MAX_RETRIES = 1


@dataclass
class _Entry:
    """`request` is dropped with the first output: it is not needed again. `since` is when it began to wait."""

    origin: bytes
    request: Generate | None
    retries: int = 0
    waiting: bool = False
    since: float = 0.0


class Requests:
    """Every request of the cluster by its id, with the identity of the socket that it came from."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self.num_waiting = 0
        self.num_retried = 0

    @property
    def num_running(self) -> int:
        """Requests at the engine."""
        return len(self._entries) - self.num_waiting

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def add(self, request: Generate, origin: bytes) -> None:
        """A request goes to the engine."""
        self._entries[request.request_id] = _Entry(origin, request)

    def add_waiting(self, request: Generate, origin: bytes, now: float) -> None:
        """A request came while there is no engine."""
        self._entries[request.request_id] = _Entry(origin, request, waiting=True, since=now)
        self.num_waiting += 1

    def origin_of(self, request_id: str) -> bytes | None:
        entry = self._entries.get(request_id)
        return None if entry is None else entry.origin

    def delivered(self, output: TokenOutput) -> None:
        """An output of a running request goes out. After the last there is no such request."""
        if output.finish_reason is not None:
            self.remove(output.request_id)
        else:
            self._entries[output.request_id].request = None

    def remove(self, request_id: str) -> bytes | None:
        """Forget a request; returns its origin."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return None
        self.num_waiting -= entry.waiting
        return entry.origin

    def of(self, origin: bytes) -> list[str]:
        """The ids of a node's requests."""
        return [request_id for request_id, entry in self._entries.items() if entry.origin == origin]

    def end_epoch(self, now: float) -> list[tuple[str, bytes]]:
        """The engine is gone: requests that have produced nothing wait for the next, unless they have been tried again
        before; the others are returned, (id, origin), and forgotten.

        One that brings the ranks down is tried twice, and so cannot spend the restart budget by itself.
        """
        lost = []
        for request_id, entry in list(self._entries.items()):
            if entry.waiting:
                continue
            if entry.request is None or entry.retries == MAX_RETRIES:
                lost.append((request_id, entry.origin))
                del self._entries[request_id]
                continue
            entry.retries += 1
            entry.waiting, entry.since = True, now
            self.num_waiting += 1
        return lost

    def resume(self) -> list[Generate]:
        """There is an engine again: everything that waits, in the order in which it came."""
        resumed = []
        for entry in self._entries.values():
            if entry.waiting:
                assert entry.request is not None, "a request that has produced something does not wait"
                entry.waiting = False
                self.num_retried += entry.retries > 0
                resumed.append(entry.request)
        self.num_waiting = 0
        return resumed

    def overdue(self, now: float, limit_s: float) -> list[tuple[str, bytes]]:
        """Requests that have waited for longer than `limit_s`, (id, origin); they are forgotten."""
        late = [
            (id, entry.origin) for id, entry in self._entries.items() if entry.waiting and now - entry.since > limit_s
        ]
        for request_id, _ in late:
            self.remove(request_id)
        return late

    def clear(self) -> list[tuple[str, bytes]]:
        """Forget all; returns them, (id, origin)."""
        everything = [(request_id, entry.origin) for request_id, entry in self._entries.items()]
        self._entries.clear()
        self.num_waiting = 0
        return everything
