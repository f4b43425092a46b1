"""Runs nodes as a user would, by environment variables alone, and makes sure that nothing is left of them.

    with Processes() as processes:
        head = processes.serve("head", model, head_variables(port, world_size=2, num_workers=1))
        worker = processes.serve("worker-0", model, worker_variables(0, port, world_size=2))
        head.wait_ready()

Every process that a test starts, and every child of it, carries one random variable, by which leftovers are found and
killed whatever has become of their parents. Each node has a temporary folder of its own.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

LOOPBACK = "127.0.0.1"
READY_S = 120.0
EXIT_S = 40.0
ANSWER_S = 30.0
CLEAN_S = 5.0
POLL_S = 0.05
MARK = "E2E_RUN"
SHARED_MEMORY = Path("/dev/shm")
FIRST_PORT, LAST_PORT = 20000, 32000
"""Below the range from which the kernel gives ports to those who do not ask for one."""
QUICK_LOSS = {"TPDIST_NODE_LOST_S": "3", "TPDIST_HEARTBEAT_INTERVAL_S": "0.5"}
"""Failures are noticed sooner than by default."""


class NodeProcess:
    """One `tpdist` process with its log and its HTTP address."""

    def __init__(self, name: str, command: Sequence[str], *, environ: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.url = f"http://{environ.get('TPDIST_HOST', LOOPBACK)}:{environ['TPDIST_PORT']}"
        self.killed = False
        self._log_file = folder / "log"
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log_file.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def leftovers(self) -> list[Path]:
        """Run folders that this node should have removed. An agent that was killed could not."""
        return [] if self.killed else list(self.folder.glob("tpdist-*"))

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=ANSWER_S, trust_env=False)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.post_bytes(path, json.dumps(body).encode())

    def post_bytes(self, path: str, body: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return httpx.post(self.url + path, content=body, headers=headers, timeout=ANSWER_S, trust_env=False)

    def cluster(self) -> Any:
        return self.get("/v1/cluster").json()

    def metric(self, name: str) -> float:
        """The value of one metric without labels."""
        lines = (line.split() for line in self.get("/metrics").text.splitlines() if not line.startswith("#"))
        return next(float(value) for key, value in lines if key == name)

    def wait_ready(self, timeout_s: float = READY_S) -> Self:
        self.wait_until(self._is_ready, "is not ready", timeout_s=timeout_s)
        return self

    def wait_for_log(self, text: str, timeout_s: float = READY_S) -> Self:
        self.wait_until(lambda: text in self.log, f"did not log {text!r}", timeout_s=timeout_s)
        return self

    def wait_until(self, happened: Callable[[], bool], problem: str, *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened():
            ended = self._process.poll()
            assert ended is None, f"{self.name} {problem}: it ended with {ended}\n{self.log}"
            assert time.monotonic() < deadline, f"{self.name} {problem} within {timeout_s:g} s\n{self.log}"
            time.sleep(POLL_S)

    def _is_ready(self) -> bool:
        try:
            return self.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.killed = True
        self._process.kill()

    def wait(self, timeout_s: float = EXIT_S) -> int:
        """The exit code of a node that ends by itself."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {timeout_s:g} s\n{self.log}") from None


class Processes:
    """The nodes of one test, or of several that share a cluster. `environ` is added to every node's environment."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.nodes: list[NodeProcess] = []
        self._environ = dict(environ or {})
        self._folder = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
        self._shared_memory = set(SHARED_MEMORY.iterdir())

    def serve(
        self, name: str, model: Path | str, variables: Mapping[str, str] | None = None, *, prefix: Sequence[str] = ()
    ) -> NodeProcess:
        """`tpdist serve MODEL`, with `variables` and no flags. `prefix` is put before the command."""
        command = [*prefix, sys.executable, "-m", "tpdist", "serve", str(model)]
        return self.run(name, command, variables or {})

    def run(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> NodeProcess:
        folder = self._folder / name
        folder.mkdir()
        environ = {**clean_environment(), **self._environ, "TPDIST_PORT": str(free_port()), **variables}
        environ |= {MARK: self.mark, "TMPDIR": str(folder)}
        node = NodeProcess(name, command, environ=environ, folder=folder)
        self.nodes.append(node)
        return node

    def wait_ready(self) -> None:
        for node in self.nodes:
            node.wait_ready()

    def exit_codes(self, timeout_s: float = EXIT_S) -> dict[str, int]:
        """How all nodes end, by name; a node that was killed is left out."""
        deadline = time.monotonic() + timeout_s
        return {node.name: node.wait(max(0.0, deadline - time.monotonic())) for node in self.nodes if not node.killed}

    def stop(self) -> None:
        """End the cluster as an operator would: SIGTERM to one node ends all with 0."""
        self.nodes[0].send(signal.SIGTERM)
        codes = self.exit_codes()
        assert set(codes.values()) == {0}, f"exit codes {codes}\n{self.logs()}"

    def logs(self) -> str:
        return "\n".join(f"----- {node.name}\n{node.log}" for node in self.nodes)

    def close(self) -> list[str]:
        """Kill what still runs and remove all traces; returns what should not have been there."""
        for node in self.nodes:
            if node.running:
                node.kill()
                node.wait()
        left = self._leftovers()
        for pid in marked_processes(self.mark):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._folder)
        return left

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        logs = self.logs()
        left = self.close()
        assert not left or kind is not None, f"left behind: {left}\n{logs}"

    def _leftovers(self) -> list[str]:
        """Children that outlive their node, run folders, shared memory. Orphans get a moment to notice."""
        deadline = time.monotonic() + CLEAN_S
        while (pids := marked_processes(self.mark)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        folders = [str(path) for node in self.nodes for path in node.leftovers]
        segments = [str(path) for path in set(SHARED_MEMORY.iterdir()) - self._shared_memory if not _in_use(path)]
        return [*(f"{pid}: {command_line(pid)}" for pid in pids), *folders, *segments]


def head_variables(port: int, *, world_size: int, num_workers: int, **more: object) -> dict[str, str]:
    """The environment that makes a node the head; `more` are further variables."""
    variables = {
        "MISTRALRS_MN_GLOBAL_WORLD_SIZE": world_size,
        "MISTRALRS_MN_HEAD_NUM_WORKERS": num_workers,
        "MISTRALRS_MN_HEAD_PORT": port,
        **more,
    }
    return {name: str(value) for name, value in variables.items()}


def worker_variables(
    worker_id: int, port: int, *, world_size: int, host: str = LOOPBACK, **more: object
) -> dict[str, str]:
    """The environment that makes a node a worker of the head at `host`."""
    variables = {
        "MISTRALRS_MN_GLOBAL_WORLD_SIZE": world_size,
        "MISTRALRS_MN_WORKER_ID": worker_id,
        "MISTRALRS_MN_WORKER_SERVER_ADDR": f"{host}:{port}",
        **more,
    }
    return {name: str(value) for name, value in variables.items()}


def two_nodes(processes: Processes, model: Path, **more: object) -> tuple[NodeProcess, NodeProcess]:
    """A head and a worker with one rank each, ready. `more` are variables of both."""
    port = free_port()
    head = processes.serve("head", model, head_variables(port, world_size=2, num_workers=1, **more))
    worker = processes.serve("worker-0", model, worker_variables(0, port, world_size=2, **more))
    return head.wait_ready(), worker.wait_ready()


def clean_environment() -> dict[str, str]:
    """This process's environment without anything that tpdist or torchrun would read. One thread a rank."""
    ours = ("TPDIST_", "MISTRALRS_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "TPDIST_THREADS": "1", "TPDIST_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    """A port of loopback and of all other addresses that nobody listens on."""
    return next(port for port in _candidates() if _can_bind(port))


def _candidates() -> Iterator[int]:
    ports = LAST_PORT - FIRST_PORT
    start = uuid.uuid4().int % ports
    return (FIRST_PORT + (start + step) % ports for step in itertools.count())


def _can_bind(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError:
            return False
        return True


def marked_processes(mark: str) -> list[int]:
    """Every living process that was started with this mark in its environment."""
    wanted = f"{MARK}={mark}".encode()
    return [pid for pid in _pids() if wanted in _read(f"/proc/{pid}/environ").split(b"\0")]


def command_line(pid: int) -> str:
    return _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace")


def _in_use(path: Path) -> bool:
    """Whether some process maps a file: then it is of another program that runs on this machine."""
    return any(str(path).encode() in _read(f"/proc/{pid}/maps") for pid in _pids())


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
