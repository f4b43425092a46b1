"""The ranks of a node as real child processes: a small program stands in for a rank and does what a test asks."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clusters import assigns_of
from waiting import within

from tpdist import log
from tpdist.control.child import describe_exit
from tpdist.control.messages import Assign, Connect, Message, RankGone, RankUpdate
from tpdist.control.supervisor import Supervisor, rank_environment

DEADLINE_S = 20.0
PARTS = """
import os, signal, subprocess, sys, time
from tpdist.control.channel import Codec, Dealer, close_blocking_sockets, wait_any
from tpdist.control.messages import *
from tpdist.sampling_params import SamplingParams

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
agent, local_rank = options["--agent"], int(options["--local-rank"])
link = Dealer(address=agent, identity=f"local-{local_rank}".encode(), codec=Codec())

def hello():
    link.send(RankHello(local_rank=local_rank, pid=os.getpid()))
    return hear(RankStart)

def hear(kind):
    while True:
        wait_any([link], timeout_s=30)
        envelope = link.receive()
        if isinstance(envelope.body, kind):
            return envelope.body

def say(body, epoch=1):
    link.codec.epoch = epoch
    link.send(body)

def leave(code):
    close_blocking_sockets()
    os._exit(code)
"""


@pytest.fixture(autouse=True)
def rank_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Python is asked to run as a rank, it runs the program of the test."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/rank.py "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))


def write_program(folder: Path, program: str) -> Path:
    file = folder / "rank.py"
    file.write_text(PARTS + textwrap.dedent(program))
    return file


class Node:
    """A supervisor and what it reported."""

    def __init__(self, folder: Path, program: str, **options: Any) -> None:
        write_program(folder, program)
        self.reports: list[Message] = []
        self._reported = asyncio.Event()
        fields: dict[str, Any] = {
            "model": lambda: "/model",
            "key_file": None,
            "engine_address": "ipc:///engine",
            "run_dir": folder,
            "environ": os.environ,
            "threads": None,
            "spawn": True,
            "report": self._report,
            "log_level": "INFO",
            "log_format": "text",
            "trace_folder": None,
        }
        self.supervisor = Supervisor(**{**fields, **options})

    async def _report(self, message: Message) -> None:
        self.reports.append(message)
        self._reported.set()

    async def wait_for(self, kind: type[Message]) -> Any:
        """The first message of a kind that is reported."""
        while True:
            for message in self.reports:
                if isinstance(message, kind):
                    return message
            self._reported.clear()
            await self._reported.wait()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(within(DEADLINE_S, work))


@asynccontextmanager
async def ranks(folder: Path, program: str, *, size: int = 1, **options: Any) -> AsyncIterator[Node]:
    """A node whose ranks run `program`."""
    node = Node(folder, program, **options)
    try:
        await node.supervisor.start(assign_of(size))
        yield node
    finally:
        await node.supervisor.close(grace_s=0.5)


def assign_of(size: int) -> Assign:
    return msgspec.structs.replace(assigns_of([2, size])[1], epoch=1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_get_their_orders_and_where_rank_0_listens(tmp_path: Path) -> None:
    program = """
        start = hello()
        assert (start.rank, start.local_rank, start.model) == (2 + local_rank, local_rank, "/model"), start
        assert (start.assign.threads, os.environ["OMP_NUM_THREADS"]) == (3, "3")
        connect = hear(Connect)
        say(RankUpdate(rank=start.rank, pid=os.getpid(), device="cpu", phase="load", done=connect.store_port))
        hear(RankStop)
        leave(0)
    """

    async def main() -> None:
        async with ranks(tmp_path, program, size=2, threads=3) as node:
            await node.supervisor.connect(Connect(store_port=5, plan_port=6))
            while len(node.reports) < 2:
                await asyncio.sleep(0.02)
        assert {(message.rank, message.done) for message in node.reports} == {(2, 5), (3, 5)}

    run(main())


def test_a_rank_that_is_killed_is_reported_with_the_signal_and_its_last_lines(tmp_path: Path) -> None:
    program = """
        hello()
        print("on stdout", flush=True)
        for line in range(30):
            print("line", line, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """

    async def main() -> None:
        async with ranks(tmp_path, program) as node:
            gone = await node.wait_for(RankGone)
            assert (gone.rank, gone.exit_code, gone.secondary) == (2, 6, False)
            assert gone.cause.startswith("was killed by SIGKILL")
            assert gone.last_lines == tuple(f"line {line}" for line in range(10, 30))

    run(main())


def test_in_json_every_line_of_a_rank_is_an_event_and_its_last_lines_are_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = """
        from tpdist import log
        import logging
        start = hello()
        assert start.log_format == "json"
        print("free(): invalid pointer", flush=True)
        log.configure(log_format=start.log_format, node="head", rank=2)
        try:
            x = "y" * 100_000
            assert not x, x
        except AssertionError:
            logging.getLogger("tpdist").exception("a long event")
        logging.getLogger("tpdist").info("goodbye")
        sys.exit(1)
    """

    async def main() -> tuple[str, ...]:
        async with ranks(tmp_path, program, log_format="json") as node:
            gone: RankGone = await node.wait_for(RankGone)
            return gone.last_lines

    log.configure(log_format="json", node="head")
    try:
        last_lines = asyncio.run(within(DEADLINE_S, main()))
    finally:
        log.configure()
    first, second, third = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["rank"], first["epoch"], first["message"]) == (2, 1, "free(): invalid pointer")
    assert len(second["exception"]) > 100_000
    assert third["message"] == "goodbye"
    assert last_lines[0] == "free(): invalid pointer"
    assert last_lines[-1].endswith(" INFO    goodbye")


@pytest.mark.parametrize(("code", "expected"), [(0, 6), (1, 1), (3, 3)])
def test_a_rank_that_ends_unasked_is_reported_with_its_code(tmp_path: Path, code: int, expected: int) -> None:
    async def main() -> None:
        async with ranks(tmp_path, f"sys.exit({code})") as node:
            gone = await node.wait_for(RankGone)
            assert (gone.exit_code, gone.cause) == (expected, f"ended with exit code {code}")

    run(main())


def test_a_rank_that_says_why_it_ends_is_reported_once(tmp_path: Path) -> None:
    program = """
        hello()
        say(RankGone(rank=2, exit_code=3, cause="does not fit"))
        leave(3)
    """

    async def main() -> None:
        async with ranks(tmp_path, program) as node:
            await node.wait_for(RankGone)
            await asyncio.sleep(1.2)
            assert node.reports == [RankGone(rank=2, exit_code=3, cause="does not fit")]

    run(main())


def test_the_death_of_a_rank_is_noticed_while_a_child_of_it_holds_its_log_open(tmp_path: Path) -> None:
    program = """
        child = subprocess.Popen(["sleep", "60"])
        print("child", child.pid, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """

    async def main() -> None:
        async with ranks(tmp_path, program) as node:
            gone = await within(5, node.wait_for(RankGone))
            os.kill(int(gone.last_lines[-1].split()[1]), signal.SIGKILL)

    run(main())


def test_output_without_line_ends_neither_hides_a_death_nor_fills_the_memory(tmp_path: Path) -> None:
    program = """
        sys.stderr.write("x" * 300_000)
        for step in range(100):
            sys.stderr.write(f"{step}%\\r")
        sys.stderr.write("no end of line")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGABRT)
    """

    async def main() -> None:
        async with ranks(tmp_path, program) as node:
            gone = await node.wait_for(RankGone)
            assert gone.cause == "was killed by SIGABRT"
            assert gone.last_lines[-2:] == ("99%", "no end of line")
            assert all(len(line) <= 2000 for line in gone.last_lines)

    run(main())


def test_only_news_of_this_epochs_ranks_are_passed_on(tmp_path: Path) -> None:
    update = RankUpdate(rank=2, pid=1, device="cpu", phase="load")
    program = """
        hello()
        update = RankUpdate(rank=2, pid=1, device="cpu", phase="load")
        say(update, epoch=0)
        say(RankGone(rank=2, exit_code=1, cause="old"), epoch=2)
        say(Generate(request_id="x", prompt_token_ids=(1,), sampling=SamplingParams()))
        say(update)
        hear(RankStop)
        leave(0)
    """

    async def main() -> None:
        async with ranks(tmp_path, program) as node:
            await node.wait_for(RankUpdate)
        assert node.reports == [update]

    run(main())


def test_ranks_that_are_asked_to_end_are_not_reported(tmp_path: Path) -> None:
    async def main() -> None:
        async with ranks(
            tmp_path, "hello(); say(RankUpdate(rank=2, pid=1, device='c', phase='load'));hear(RankStop); leave(5)"
        ) as node:
            await node.wait_for(RankUpdate)
        assert not any(isinstance(message, RankGone) for message in node.reports)

    run(main())


def test_ranks_that_do_not_end_when_asked_are_killed(tmp_path: Path) -> None:
    program = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hello()
        say(RankUpdate(rank=2, pid=os.getpid(), device="c", phase="load"))
        time.sleep(600)
    """

    async def main() -> None:
        async with ranks(tmp_path, program) as node:
            pid = (await node.wait_for(RankUpdate)).pid
            started = time.monotonic()
        assert time.monotonic() - started < 3
        assert not is_alive(pid)
        assert len(node.reports) == 1

    run(main())


def test_ranks_of_one_epoch_after_another_leave_no_descriptor_and_none_is_taken_for_another(tmp_path: Path) -> None:
    """Also those that are stopped, or that say something of their epoch when it is over."""
    program = """
        start = hello()
        say(RankUpdate(rank=start.rank, pid=os.getpid(), device="c", phase="load"), epoch=start.assign.epoch)
        hear(Connect)
        if local_rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        hear(RankStop)
        say(RankGone(rank=start.rank, exit_code=1, cause="late"), epoch=start.assign.epoch)
        leave(1)
    """

    async def main() -> None:
        node = Node(tmp_path, program)
        held = []
        for epoch in range(1, 5):
            node.reports.clear()
            await node.supervisor.start(msgspec.structs.replace(assign_of(2), epoch=epoch))
            while len(node.reports) < 2:
                await asyncio.sleep(0.02)
            await node.supervisor.connect(Connect(store_port=1, plan_port=2))
            while [each.process for each in node.supervisor.progress()][1:] != ["T"]:
                await asyncio.sleep(0.02)
            await node.supervisor.end_epoch(grace_s=0.5)
            assert node.supervisor.progress() == ()
            held.append(len(os.listdir("/proc/self/fd")))
            pids = [message.pid for message in node.reports if isinstance(message, RankUpdate)]
            assert not any(is_alive(pid) for pid in pids)
        await node.supervisor.close()
        assert held[-1] == held[1], held

    run(main())


def test_a_watcher_that_fails_breaks_the_supervisor_instead_of_watching_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        async def refuse(message: Message) -> None:
            raise RuntimeError(f"cannot report {type(message).__name__}")

        async with ranks(tmp_path, "hello(); leave(6)", report=refuse) as node:
            with pytest.raises(RuntimeError, match="cannot report RankGone"):
                await node.supervisor.broken

    run(main())


def test_no_rank_is_started_once_the_node_ends(tmp_path: Path) -> None:
    async def main() -> None:
        node = Node(tmp_path, "time.sleep(600)")
        await node.supervisor.close(grace_s=0)
        await node.supervisor.start(assign_of(2))
        found = subprocess.run(["pgrep", "-f", str(tmp_path / "rank.py")], capture_output=True, text=True, check=False)
        assert found.stdout == ""

    run(main())


def test_a_rank_that_exists_already_gets_its_orders_when_they_come(tmp_path: Path) -> None:
    """As under torchrun: the rank says hello first, and the supervisor starts nothing."""

    async def main() -> None:
        node = Node(
            tmp_path,
            """
            start = hello()
            say(RankUpdate(rank=start.rank, pid=1, device="c", phase="start"))
            hear(RankStop)
            leave(0)
            """,
            spawn=False,
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable, "--agent", node.supervisor.address, "--local-rank", "1"
        )
        await asyncio.sleep(0.3)
        await node.supervisor.start(assign_of(2))
        assert await node.wait_for(RankUpdate) == RankUpdate(rank=3, pid=1, device="c", phase="start")
        await node.supervisor.close()
        assert await child.wait() == 0

    run(main())


def test_the_users_choice_of_interface_stands() -> None:
    assign = msgspec.structs.replace(assign_of(1), interface="eth0", threads=4)
    child = rank_environment({"NCCL_SOCKET_IFNAME": "ib0", "HOME": "/h"}, assign)
    assert (child["GLOO_SOCKET_IFNAME"], child["NCCL_SOCKET_IFNAME"]) == ("eth0", "ib0")
    assert (child["OMP_NUM_THREADS"], child["HOME"]) == ("4", "/h")
    assert "GLOO_SOCKET_IFNAME" not in rank_environment({}, msgspec.structs.replace(assign, interface=None))


@pytest.mark.parametrize(
    ("code", "words"),
    [(7, "ended with exit code 7"), (-11, "was killed by SIGSEGV"), (-35, "was killed by signal 35")],
)
def test_an_end_is_described_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words
