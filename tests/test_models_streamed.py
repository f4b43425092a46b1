"""Layers that are read when they are needed: the order, the reading ahead, two buffers, and a reader that fails.

Readers are gates that the test opens: nothing here waits for time to pass.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from tpdist.models.streamed import NUM_BUFFERS, StreamedLayers

WAIT_S = 10.0


@dataclass
class Buffer:
    """A layer whose weights are a number; `uses` are the numbers that it has held."""

    uses: list[int] = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.uses[-1]


class Files:
    """What layers are read from: `begun` are the numbers asked for, in order. A number in `shut` waits for its gate,
    one in `broken` fails once."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.broken: set[int] = set()
        self.shut: dict[int, threading.Event] = {}
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def read(self, buffer: Buffer, number: int) -> None:
        with self._changed:
            self.begun.append(number)
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()
        if number in self.shut:
            assert self.shut[number].wait(WAIT_S), f"nobody opened {number}"
        if number in self.broken:
            self.broken.discard(number)
            raise OSError(f"cannot read {number}")
        buffer.uses.append(number)

    def wait_begun(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, WAIT_S), f"only {self.begun} were begun"


@dataclass
class Made:
    files: Files
    layers: StreamedLayers[Buffer]

    def held(self, number: int) -> int:
        """What the layer of `number` holds when it is given out."""
        return self.layers.layer(number).number


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


def made(stack: ExitStack, *numbers: int) -> Made:
    files = Files()
    layers = StreamedLayers(numbers, buffers=[Buffer() for _ in range(NUM_BUFFERS)], read=files.read)
    stack.callback(layers.close)
    return Made(files, layers)


@pytest.mark.parametrize("numbers", [(0,), (5,), (0, 1), (3, 7), (0, 1, 2), (2, 3, 5, 8), tuple(range(7))])
def test_each_layer_holds_its_own_weights_in_every_step(stack: ExitStack, numbers: tuple[int, ...]) -> None:
    it = made(stack, *numbers)
    for _ in range(4):
        assert [it.held(number) for number in numbers] == list(numbers)


@pytest.mark.parametrize("numbers", [(4,), (4, 9)])
def test_layers_that_fit_the_buffers_are_read_once(stack: ExitStack, numbers: tuple[int, ...]) -> None:
    it = made(stack, *numbers)
    for _ in range(5):
        for number in numbers:
            it.held(number)
    assert sorted(it.files.begun) == list(numbers)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_more_layers_are_read_in_their_order_over_and_over(stack: ExitStack, count: int) -> None:
    it = made(stack, *range(count))
    for _ in range(3):
        for number in range(count):
            it.held(number)
    it.files.wait_begun(3 * count + 1)
    assert it.files.begun == [*range(count), *range(count), *range(count), 0]


def test_the_next_layer_is_read_before_it_is_asked_for(stack: ExitStack) -> None:
    it = made(stack, 0, 1, 2)
    for step_number in range(1, 7):
        it.held((step_number - 1) % 3)
        it.files.wait_begun(step_number + 1)
        assert it.files.begun[-1] == step_number % 3


def test_a_layer_is_given_out_while_the_next_one_is_still_read(stack: ExitStack) -> None:
    it = made(stack, 0, 1, 2)
    it.files.shut[1] = threading.Event()
    assert it.held(0) == 0
    it.files.wait_begun(2)
    asked = threading.Event()
    got: list[int] = []

    def ask() -> None:
        asked.set()
        got.append(it.held(1))

    asking = threading.Thread(target=ask)
    asking.start()
    assert asked.wait(WAIT_S)
    assert not got, "a layer was given out before it was read"
    it.files.shut[1].set()
    asking.join(WAIT_S)
    assert got == [1]
    assert it.files.begun.count(1) == 1


def test_reading_ahead_never_touches_the_layer_in_use(stack: ExitStack) -> None:
    it = made(stack, *range(5))
    count = 0
    for _ in range(3):
        for number in range(5):
            layer = it.layers.layer(number)
            count += 1
            it.files.wait_begun(count + 1)
            assert layer.number == number


def test_two_buffers_take_turns(stack: ExitStack) -> None:
    it = made(stack, *range(4))
    used = [it.layers.layer(number % 4) for number in range(8)]
    assert {id(buffer) for buffer in used} == {id(buffer) for buffer in it.layers.buffers}
    assert [used[0], used[1]] * 4 == used
    assert used[0] is not used[1]


def test_other_numbers_of_buffers_are_a_mistake_of_ours() -> None:
    for count in (1, 3):
        with pytest.raises(AssertionError, match=f"{count} buffers"):
            StreamedLayers((0, 1, 2), buffers=[Buffer()] * count, read=Files().read)


def test_one_thread_reads(stack: ExitStack) -> None:
    it = made(stack, *range(4))
    for number in (*range(4), *range(4)):
        it.held(number)
    assert len(it.files.threads) == 1
    assert threading.current_thread().name not in it.files.threads


@pytest.mark.parametrize("numbers", [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)])
def test_a_first_read_that_fails_reaches_the_caller_and_the_next_try_reads_again(
    stack: ExitStack, numbers: tuple[int, ...]
) -> None:
    it = made(stack, *numbers)
    it.files.broken = {0}
    with pytest.raises(OSError, match="cannot read 0"):
        it.held(0)
    for _ in range(2):
        assert [it.held(number) for number in numbers] == list(numbers)


@pytest.mark.parametrize("numbers", [(0, 1), (0, 1, 2), (0, 1, 2, 3)])
def test_a_read_ahead_that_fails_reaches_who_asks_next_and_the_next_try_reads_again(
    stack: ExitStack, numbers: tuple[int, ...]
) -> None:
    it = made(stack, *numbers)
    it.files.broken = {1}
    assert it.held(0) == 0
    with pytest.raises(OSError, match="cannot read 1"):
        it.held(1)
    assert [it.held(number) for number in numbers[1:]] == list(numbers[1:])
    assert [it.held(number) for number in numbers] == list(numbers)


def test_a_layer_that_failed_half_way_is_never_given_out(stack: ExitStack) -> None:
    """The buffer has lost what it held, and has not got the new weights."""
    it = made(stack, 0, 1, 2)
    assert [it.held(number) for number in (0, 1)] == [0, 1]
    it.files.wait_begun(3)
    it.files.broken = {0}
    assert it.held(2) == 2
    with pytest.raises(OSError, match="cannot read 0"):
        it.held(0)
    assert it.held(0) == 0
    assert it.held(1) == 1


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 1, 1), (0, 2, 0, 2), (3, 2, 1, 0)])
def test_another_order_gives_the_right_weights_too(stack: ExitStack, order: tuple[int, ...]) -> None:
    it = made(stack, 0, 1, 2, 3)
    assert [it.held(number) for number in order * 3] == list(order * 3)


def test_the_reader_ends_when_it_is_closed(stack: ExitStack) -> None:
    before = set(threading.enumerate())
    it = made(stack, 0, 1, 2)
    it.held(0)
    it.layers.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]
