"""What is killed takes the cluster with it, quickly: every node ends with 6 and the first cause, every client is told.

The bound is the silence after which a node is lost, and what it takes to notice and to end; a rank is missed at once,
since its agent watches it.
"""

import os
import signal
from pathlib import Path

import pytest

from e2e.clients import Stream
from e2e.cluster import QUICK_LOSS, NodeProcess, Processes, two_nodes

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NODE_LOST_S = float(QUICK_LOSS["TPDIST_NODE_LOST_S"])
RANK_BOUND_S = 8.0
"""Agents ask the ranks that are left to end, and give them five seconds."""
HANG_TIMEOUT_S = 4
HANG_BOUND_S = HANG_TIMEOUT_S + 12.0
"""A stopped process does not end when it is asked to: after five seconds it is killed."""
NODE_BOUND_S = NODE_LOST_S + 10.0
"""After the silence: five seconds for ranks to end, and five in which the head waits for a node's goodbye."""


class Running:
    """A head and a worker, each with a stream that will not end by itself."""

    def __init__(self, processes: Processes, model: Path) -> None:
        self.processes = processes
        self.head, self.worker = two_nodes(processes, model, **QUICK_LOSS, TPDIST_HANG_TIMEOUT_S=HANG_TIMEOUT_S)
        ranks = [rank for node in self.head.cluster()["nodes"] for rank in node["ranks"]]
        self.pids: dict[int, int] = {rank["rank"]: rank["pid"] for rank in ranks}
        self.streams = [Stream(node, [1, 2, 3], max_tokens=4000) for node in (self.head, self.worker)]
        for stream in self.streams:
            stream.wait_first()

    def survivors_end(self, *, within_s: float) -> None:
        """Every node that was not killed ends with 6 in time, and every client learns that something went wrong."""
        codes = self.processes.exit_codes(within_s)
        assert set(codes.values()) == {6}, f"{codes}\n{self.processes.logs()}"
        for stream in self.streams:
            stream.finish(timeout_s=5)
            assert stream.error
            assert not stream.done


@pytest.fixture
def running(processes: Processes, model: Path) -> Running:
    return Running(processes, model)


def test_a_killed_rank_0_ends_both_nodes(running: Running) -> None:
    os.kill(running.pids[0], signal.SIGKILL)
    running.survivors_end(within_s=RANK_BOUND_S)
    told_the_cause(running.head, "rank 0 on head", "SIGKILL")
    told_the_cause(running.worker, "rank 0 on head", "SIGKILL")
    assert all("rank 0 on head" in stream.error for stream in running.streams)


def test_a_killed_rank_of_the_worker_ends_both_nodes(running: Running) -> None:
    os.kill(running.pids[1], signal.SIGKILL)
    running.survivors_end(within_s=RANK_BOUND_S)
    told_the_cause(running.head, "rank 1 on worker 0", "SIGKILL")
    told_the_cause(running.worker, "rank 1 on worker 0", "SIGKILL")
    assert all("rank 1 on worker 0" in stream.error for stream in running.streams)


def test_a_killed_worker_agent_ends_the_head(running: Running) -> None:
    running.worker.kill()
    running.survivors_end(within_s=NODE_BOUND_S)
    told_the_cause(running.head, "worker 0", "lost")
    assert "worker 0" in running.streams[0].error


def test_a_killed_head_agent_ends_the_worker(running: Running) -> None:
    running.head.kill()
    running.survivors_end(within_s=NODE_BOUND_S)
    told_the_cause(running.worker, "the head", "not been heard")
    assert "head" in running.streams[1].error


def test_a_stopped_worker_agent_is_lost_like_a_dead_one(running: Running) -> None:
    """After SIGSTOP its connections stay open and its rank goes on: only the silence tells. Woken up, it ends too."""
    running.worker.send(signal.SIGSTOP)
    assert running.head.wait(NODE_BOUND_S) == 6
    told_the_cause(running.head, "worker 0", "not been heard", f"TPDIST_NODE_LOST_S={NODE_LOST_S:g}")
    running.worker.send(signal.SIGCONT)
    assert running.worker.wait(NODE_BOUND_S) == 6


def test_a_rank_that_hangs_in_a_step_ends_both_nodes(running: Running) -> None:
    os.kill(running.pids[1], signal.SIGSTOP)
    running.survivors_end(within_s=HANG_BOUND_S)
    told_the_cause(running.head, "has not come within")
    told_the_cause(running.worker, "has not come within")


def test_a_rank_0_that_hangs_before_a_step_ends_both_nodes(processes: Processes, model: Path) -> None:
    """No collective runs that could fail: the head sees a request without progress."""
    head, worker = two_nodes(processes, model, **QUICK_LOSS, TPDIST_HANG_TIMEOUT_S=HANG_TIMEOUT_S)
    os.kill(head.cluster()["nodes"][0]["ranks"][0]["pid"], signal.SIGSTOP)
    stream = Stream(worker, [1, 2, 3], max_tokens=5)
    assert processes.exit_codes(HANG_BOUND_S) == {"head": 6, "worker-0": 6}
    assert "rank 0" in stream.finish().error
    told_the_cause(head, "rank 0", f"TPDIST_HANG_TIMEOUT_S={HANG_TIMEOUT_S}")
    told_the_cause(worker, "rank 0", f"TPDIST_HANG_TIMEOUT_S={HANG_TIMEOUT_S}")


def told_the_cause(node: NodeProcess, *texts: str) -> None:
    """The node's last words name the first cause; there is no traceback."""
    error = node.log[node.log.index("error: ") :]
    assert not [text for text in texts if text not in error], node.log
    assert "Traceback" not in node.log, node.log
