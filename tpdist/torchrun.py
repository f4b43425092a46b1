"""A rank under torchrun: `torchrun --nproc-per-node N -m tpdist serve MODEL`.

torchrun starts and restarts the ranks. Local rank 0 of each group starts that group's agent as a child, which serves
HTTP and supervises nothing; all ranks of the group connect to it as they would to an agent that had started them.
Ranks meet in torchrun's own store. On SIGTERM the agent drains and then tells its ranks to end.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tpdist.control.messages import Connect, RankStart
from tpdist.control.supervisor import interface_variables
from tpdist.errors import LostError
from tpdist.meeting import expect
from tpdist.parallel.store import Store, environment_store, sub_store
from tpdist.parent import follow_parent
from tpdist.run_directory import run_directory
from tpdist.settings import AGENT_VARIABLE, Settings, Torchrun
from tpdist.worker import end, ignore_signals, open_link, run_rank

AGENT_STOP_GRACE_S = 10.0


def run(settings: Settings, *, argv: list[str]) -> None:
    """Be one rank; does not return. `argv` is this process's own command line, which the agent's child repeats."""
    place = settings.torchrun
    assert place is not None
    follow_parent(os.getppid(), signal.SIGKILL)
    store = environment_store(timeout_s=settings.register_timeout_s)
    if place.local_rank == 0:
        with run_directory() as run_dir, _agent(argv, run_dir) as agent:
            _follow_agent(agent, run_dir)
            sub_store(store, f"tpdist/{place.restart_count}").set(_key(place), str(run_dir))
            exit_code = _run_rank(settings, store, run_dir)
        end(exit_code)
    ignore_signals()
    run_dir = Path(sub_store(store, f"tpdist/{place.restart_count}").get(_key(place)).decode())
    end(_run_rank(settings, store, run_dir))


def _run_rank(settings: Settings, store: Store, run_dir: Path) -> int:
    place = settings.torchrun
    assert place is not None
    link = open_link(f"ipc://{run_dir}/ranks.sock", place.local_rank)
    start = expect(link, RankStart, timeout_s=settings.register_timeout_s + settings.fetch_timeout_s)

    if start.assign.interface is not None:
        for name, value in interface_variables(start.assign.interface).items():
            os.environ.setdefault(name, value)

    def make_store(start: RankStart, ports: Connect, listen_fd: int | None) -> Store:
        if listen_fd is not None:
            os.close(listen_fd)
        return sub_store(store, f"tpdist/{place.restart_count}/{start.assign.epoch}")

    return run_rank(link, start, make_store=make_store)


def _key(place: Torchrun) -> str:
    return f"run_dir/{place.group_rank}"


@contextlib.contextmanager
def _agent(argv: list[str], run_dir: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The agent of this group, alive while this lasts."""
    command = [sys.executable, "-m", "tpdist", *argv]
    agent = subprocess.Popen(command, env={**os.environ, AGENT_VARIABLE: str(run_dir)})
    try:
        yield agent
    finally:
        try:
            agent.wait(AGENT_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


def _follow_agent(agent: "subprocess.Popen[bytes]", run_dir: Path) -> None:
    """End with the agent. torchrun signals the whole process group, so the agent hears SIGTERM by itself and drains;
    this rank, like the others, waits for its RankStop."""

    def gone(number: int, frame: FrameType | None) -> None:
        if agent.poll() is not None:
            shutil.rmtree(run_dir, ignore_errors=True)
            end(agent.returncode if agent.returncode >= 0 else LostError.exit_code)

    ignore_signals()
    signal.signal(signal.SIGCHLD, gone)
    gone(signal.SIGCHLD, None)  # it may have ended before there was a handler
