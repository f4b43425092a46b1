"""What the kernel lets this process use: CPUs and memory under affinity and cgroups, version 1 and 2.

Knows nothing of tpdist. All reads go through `proc` and `sys` folders, so that tests can bring their own.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tpdist.control.cgroup import cgroup_folders, memory_cgroups, read_key, read_number, read_text


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
    for folder, files in memory_cgroups(proc, sys):
        limit = read_number(folder / files.limit)
        if limit is None:
            continue
        used = (read_number(folder / files.usage) or 0) - read_key(folder / "memory.stat", files.reclaimable)
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Memory(total, available)


def num_cpus(*, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> int:
    """Whole CPUs that this process can keep busy: those of its affinity mask, within its cgroups' quota; at least 1."""
    count = len(os.sched_getaffinity(0))
    for quota, period in _cpu_quotas(proc, sys):
        count = min(count, quota // period)
    return max(1, count)


def _cpu_quotas(proc: Path, sys: Path) -> Iterator[tuple[int, int]]:
    for folder in cgroup_folders("cpu", proc, sys):
        quota, period = read_number(folder / "cpu.cfs_quota_us"), read_number(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            yield quota, period
    for folder in cgroup_folders("", proc, sys):
        quota_text, _, period_text = read_text(folder / "cpu.max").partition(" ")
        if quota_text.isdecimal() and period_text.isdecimal() and int(period_text) > 0:
            yield int(quota_text), int(period_text)
