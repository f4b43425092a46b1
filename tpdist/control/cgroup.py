"""The control groups around a process, version 1 and 2, and their files. Pure reading: no process, no decision.

All reads go through `proc` and `sys` folders, so that tests can bring their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SYS = Path("/sys")


@dataclass(frozen=True)
class MemoryFiles:
    """Names of one cgroup version's files, and of the reclaimable part in its memory.stat. `kills` counts processes
    killed, as oom_kill. Whether they were for this cgroup's limit: version 2 counts that too, as oom, version 1 has but
    the most that was ever used."""

    limit: str
    usage: str
    reclaimable: str
    kills: str
    most: str | None


V1 = MemoryFiles(
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    reclaimable="total_inactive_file",
    kills="memory.oom_control",
    most="memory.max_usage_in_bytes",
)
V2 = MemoryFiles(
    limit="memory.max", usage="memory.current", reclaimable="inactive_file", kills="memory.events", most=None
)


def memory_cgroups(proc: Path = PROC, sys: Path = SYS) -> Iterator[tuple[Path, MemoryFiles]]:
    """The memory cgroup of this process and all around it, innermost first."""
    for folder in cgroup_folders("memory", proc, sys):
        yield folder, V1
    for folder in cgroup_folders("", proc, sys):
        yield folder, V2


def cgroup_folders(controller: str, proc: Path = PROC, sys: Path = SYS) -> Iterator[Path]:
    """The cgroup of this process and all around it, innermost first; "" is the one hierarchy of version 2.

    A container often sees only its own part of the tree, at the mount point: parts of the path that do not exist
    there are skipped.
    """
    for line in read_text(proc / "self/cgroup").splitlines():
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


def read_key(path: Path, name: str) -> int:
    """The number behind `name` in a file of names and numbers; 0 if it is not there."""
    for line in read_text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0


def read_number(path: Path) -> int | None:
    """None if the file does not exist or says "max"."""
    text = read_text(path)
    return int(text) if text.removeprefix("-").isdecimal() else None


def read_text(path: Path) -> str:
    """The file, stripped; "" if this kernel or container does not show it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
