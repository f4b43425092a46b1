"""Where there is nothing to recover with, the cluster ends on all nodes with the code and the history of causes; and
nothing outlives an agent."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from e2e.clients import Stream
from e2e.cluster import CLEAN_S, POLL_S, Processes, marked_processes, two_nodes
from e2e.faults.fleet import Fleet, kill
from e2e.faults.traffic import Prompt

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

END_S = 15.0


def fleet_of(
    processes: Processes, model: Path, answers: dict[Prompt, Sequence[int]], *, num_workers: int, **settings: object
) -> Fleet:
    fleet = Fleet(processes, model, answers, num_workers=num_workers, settings=settings)
    fleet.start_all()
    return fleet


def test_a_spent_budget_of_restarts_ends_all_nodes_with_the_history(
    processes: Processes, model: Path, answers: dict[Prompt, Sequence[int]]
) -> None:
    fleet = fleet_of(processes, model, answers, num_workers=1, TPDIST_MAX_RESTARTS=1)
    fleet.measure("kill -9 of rank 0", lambda: kill(fleet.rank_pid(0)))
    stream = Stream(fleet.nodes["worker-0"], [1, 2, 3], max_tokens=4000).wait_first()
    kill(fleet.rank_pid(1))
    assert processes.exit_codes(END_S) == {"head.1": 6, "worker-0.2": 6}
    assert "rank 1 on worker 0" in stream.finish().error
    for node in processes.nodes:
        last_words = node.log[node.log.index("error: ") :]
        assert "rank 1 on worker 0" in last_words
        assert "no restart is left: 1 in the last hour (TPDIST_MAX_RESTARTS=1)" in last_words
        assert "epoch 1: rank 0 on head" in last_words
        assert "Traceback" not in node.log


@pytest.mark.parametrize("victim", ["rank 1", "worker agent", "head agent"])
def test_without_restarts_the_first_loss_ends_every_node(processes: Processes, model: Path, victim: str) -> None:
    head, worker = two_nodes(processes, model, TPDIST_MAX_RESTARTS=0, TPDIST_NODE_LOST_S=3)
    streams = [Stream(node, [1, 2, 3], max_tokens=4000).wait_first() for node in (head, worker)]
    if victim == "rank 1":
        kill(head.cluster()["nodes"][1]["ranks"][0]["pid"])
    else:
        (worker if victim == "worker agent" else head).kill()
    assert set(processes.exit_codes(END_S).values()) == {6}
    for stream in streams:
        assert stream.finish(timeout_s=5).error
    named = {"rank 1": "rank 1 on worker 0", "worker agent": "worker 0", "head agent": "the head"}[victim]
    for node in processes.nodes:
        assert node.killed or named in node.log[node.log.index("error: ") :]


@pytest.mark.parametrize("victim", ["head", "worker-0"])
def test_no_process_outlives_a_killed_agent(processes: Processes, model: Path, victim: str) -> None:
    head, worker = two_nodes(processes, model, TPDIST_MAX_RESTARTS=0, TPDIST_NODE_LOST_S=3)
    node = head if victim == "head" else worker
    nodes = head.cluster()["nodes"]
    ranks = [rank["pid"] for each in nodes if each["node_id"] == victim for rank in each["ranks"]]
    assert set(ranks) <= set(marked_processes(processes.mark))
    node.kill()
    deadline = time.monotonic() + CLEAN_S
    while set(ranks) & set(marked_processes(processes.mark)):
        assert time.monotonic() < deadline, "a rank lives on without its agent"
        time.sleep(POLL_S)
    processes.exit_codes(END_S)


def test_sigterm_while_the_cluster_recovers_ends_all_nodes_with_0(
    processes: Processes, model: Path, answers: dict[Prompt, Sequence[int]]
) -> None:
    fleet = fleet_of(processes, model, answers, num_workers=1)
    kill(fleet.rank_pid(1))
    head = fleet.nodes["head"]
    head.wait_until(lambda: head.cluster()["state"] == "recovering", "does not recover", timeout_s=END_S)
    fleet.nodes["worker-0"].send(signal.SIGTERM)
    assert set(processes.exit_codes(END_S).values()) == {0}


def test_a_standby_takes_the_place_of_a_lost_worker(
    processes: Processes, model: Path, answers: dict[Prompt, Sequence[int]]
) -> None:
    fleet = fleet_of(processes, model, answers, num_workers=1)
    standby = fleet.start_standby()
    standby.wait_ready()
    lost = fleet.nodes["worker-0"]
    fleet.nodes["worker-0"] = standby
    figures = fleet.measure(
        "kill -9 of a worker agent, a standby takes over", lost.kill, watched=["head"], clients_of=["head"]
    )
    assert figures.answered
    shown = {node["node_id"]: node["pid"] for node in fleet.nodes["head"].cluster()["nodes"]}
    assert shown["worker-0"] == standby.pid
    os.kill(standby.pid, signal.SIGTERM)
    assert set(processes.exit_codes(END_S).values()) == {0}
