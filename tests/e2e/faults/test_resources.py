"""A machine that runs out of something: memory for one rank, room for the log."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroups import MemoryCgroup, memory_cgroup

from e2e.cluster import Processes
from e2e.faults.fleet import Figures, Fleet, kill
from e2e.faults.traffic import Prompt

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MIB = 1024**2
VICTIM_SCORE = "1000"
"""The kernel ends the process with the highest of these first. See proc(5), oom_score_adj."""
HUNGRY = (
    sys.executable,
    "-c",
    f"open('/proc/self/oom_score_adj', 'w').write('{VICTIM_SCORE}'); bytearray({60 * MIB})",
)
"""Smaller than a rank, so it is not the first to go; but what the first frees is counted a moment late, and then the
kernel may end a second process, which must not be the agent."""
NOWHERE = ("sh", "-c", 'exec "$0" "$@" 2>/dev/full')
"""Every write to the log fails, as on a full disk."""


@pytest.fixture
def cgroup() -> Iterator[MemoryCgroup]:
    with memory_cgroup() as made:
        yield made


def test_a_rank_that_the_kernel_kills_for_its_memory(
    cgroup: MemoryCgroup, model: Path, answers: dict[Prompt, list[int]], figures: list[Figures]
) -> None:
    prefix = tuple(cgroup.entered_by(()))
    with Processes() as processes:
        fleet = Fleet(processes, model, answers, num_workers=1, where={"worker-0": ("127.0.0.1", prefix)})
        fleet.start_all()

        def run_out() -> None:
            Path(f"/proc/{fleet.rank_pid(1)}/oom_score_adj").write_text(VICTIM_SCORE)
            cgroup.limit(cgroup.usage + 30 * MIB)
            hungry = subprocess.run(cgroup.entered_by(HUNGRY), timeout=60)
            assert hungry.returncode in (0, -signal.SIGKILL)
            cgroup.limit(None)

        figures.append(fleet.measure("a rank killed for its memory by the kernel", run_out))
        assert "rank 1 on worker 0" in fleet.last_cause
        assert "out-of-memory killer (cgroup limit" in fleet.last_cause
        assert str(cgroup.folder) in fleet.last_cause
        fleet.end()


def test_nodes_whose_logs_cannot_be_written_serve_and_recover(
    model: Path, answers: dict[Prompt, list[int]], figures: list[Figures]
) -> None:
    where = dict.fromkeys(("head", "worker-0"), ("127.0.0.1", NOWHERE))
    with Processes() as processes:
        fleet = Fleet(processes, model, answers, num_workers=1, where=where)
        fleet.start_all()
        figures.append(fleet.measure("kill -9 of a rank, with no room for logs", lambda: kill(fleet.rank_pid(1))))
        fleet.end()
