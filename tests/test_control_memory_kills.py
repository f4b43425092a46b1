"""A SIGKILL of the kernel's out-of-memory killer is told from anybody else's, by counters and by the kernel's log."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import within

from tpdist.control.cgroup import V1, V2
from tpdist.control.child import Child
from tpdist.control.memory_kills import MACHINE, MemoryKills

PID = 4242
LIMIT = 64 * 1024**2
FEW = 5


class Machine:
    """A /proc and a /sys with one cgroup in another, and a kernel log."""

    def __init__(self, folder: Path, version: int) -> None:
        self.version = version
        self.proc, self.sys, self.log = folder / "proc", folder / "sys", folder / "kmsg"
        write(self.proc / "self/cgroup", "4:memory:/pod/main\n" if version == 1 else "0::/pod/main\n")
        mount = self.sys / ("fs/cgroup/memory" if version == 1 else "fs/cgroup")
        self.outer, self.inner = mount / "pod", mount / "pod/main"
        for group in (self.outer, self.inner):
            self.count(group, kills=3, hits=FEW)

    def count(self, group: Path, *, kills: int, hits: int) -> None:
        if self.version == 1:
            write(group / V1.kills, f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")
            write(group / "memory.max_usage_in_bytes", f"{100 * LIMIT if hits > FEW else 1}\n")
        else:
            write(group / V2.kills, f"low 0\nhigh 0\nmax 9\noom {hits}\noom_kill {kills}\n")

    def limit(self, group: Path, num_bytes: int) -> None:
        write(group / (V1 if self.version == 1 else V2).limit, f"{num_bytes}\n")

    def kills(self) -> MemoryKills:
        return MemoryKills(proc=self.proc, sys=self.sys, kernel_log=self.log)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(params=[1, 2])
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Machine:
    return Machine(tmp_path, request.param)


def test_without_a_counted_kill_nobody_blames_the_kernel(machine: Machine) -> None:
    kills = machine.kills()
    machine.count(machine.inner, kills=3, hits=9)
    assert kills.limit_of(PID) is None


def test_a_counted_kill_names_the_limit_that_was_hit(machine: Machine) -> None:
    machine.limit(machine.inner, LIMIT)
    machine.limit(machine.outer, 10 * LIMIT)
    kills = machine.kills()
    for group in (machine.inner, machine.outer):
        machine.count(group, kills=4, hits=6)
    assert kills.limit_of(PID) == f"cgroup limit 64.0 MiB, {machine.inner}"


def test_a_limit_further_out_is_found(machine: Machine) -> None:
    machine.limit(machine.outer, LIMIT)
    kills = machine.kills()
    machine.count(machine.inner, kills=4, hits=5)
    machine.count(machine.outer, kills=3 if machine.version == 1 else 4, hits=6)
    assert kills.limit_of(PID) == f"cgroup limit 64.0 MiB, {machine.outer}"


def test_a_kill_for_no_limit_is_the_machines(machine: Machine) -> None:
    machine.limit(machine.inner, LIMIT)
    kills = machine.kills()
    machine.count(machine.inner, kills=4, hits=5)
    assert kills.limit_of(PID) == MACHINE


def test_a_machine_without_cgroups_and_log_shows_nothing(tmp_path: Path) -> None:
    kills = MemoryKills(proc=tmp_path / "proc", sys=tmp_path / "sys", kernel_log=tmp_path / "kmsg")
    assert kills.limit_of(PID) is None


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("6,812,{now},-;Out of memory: Killed process 4242 (python3) total-vm:1kB", MACHINE),
        ("6,812,{now},-;Out of memory: Killed process 42420 (python3) total-vm:1kB", None),
        ("6,812,{old},-;Out of memory: Killed process 4242 (python3) total-vm:1kB", None),
        ("6,812,{now},-;usb 1-1: new device", None),
    ],
)
def test_the_kernels_log_names_the_process(tmp_path: Path, record: str, expected: str | None) -> None:
    log = tmp_path / "kmsg"
    kills = MemoryKills(proc=tmp_path / "proc", sys=tmp_path / "sys", kernel_log=log)
    now_us = int(time.monotonic() * 1e6)
    log.write_text("6,1,100,-;booting\n" + record.format(now=now_us, old=now_us - 60_000_000) + "\n")
    assert kills.limit_of(PID) == expected


# -- the real killer --------------------------------------------------------------------------------------------------

HUNGRY = """
import asyncio, sys
from tpdist.control.cgroup import V1, V2
from tpdist.control.child import Child

EAT = "held = bytearray(256 * 1024**2); print('still alive')"

async def main():
    child = Child([sys.executable, "-c", EAT], {})
    async with asyncio.timeout(60):
        await child.exited
    print(child.describe_end())

asyncio.run(main())
"""


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup with room for 64 MiB. Skipped where none can be made."""
    for mount, names in ((Path("/sys/fs/cgroup/memory"), V1), (Path("/sys/fs/cgroup"), V2)):
        folder = mount / f"tpdist-test-{os.getpid()}"
        if not (mount / "cgroup.procs").is_file():
            continue
        try:
            folder.mkdir()
            (folder / names.limit).write_text(str(LIMIT))
            swap = folder / ("memory.swap.max" if names is V2 else "memory.memsw.limit_in_bytes")
            if swap.is_file():
                swap.write_text(str(LIMIT if names is V1 else 0))
        except OSError as error:
            if folder.is_dir():
                folder.rmdir()
            pytest.skip(f"no memory cgroup can be made here: {error}")
        yield folder
        folder.rmdir()
        return
    pytest.skip("this machine shows no memory cgroups")


def test_a_child_that_the_kernel_kills_for_its_memory_is_described_so(small_cgroup: Path, tmp_path: Path) -> None:
    program = tmp_path / "hungry.py"
    program.write_text(HUNGRY)
    enter = f"echo $$ > {small_cgroup}/cgroup.procs && exec {sys.executable} {program}"
    done = subprocess.run(["sh", "-c", enter], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "still alive" not in done.stdout + done.stderr
    start = f"was killed by the kernel's out-of-memory killer (cgroup limit 64.0 MiB, {small_cgroup}); give it more"
    assert done.stdout.startswith(start)


def test_a_child_that_somebody_kills_is_not_blamed_on_its_memory() -> None:
    async def main() -> str:
        child = Child([sys.executable, "-c", "import time; time.sleep(60)"], os.environ)
        child.kill()
        await within(30, child.exited)
        return child.describe_end()

    assert asyncio.run(main()).startswith("was killed by SIGKILL (kill -9, or the kernel's out-of-memory killer")
