"""A piece of memory that processes of one machine share, with a flag for each of them to wait on.

    header   a random token, and a byte for each member to lock
    flags    one cache line for each member: the number of the step that it has entered
    slots    two for each member, for even and odd steps

The memory is an anonymous file (memfd_create), which the others open through /proc/PID/fd: it has no name that could
stay behind, whoever is killed when, and only processes of the same user can open it. Every member holds an fcntl lock
on a byte of its own: the kernel drops the lock with the process, even after kill -9, and so the others see who has
gone.

A flag says that what its owner wrote before is there to be read. This relies on stores becoming visible in program
order, which x86 guarantees and other processors do not. This module knows nothing of ranks and collectives.
"""

import fcntl
import mmap
import os
import platform
import secrets
import time
import weakref

import torch
from torch import Tensor

# Larger slots save no more time, and would fall out of the caches.
SLOT_BYTES = 512 * 1024
CACHE_LINE_BYTES = 64
PAGE_BYTES = 4096
TOKEN_BYTES = 16
LOCKS_AT = TOKEN_BYTES
FLAGS_AT = PAGE_BYTES

# Waiting: spin for some 10 microseconds, then hand over the core after each look (if nobody wants it, that is a slower
# spin), then sleep. Sleeps of at most 1 ms rather than a futex: the one who wakes others would have to know
# whether anybody sleeps, which takes a memory fence that Python does not have, and sleepers have to get up anyway to
# see whether the others still live.
SPINS = 200
YIELD_S = 0.005
FIRST_PAUSE_S = 50e-6
LONGEST_PAUSE_S = 1e-3


class MembersLostError(Exception):
    """`members` were waited for, and have gone or did not come in time: `what` says which."""

    def __init__(self, members: list[int], what: str) -> None:
        super().__init__(f"members {members} have {what}")
        self.members = members
        self.what = what


class Segment:
    """Memory of `size` members, this process being one of them for as long as the object lives.

    Members go through the same steps in the same order. In a step each of them calls `begin`, may write its slot, calls
    `post`, and may wait for others and read their slots. A flag of n says: step n's slot is written, and all of the
    steps before are read. So `begin` of step n waits until all flags are at least n - 1: then nobody reads the slots of
    step n - 2 any more, which are the same memory.
    """

    def __init__(self, fd: int, *, member: int, size: int, timeout_s: float) -> None:
        """Take over `fd`, which must be this process's only descriptor of the memory: it holds the lock.

        timeout_s: the deadline of every wait. Raises OSError.
        """
        weakref.finalize(self, os.close, fd)
        self.member = member
        self.size = size
        self._fd = fd
        self._timeout_s = timeout_s
        self._others = [each for each in range(size) if each != member]
        self._spins = SPINS if size <= len(os.sched_getaffinity(0)) else 0
        self._step = 0
        # The last step that every member is known to have posted.
        self._met = 0
        mapping = mmap.mmap(fd, _num_bytes(size), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        # Aligned accesses of 8 bytes are indivisible.
        self._flags = memoryview(mapping)[FLAGS_AT : _slots_at(size)].cast("Q")[:: CACHE_LINE_BYTES // 8]
        self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, LOCKS_AT + member)

    @property
    def address(self) -> str:
        """Where others attach, for as long as this process holds the memory."""
        token = os.pread(self._fd, TOKEN_BYTES, 0)
        return f"{os.getpid()}/{self._fd}/{token.hex()}"

    def slots(self, parity: int, num_bytes: int) -> list[Tensor]:
        """The first bytes of every member's slot for even (0) or odd (1) steps: uint8 [num_bytes], shared."""
        starts = (_slots_at(self.size) + (2 * each + parity) * SLOT_BYTES for each in range(self.size))
        return [self._bytes[start : start + num_bytes] for start in starts]

    def begin(self) -> int:
        """Enter the next step and return its number; this member's slot may be written now. Raises MembersLostError."""
        before = self._step
        if self._met < before:
            self.meet(before)
        self._step = before + 1
        return self._step

    def post(self, step: int) -> None:
        """Say that this member's slot is written."""
        self._flags[self.member] = step

    def meet(self, step: int) -> None:
        """Wait until every member has posted `step`. Raises MembersLostError."""
        for other in self._others:
            if self._flags[other] < step:
                self._wait(other, step, awaited=self._others)
        self._met = step

    def wait_for(self, member: int, step: int) -> None:
        """Wait until `member` has posted `step`. Raises MembersLostError."""
        if self._flags[member] < step:
            self._wait(member, step, awaited=[member])

    def _wait(self, member: int, step: int, *, awaited: list[int]) -> None:
        flags = self._flags
        for _ in range(self._spins):
            if flags[member] >= step:
                return
        began, pause_s = time.monotonic(), FIRST_PAUSE_S
        while flags[member] < step:
            waited_s = time.monotonic() - began
            if waited_s < YIELD_S:
                os.sched_yield()
                continue
            self._look_after([each for each in awaited if flags[each] < step], step, waited_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _look_after(self, missing: list[int], step: int, waited_s: float) -> None:
        """Raise MembersLostError if one of `missing` has gone, or the deadline is over."""
        gone = [each for each in missing if not self._lives(each)]
        what = "gone" if gone else f"not come within {self._timeout_s:g} s"
        late = gone or (missing if waited_s > self._timeout_s else [])
        # Again, for one may have come, and even ended, since `missing` was made.
        if lost := [each for each in late if self._flags[each] < step]:
            raise MembersLostError(lost, what)

    def _lives(self, member: int) -> bool:
        """Whether a process holds this member's lock. (A shared lock, so that others can try at the same time.)"""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, LOCKS_AT + member)
        except BlockingIOError:
            return True
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, LOCKS_AT + member)
        return False


def create(*, size: int, timeout_s: float) -> Segment:
    """Become member 0 of new memory. Raises OSError."""
    fd, token = os.memfd_create("tpdist"), secrets.token_bytes(TOKEN_BYTES)
    try:
        # Reserved now, so that a lack of memory is an error here and not a SIGBUS later.
        os.posix_fallocate(fd, 0, _num_bytes(size))
        os.pwrite(fd, token, 0)
    except OSError:
        os.close(fd)
        raise
    return Segment(fd, member=0, size=size, timeout_s=timeout_s)


def attach(address: str, *, member: int, size: int, timeout_s: float) -> Segment:
    """Become `member` of the memory at `address`, the creator's while it lives. Raises OSError."""
    if not address:
        raise OSError("no memory to attach to")
    pid, owners_fd, token = address.split("/")
    fd = os.open(f"/proc/{int(pid)}/fd/{int(owners_fd)}", os.O_RDWR | os.O_CLOEXEC)
    # A process of another machine or container may have the same number.
    if os.pread(fd, TOKEN_BYTES, 0) != bytes.fromhex(token) or os.fstat(fd).st_size != _num_bytes(size):
        os.close(fd)
        raise OSError(f"/proc/{pid}/fd/{owners_fd} is another file than the one that was announced")
    return Segment(fd, member=member, size=size, timeout_s=timeout_s)


def machine_id() -> str:
    """Equal for processes that may be able to share memory; empty if this one cannot.

    The boot of the machine, and the PID namespace, in which /proc shows the others.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _slots_at(size: int) -> int:
    flags_end = FLAGS_AT + size * CACHE_LINE_BYTES
    return -(-flags_end // PAGE_BYTES) * PAGE_BYTES


def _num_bytes(size: int) -> int:
    return _slots_at(size) + 2 * size * SLOT_BYTES
