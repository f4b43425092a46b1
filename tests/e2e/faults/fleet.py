"""A cluster that things are done to: nodes by name that can be killed and started again, and what is measured then."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from e2e.cluster import POLL_S, NodeProcess, Processes, free_port, head_variables, worker_variables
from e2e.faults.traffic import Prompt, Traffic

NODE_LOST_S = 3.0
HANG_TIMEOUT_S = 5.0
SETTINGS = {
    "TPDIST_NODE_LOST_S": NODE_LOST_S,
    "TPDIST_HEARTBEAT_INTERVAL_S": 0.5,
    "TPDIST_HANG_TIMEOUT_S": HANG_TIMEOUT_S,
    "TPDIST_MAX_RESTARTS": 1000,
    "TPDIST_KV_CACHE_MEMORY_BYTES": "16MiB",
    "TPDIST_MAX_NUM_SEQS": 12,
}
"""Of sixteen clients four wait for their turn, and have no token yet when something happens."""
READY_S = 60.0
BOUND_S = 25.0
"""No client waits longer than this for a byte, whatever happens; nor does the cluster take longer to serve again."""


@dataclass(frozen=True)
class Figures:
    """What one fault did. Seconds count from the fault."""

    case: str
    detected_s: float | None
    recovered_s: float
    answered: int
    failed: int
    refused: int
    retried: int
    wrong: int
    hung: int
    longest_wait_s: float


class Fleet:
    """A head and its workers, one rank each. `head_port_of`: where a worker finds the head if not on its port."""

    def __init__(
        self,
        processes: Processes,
        model: Path,
        answers: Mapping[Prompt, Sequence[int]],
        *,
        num_workers: int = 2,
        settings: Mapping[str, object] | None = None,
        where: Mapping[str, tuple[str, tuple[str, ...]]] | None = None,
    ) -> None:
        """`where`: the address of each node's machine, and what is put before a command to run it there."""
        self.processes = processes
        self.model = model
        self.answers = answers
        self.nodes: dict[str, NodeProcess] = {}
        self.settings = {**SETTINGS, **(settings or {})}
        self.head_port = free_port()
        self._num_workers = num_workers
        self._where = where or {}
        self._num_started = 0
        self.head_port_of: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return ["head", *(f"worker-{index}" for index in range(self._num_workers))]

    def start(self, name: str, **more: object) -> NodeProcess:
        """Start a node, for the first time or again."""
        world_size = self._num_workers + 1
        address, prefix = self._where.get(name, ("127.0.0.1", ()))
        settings = {**self.settings, "TPDIST_HOST": address, **more}
        if name == "head":
            variables = head_variables(self.head_port, world_size=world_size, num_workers=self._num_workers, **settings)
        else:
            head = self._where.get("head", ("127.0.0.1", ()))[0]
            index = int(name.removeprefix("worker-"))
            port = self.head_port_of.get(name, self.head_port)
            variables = worker_variables(index, port, world_size=world_size, host=head, **settings)
        if name in self.nodes:
            # The same address as before, so that clients find it again.
            variables["TPDIST_PORT"] = self.nodes[name].url.rpartition(":")[2]
        self._num_started += 1
        self.nodes[name] = self.processes.serve(f"{name}.{self._num_started}", self.model, variables, prefix=prefix)
        return self.nodes[name]

    def start_standby(self) -> NodeProcess:
        """A worker without a place."""
        variables = worker_variables(0, self.head_port, world_size=self._num_workers + 1, **self.settings)
        del variables["MISTRALRS_MN_WORKER_ID"]
        return self.processes.serve("standby", self.model, {**variables, "TPDIST_STANDBY": "1"})

    def start_all(self) -> None:
        for name in self.names:
            self.start(name)
        for name in self.names:
            self.nodes[name].wait_ready(READY_S)

    def rank_pid(self, rank: int) -> int:
        ranks = {each["rank"]: each["pid"] for node in self.nodes["head"].cluster()["nodes"] for each in node["ranks"]}
        pid: int = ranks[rank]
        return pid

    def restart(self, name: str) -> None:
        """Start a node again after it has ended, as a service manager would."""
        self.nodes[name].wait(BOUND_S)
        self.start(name)

    @property
    def epoch(self) -> int:
        epoch: int = self.nodes["head"].cluster()["epoch"]
        return epoch

    @property
    def last_cause(self) -> str:
        """Why the last epoch ended."""
        cause: str = self.nodes["head"].cluster()["restarts"][-1]["cause"]
        return cause

    def end(self) -> None:
        """SIGTERM to the head ends all nodes with 0."""
        self.nodes["head"].send(signal.SIGTERM)
        codes = {name: node.wait() for name, node in self.nodes.items()}
        assert set(codes.values()) == {0}, f"{codes}\n{self.processes.logs()}"

    def wait_heartbeats(self, name: str, *, seconds: float) -> None:
        """Let time pass in which the head goes on hearing a node."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            seen = {node["node_id"]: node["last_seen_s"] for node in self.nodes["head"].cluster()["nodes"]}
            assert seen[name] < NODE_LOST_S
            time.sleep(POLL_S)

    def traffic(self, names: Sequence[str] | None = None) -> Traffic:
        return Traffic(
            self.answers,
            names=names or self.names,
            url_of=lambda name: self.nodes[name].url,
            model_name=str(self.model),
            bound_s=BOUND_S,
        )

    def measure(
        self,
        case: str,
        fault: Callable[[], None],
        *,
        repair: Callable[[], None] | None = None,
        watched: Sequence[str] | None = None,
        clients_of: Sequence[str] | None = None,
    ) -> Figures:
        """Do `fault` while clients stream, `repair` once it is noticed on one of the `watched` nodes, and wait until
        all nodes serve again. Nobody may be told anything wrong, or wait for longer than the bound."""
        retried = self._num_retried()
        with self.traffic(clients_of) as traffic, self._watch(watched or self.names) as noticed:
            traffic.wait_flowing()
            started = time.monotonic()
            fault()
            assert noticed.wait(BOUND_S), f"{case}: nobody noticed\n{self.processes.logs()}"
            detected_s = time.monotonic() - started
            if repair is not None:
                repair()
            self.wait_serving(started + BOUND_S)
            recovered_s = time.monotonic() - started
        tally = traffic.tally
        outcomes = tally.outcomes
        assert not tally.notes, f"{case}: {tally}\n{self.processes.logs()}"
        return Figures(
            case=case,
            detected_s=round(detected_s, 1),
            recovered_s=round(recovered_s, 1),
            answered=outcomes["answered"],
            failed=outcomes["failed"],
            refused=outcomes["refused"],
            retried=max(0, self._num_retried() - retried),
            wrong=outcomes["wrong"],
            hung=outcomes["hung"],
            longest_wait_s=round(tally.longest_wait_s, 1),
        )

    def wait_serving(self, deadline: float) -> None:
        """Return once every node gives the right answer."""
        for name in self.names:
            while not self._serves(name):
                assert time.monotonic() < deadline, f"{name} does not serve again\n{self.processes.logs()}"
                time.sleep(POLL_S)

    def _serves(self, name: str) -> bool:
        prompt, expected = next(iter(self.answers.items()))
        body = {"model": str(self.model), "prompt": list(prompt), "max_tokens": 4, "ignore_eos": True}
        body |= {"temperature": 0, "return_token_ids": True}
        try:
            response = self.nodes[name].post("/v1/completions", body)
        except httpx.TransportError:
            return False
        if response.status_code != 200:
            return False
        tokens = response.json()["choices"][0]["token_ids"]
        assert tokens == list(expected[:4]), f"{name} gave {tokens} instead of {expected[:4]}"
        return True

    def _num_retried(self) -> int:
        return int(self.nodes["head"].metric("tpdist_request_retries_total"))

    @contextmanager
    def _watch(self, names: Sequence[str]) -> Iterator[threading.Event]:
        """Set once one of the nodes says that it does not serve, or is gone."""
        noticed, stop = threading.Event(), threading.Event()
        urls = [f"{self.nodes[name].url}/readyz" for name in names]

        def look() -> None:
            with httpx.Client(trust_env=False, timeout=BOUND_S) as http:
                while not stop.wait(POLL_S / 2):
                    for url in urls:
                        if not _is_ready(http, url):
                            noticed.set()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield noticed
        finally:
            stop.set()
            thread.join(2 * BOUND_S)


def _is_ready(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(url).status_code == 200
    except httpx.TransportError:
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def wake(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)
