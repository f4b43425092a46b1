"""Where the ranks of one node note how far they are, and where their agent reads it: a small file in shared memory.

A rank's main thread writes; a write is a store into a mapping, with no system call, so it can be made before and
after every collective. A thread that hangs stops writing, and what it wrote last stays there to be read, even when
its process has been stopped. Each rank has a cache line:

    step        the last step that it has begun
    in_step     whether it is still in that
    entered     waits for other ranks (collectives, receives between stages) that it has entered
    left        those that it has left again
    wait        which kind the last one was, as an index into WAITS
    idle        whether it waits for something to do: no advance, however often it looks
"""

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tpdist.control.messages import RankProgress

WAITS = ("none", "all_reduce", "gather", "broadcast", "receive", "send")
LINE_BYTES = 64
WORDS = LINE_BYTES // 8
STEP, IN_STEP, ENTERED, LEFT, WAIT, IDLE = range(6)


class Watch:
    """A rank's own line. Without a file nothing is noted."""

    def __init__(self, file: Path | None = None, *, local_rank: int = 0) -> None:
        """Raises OSError when the agent's file cannot be opened."""
        line = memoryview(bytearray(LINE_BYTES)) if file is None else _map(file)[local_rank * LINE_BYTES :][:LINE_BYTES]
        self._words = line.cast("Q")

    def begin_step(self, step: int) -> None:
        self._words[STEP] = step
        self._words[IN_STEP] = 1

    def end_step(self) -> None:
        self._words[IN_STEP] = 0

    def idle(self, is_idle: bool) -> None:
        """Before and after a wait for something to do."""
        self._words[IDLE] = is_idle

    def enter(self, wait: int) -> None:
        """Before a wait for other ranks; `wait` is an index into WAITS."""
        words = self._words
        words[WAIT] = wait
        words[ENTERED] += 1

    def leave(self) -> None:
        """The last wait is over. One that failed is never left."""
        words = self._words
        words[LEFT] = words[ENTERED]


class ProgressFile:
    """The agent's side: made before the ranks start, and read with every heartbeat."""

    def __init__(self, file: Path, *, first_rank: int, num_ranks: int) -> None:
        """Raises OSError when the file system has no room for it."""
        self._first_rank = first_rank
        self._num_ranks = num_ranks
        file.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, num_ranks * LINE_BYTES)
        finally:
            os.close(descriptor)
        self._words = _map(file).cast("Q")

    def read(self, pids: Sequence[int]) -> tuple[RankProgress, ...]:
        """The progress of every rank; `pids` are those of their processes, in the order of ranks."""
        return tuple(self._read(index, pid) for index, pid in enumerate(pids[: self._num_ranks]))

    def _read(self, index: int, pid: int) -> RankProgress:
        line = self._words[index * WORDS : (index + 1) * WORDS]
        left, entered = line[LEFT], line[ENTERED]
        return RankProgress(
            rank=self._first_rank + index,
            step=line[STEP],
            num_waits=entered,
            wait=WAITS[line[WAIT]],
            waiting=entered > left or bool(line[IDLE]),
            process=process_state(pid),
            in_step=bool(line[IN_STEP]),
        )


def process_state(pid: int) -> str:
    """The letter that /proc shows: R, S, D, T (stopped by a signal), t (by a debugger), Z; empty if there is none."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _map(file: Path) -> memoryview:
    with file.open("r+b") as opened:
        return memoryview(mmap.mmap(opened.fileno(), 0))
