"""Reading the blocks of an offloaded model before they are needed: while one computes, a thread reads the next ones.

Which block follows which is first taken from the order of the model, then from what the last forward pass did; the last
block is followed by the first one, of the next pass. Knows neither modules nor files.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

Tensors = dict[str, Tensor]


class Prefetcher:
    """The current block and up to `ahead` that follow it. Threads that take blocks take turns.

    `read` runs in the thread too, and must not hold the Prefetcher: so the thread ends when the last one that holds it
    lets go. An error while reading ahead reaches the caller that takes that block, and no other.

    Owned by this object: `_current`, the block whose tensors were taken last, and `_ahead`, at most `ahead` blocks that
    are being read or wait to be taken. A block that was not expected is read at once, and what was read in vain goes.
    A forked process has no thread, and starts its own with nothing read ahead.
    """

    def __init__(self, blocks: Sequence[str], read: Callable[[str], Tensors], *, ahead: int) -> None:
        self._read = read
        self._num_ahead = min(ahead, len(blocks) - 1)
        self._next = dict(zip(blocks, [*blocks[1:], *blocks[:1]], strict=True))
        self._current: tuple[str, Tensors] | None = None
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._ahead: dict[str, Future[Tensors]] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tpdist-prefetch") if self._num_ahead > 0 else None

    def take(self, block: str) -> Tensors:
        """The tensors of a block by name; the caller must not change the dict. Raises what `read` raised."""
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            return self._take(block)

    def _take(self, block: str) -> Tensors:
        if self._current is not None and self._current[0] == block:
            return self._current[1]
        if self._current is not None:
            self._next[self._current[0]] = block
        future = self._ahead.pop(block, None)
        # What comes next is asked for before the wait, so that the thread has no break; after a miss it would delay us.
        if future is not None:
            self._current = None
            self._read_ahead(block)
            tensors = future.result()
        else:
            self._drop()
            tensors = self._read(block)
            self._read_ahead(block)
        self._current = (block, tensors)
        return tensors

    def settle(self) -> None:
        """Wait until nothing is being read ahead. Errors wait for who takes their block."""
        if self._pid == os.getpid():
            wait(list(self._ahead.values()))

    def _read_ahead(self, block: str) -> None:
        wanted: list[str] = []
        following = block
        for _ in range(self._num_ahead):
            following = self._next[following]
            if following != block:
                wanted.append(following)
        for unwanted in self._ahead.keys() - set(wanted):
            self._ahead.pop(unwanted).cancel()
        for name in wanted:
            if self._executor is not None and name not in self._ahead:
                self._ahead[name] = self._executor.submit(self._read, name)

    def _drop(self) -> None:
        """Forget what is read ahead, and the current block: their memory can be used for another."""
        self._current = None
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
