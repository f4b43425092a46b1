"""Reading ahead: bounded, in the right order, with errors that reach the caller, and no thread left behind."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tpdist.bigmodel import disk_offload
from tpdist.bigmodel.prefetch import Prefetcher
from tpdist.errors import CheckpointError

WAIT_S = 5.0


class Reads:
    """A `read` that notes what it reads, and in which thread."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.threads: list[str] = []
        self.fail: set[str] = set()

    def __call__(self, block: str) -> dict[str, Tensor]:
        self.blocks.append(block)
        self.threads.append(threading.current_thread().name)
        if block in self.fail:
            raise CheckpointError(f"{block} is broken")
        return {block: torch.zeros(1)}


def settled(reads: Reads, expected: list[str]) -> None:
    until(lambda: len(reads.blocks) >= len(expected))
    time.sleep(0.02)
    assert reads.blocks == expected


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_no_more_than_asked_for_is_read_ahead() -> None:
    reads = Reads()
    prefetcher = Prefetcher("abcdef", reads, ahead=2)
    prefetcher.take("a")
    settled(reads, ["a", "b", "c"])
    prefetcher.take("a")
    prefetcher.take("b")
    settled(reads, ["a", "b", "c", "d"])
    assert reads.threads[0] == "MainThread"
    assert all(name.startswith("tpdist-prefetch") for name in reads.threads[1:])


def test_the_first_block_follows_the_last() -> None:
    reads = Reads()
    prefetcher = Prefetcher("abc", reads, ahead=1)
    for _ in range(2):
        for block in "abc":
            prefetcher.take(block)
    settled(reads, ["a", "b", "c", "a", "b", "c", "a"])


def test_the_order_of_the_last_pass_is_learnt() -> None:
    reads = Reads()
    prefetcher = Prefetcher("abcd", reads, ahead=1)
    for _ in range(2):
        for block in "adbc":
            assert list(prefetcher.take(block)) == [block]
    until(lambda: reads.blocks[-1] == "a")
    reads.blocks.clear()
    for block in "adbc":
        prefetcher.take(block)
    settled(reads, ["d", "b", "c", "a"])


def test_nothing_is_read_ahead_if_nothing_is_asked_for() -> None:
    reads = Reads()
    prefetcher = Prefetcher("abc", reads, ahead=0)
    prefetcher.take("a")
    settled(reads, ["a"])
    alone = Prefetcher("a", reads, ahead=5)
    alone.take("a")
    settled(reads, ["a", "a"])


def test_an_error_while_reading_ahead_reaches_who_takes_the_block() -> None:
    reads = Reads()
    reads.fail = {"b"}
    prefetcher = Prefetcher("abc", reads, ahead=1)
    prefetcher.take("a")
    until(lambda: len(reads.blocks) == 2)
    with pytest.raises(CheckpointError, match="b is broken"):
        prefetcher.take("b")
    reads.fail = set()
    assert list(prefetcher.take("b")) == ["b"]


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tpdist-prefetch")]


def model(blocks: int = 5) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(blocks)))


def test_no_thread_and_no_file_are_left_when_a_model_goes(tmp_path: Path) -> None:
    gc.collect()
    until(lambda: not prefetch_threads())
    num_files = len(os.listdir("/proc/self/fd"))
    offloaded = disk_offload(model(), tmp_path)
    offloaded(torch.zeros(1, 64))
    assert len(prefetch_threads()) == 1
    del offloaded
    gc.collect()
    until(lambda: not prefetch_threads())
    until(lambda: len(os.listdir("/proc/self/fd")) == num_files)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_reads_by_itself(tmp_path: Path, ahead: int) -> None:
    offloaded = disk_offload(model(), tmp_path, prefetch_blocks=ahead)
    x = torch.ones(1, 64)
    with torch.no_grad():
        expected = offloaded(x)
        child = os.fork()
        if child == 0:
            os._exit(0 if all(torch.equal(offloaded(x), expected) for _ in range(2)) else 1)
        exits: list[int] = []
        try:
            until(lambda: exits.extend(status for pid, status in [os.waitpid(child, os.WNOHANG)] if pid) or bool(exits))
        finally:
            if not exits:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        assert exits == [0]
        assert torch.equal(offloaded(x), expected)


def test_a_file_that_breaks_in_use_is_an_error_of_the_forward(tmp_path: Path) -> None:
    offloaded = disk_offload(model(), tmp_path)
    expected = offloaded(torch.ones(1, 64))
    file = tmp_path / "offloaded.safetensors"
    content = file.read_bytes()
    os.truncate(file, len(content) // 2)
    message = r"offloaded\.safetensors ends after .* cut short while it was in use"
    with pytest.raises(CheckpointError, match=message):
        offloaded(torch.ones(1, 64))
    with file.open("r+b") as stream:
        stream.write(content)
    assert torch.equal(offloaded(torch.ones(1, 64)), expected)
