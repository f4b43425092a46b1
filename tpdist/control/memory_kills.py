"""Whether the kernel killed a process because memory ran out, and whose limit that was.

A process that gets SIGKILL does not see from where. The kernel counts its own such kills in every cgroup (oom_kill),
and logs each with the number of the process; what counts is what came since the process was started.
"""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tpdist.control.cgroup import PROC, SYS, MemoryFiles, memory_cgroups, read_key, read_number
from tpdist.plan.amounts import amount

KERNEL_LOG = Path("/dev/kmsg")
RECORD_BYTES = 8192
CLOCK_SLACK_US = 1_000_000
MACHINE = "this machine has no memory left"


@dataclass(frozen=True)
class _Counts:
    """Of one cgroup: processes killed in it, how often that was for its own limit (version 2), and whether it ever was
    full (version 1)."""

    kills: int
    hits: int
    was_full: bool
    limit: int | None


NONE = _Counts(0, 0, False, None)


class MemoryKills:
    """Those of this process's cgroup and of the ones around it, in which its children run too, from now on."""

    def __init__(self, *, proc: Path = PROC, sys: Path = SYS, kernel_log: Path = KERNEL_LOG) -> None:
        self._proc = proc
        self._sys = sys
        self._kernel_log = kernel_log
        self._since_us = int(time.monotonic() * 1e6) - CLOCK_SLACK_US
        self._before = self._read()

    def limit_of(self, pid: int) -> str | None:
        """Which limit process `pid`, whom SIGKILL has ended, was killed for, in words. None: it was not, as far as this
        machine shows."""
        now, before, line = self._read(), self._before, self._logged(pid)
        if line is None and not any(now[folder].kills > before.get(folder, NONE).kills for folder in now):
            return None
        limits = [
            (each.limit, folder)
            for folder, each in now.items()
            if each.limit is not None and (each.was_full or each.hits > before.get(folder, NONE).hits)
        ]
        if not limits or (line is not None and "cgroup" not in line):
            return MACHINE
        limit, folder = min(limits)
        return f"cgroup limit {amount(limit)}, {folder}"

    def _read(self) -> dict[Path, _Counts]:
        return {folder: _read_counts(folder, files) for folder, files in memory_cgroups(self._proc, self._sys)}

    def _logged(self, pid: int) -> str | None:
        """The line of the kernel's log that names `pid`. In a container it has the machine's numbers, or cannot be
        read."""
        for line in _records(self._kernel_log):
            found = re.match(rf"\d+,\d+,(\d+),[^;]*;(.*\bKilled process {pid} .*)", line)
            if found and int(found[1]) >= self._since_us:
                return found[2]
        return None


def _read_counts(folder: Path, files: MemoryFiles) -> _Counts:
    kills, limit = read_key(folder / files.kills, "oom_kill"), read_number(folder / files.limit)
    most = None if files.most is None else read_number(folder / files.most)
    was_full = limit is not None and most is not None and most >= limit
    return _Counts(kills, read_key(folder / files.kills, "oom"), was_full, limit)


def _records(path: Path) -> Iterator[str]:
    """Lines of the kernel's log as /dev/kmsg gives them, one record a read; none where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    try:
        while record := _read_record(descriptor):
            yield from record.decode(errors="replace").splitlines()
    finally:
        os.close(descriptor)


def _read_record(descriptor: int) -> bytes:
    """Empty when there is no more."""
    while True:
        try:
            return os.read(descriptor, RECORD_BYTES)
        except BrokenPipeError:
            continue  # records were overwritten while we read: the next read goes on behind them
        except OSError:
            return b""
