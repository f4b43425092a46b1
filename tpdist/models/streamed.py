"""Layers whose weights stay in the checkpoint, and are read when they are needed.

Two layers hold weights at a time: while one computes, a thread reads the next one's into the other, from the files of
the checkpoint as they are. After the last the first is next, for the step that follows. This module knows neither where
weights are read from, nor what a layer computes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Layer = TypeVar("Layer")

NUM_BUFFERS = 2


class StreamedLayers(Generic[Layer]):
    """`read(layer, number)` fills a layer with the weights of that number, and may raise. Layers are best asked for in
    the order of `numbers`, over and over; other orders wait for what they read."""

    def __init__(self, numbers: Sequence[int], *, buffers: Sequence[Layer], read: Callable[[Layer, int], None]) -> None:
        assert len(buffers) == NUM_BUFFERS, f"{len(buffers)} buffers"
        self._next = dict(zip(numbers, (*numbers[1:], numbers[0]), strict=True))
        self.buffers = buffers
        self._read = read
        self._held: list[int | None] = [None] * NUM_BUFFERS
        self._reading: tuple[int, int, Future[None]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-layer")

    def layer(self, number: int) -> Layer:
        """The layer with the weights of `number`, until the next call. Raises what reading raises."""
        self._finish_reading()
        if number not in self._held:
            self._start_reading(number, at=0)
            self._finish_reading()
        at = self._held.index(number)
        following = self._next[number]
        if following not in self._held:
            self._start_reading(following, at=NUM_BUFFERS - 1 - at)
        return self.buffers[at]

    def close(self) -> None:
        """Stop reading; nothing may be asked for afterwards."""
        self._reader.shutdown(cancel_futures=True)

    def _start_reading(self, number: int, *, at: int) -> None:
        self._held[at] = None
        self._reading = number, at, self._reader.submit(self._read, self.buffers[at], number)

    def _finish_reading(self) -> None:
        """A buffer whose reading failed holds nothing."""
        if self._reading is not None:
            (number, at, future), self._reading = self._reading, None
            future.result()
            self._held[at] = number
