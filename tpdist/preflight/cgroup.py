"""What the kernel lets this process use: CPUs and memory under affinity and cgroups, version 1 and 2.

Knows nothing of tpdist. All reads go through `proc` and `sys` folders, so that tests can bring their own.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class MemoryFiles:
    """Names of one cgroup version's files, and of the reclaimable part in its memory.stat."""

    limit: str
    usage: str
    reclaimable: str


V1 = MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = MemoryFiles("memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True)
class Memory:
    total_bytes: int
    available_bytes: int


def memory(*, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Memory:
    """Memory of the machine, or of the tightest cgroup around this process if that has less.

    A cgroup's page cache that the kernel can take back counts as available, as it does for the machine.
    """
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for folder, files in _memory_cgroups(proc, sys):
        limit = _read_number(folder / files.limit)
        if limit is None:
            continue
        used = (_read_number(folder / files.usage) or 0) - _reclaimable(folder, files.reclaimable)
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Memory(total, available)


def num_cpus(*, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> int:
    """Whole CPUs that this process can keep busy: those of its affinity mask, within its cgroups' quota; at least 1."""
    count = len(os.sched_getaffinity(0))
    for quota, period in _cpu_quotas(proc, sys):
        count = min(count, quota // period)
    return max(1, count)


def _memory_cgroups(proc: Path, sys: Path) -> Iterator[tuple[Path, MemoryFiles]]:
    for folder in _folders("memory", proc, sys):
        yield folder, V1
    for folder in _folders("", proc, sys):
        yield folder, V2


def _cpu_quotas(proc: Path, sys: Path) -> Iterator[tuple[int, int]]:
    for folder in _folders("cpu", proc, sys):
        quota, period = _read_number(folder / "cpu.cfs_quota_us"), _read_number(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            yield quota, period
    for folder in _folders("", proc, sys):
        quota_text, _, period_text = _read_text(folder / "cpu.max").partition(" ")
        if quota_text.isdecimal() and period_text.isdecimal() and int(period_text) > 0:
            yield int(quota_text), int(period_text)


def _folders(controller: str, proc: Path, sys: Path) -> Iterator[Path]:
    """The cgroup of this process and all around it, innermost first; "" is the one hierarchy of version 2.

    A container often sees only its own part of the tree, at the mount point: parts of the path that do not exist
    there are skipped.
    """
    for line in _read_text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        mounts = [sys / "fs/cgroup" / controllers] if controllers else [sys / "fs/cgroup", sys / "fs/cgroup/unified"]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:depth])
                if folder.is_dir():
                    yield folder


def _reclaimable(folder: Path, name: str) -> int:
    for line in _read_text(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0


def _read_number(path: Path) -> int | None:
    """None if the file does not exist or says "max"."""
    text = _read_text(path)
    return int(text) if text.removeprefix("-").isdecimal() else None


def _read_text(path: Path) -> str:
    """The file, stripped; "" if this kernel or container does not show it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
