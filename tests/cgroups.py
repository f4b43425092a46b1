"""A memory cgroup of a test's own, where this machine lets one be made."""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tpdist.control.cgroup import V1, V2, MemoryFiles


@dataclass(frozen=True)
class MemoryCgroup:
    """What runs in it is killed by the kernel when it needs more than the limit."""

    folder: Path
    files: MemoryFiles

    @property
    def usage(self) -> int:
        return int((self.folder / self.files.usage).read_text())

    def limit(self, num_bytes: int | None) -> None:
        """None: no limit."""
        swap = self.folder / ("memory.swap.max" if self.files is V2 else "memory.memsw.limit_in_bytes")
        nothing = "max" if self.files is V2 else "-1"
        values = [(self.folder / self.files.limit, nothing if num_bytes is None else str(num_bytes))]
        if swap.is_file():
            values.append((swap, nothing if num_bytes is None else "0" if self.files is V2 else str(num_bytes)))
        # Memory and swap together may never have less than memory alone.
        for path, value in values if num_bytes is not None else reversed(values):
            path.write_text(value)

    def entered_by(self, command: Sequence[str]) -> list[str]:
        """A command that runs `command` in this cgroup."""
        enter = f'echo $$ > {shlex.quote(str(self.folder / "cgroup.procs"))} && exec "$0" "$@"'
        return ["sh", "-c", enter, *command]


@contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """Skips the test where none can be made. What runs in it must have ended afterwards."""
    for mount, files in ((Path("/sys/fs/cgroup/memory"), V1), (Path("/sys/fs/cgroup"), V2)):
        if not (mount / "cgroup.procs").is_file():
            continue
        group = MemoryCgroup(mount / f"tpdist-test-{os.getpid()}", files)
        try:
            group.folder.mkdir()
        except OSError as error:
            pytest.skip(f"no memory cgroup can be made here: {error}")
        try:
            if not (group.folder / files.limit).is_file():
                pytest.skip("memory cgroups have no limits here")
            yield group
        finally:
            group.folder.rmdir()
        return
    pytest.skip("this machine shows no memory cgroups")
