"""How a cluster ends when somebody wants it to: a drain finishes what runs, Ctrl-C does not wait, nothing is left."""

import signal
from pathlib import Path

import httpx
import pytest

from e2e.clients import Stream
from e2e.cluster import READY_S, NodeProcess, Processes, free_port, head_variables, two_nodes, worker_variables

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_TOKENS = 150
INTERRUPT_BOUND_S = 10.0


def test_sigterm_on_the_head_lets_running_streams_finish(processes: Processes, model: Path) -> None:
    head, worker = two_nodes(processes, model)
    streams = [Stream(node, [1, 2, 3], max_tokens=NUM_TOKENS).wait_first() for node in (head, worker)]
    head.send(signal.SIGTERM)
    for stream in streams:
        stream.finish()
        assert stream.done
        assert len(stream.token_ids) == NUM_TOKENS
    assert processes.exit_codes() == {"head": 0, "worker-0": 0}


def test_sigterm_on_a_worker_drains_the_whole_cluster(processes: Processes, model: Path) -> None:
    head, worker = two_nodes(processes, model)
    stream = Stream(head, [1, 2, 3], max_tokens=NUM_TOKENS).wait_first()
    worker.send(signal.SIGTERM)
    worker.wait_until(lambda: worker.get("/readyz").status_code == 503, "stays ready", timeout_s=5)
    refused = head.post("/v1/completions", {"model": str(model), "prompt": "late", "max_tokens": 1})
    assert refused.status_code == 503
    assert "draining" in refused.json()["error"]["message"]
    assert stream.finish().done
    assert processes.exit_codes() == {"head": 0, "worker-0": 0}


def test_a_drain_that_takes_too_long_is_cut_off(processes: Processes, model: Path) -> None:
    head, worker = two_nodes(processes, model, TPDIST_SHUTDOWN_TIMEOUT_S=1)
    stream = Stream(worker, [1, 2, 3], max_tokens=4000).wait_first()
    head.send(signal.SIGTERM)
    assert processes.exit_codes() == {"head": 0, "worker-0": 0}
    assert not stream.finish().done
    assert "ended" in stream.error


def test_ctrl_c_ends_both_nodes_without_waiting(processes: Processes, model: Path) -> None:
    head, worker = two_nodes(processes, model)
    stream = Stream(worker, [1, 2, 3], max_tokens=4000).wait_first()
    head.send(signal.SIGINT)
    assert processes.exit_codes(INTERRUPT_BOUND_S) == {"head": 130, "worker-0": 130}
    assert stream.finish().error
    assert "Traceback" not in processes.logs()


def test_a_second_sigterm_ends_the_node_at_once(processes: Processes, model: Path) -> None:
    node = processes.serve("single", model).wait_ready()
    stream = Stream(node, [1, 2, 3], max_tokens=4000).wait_first()
    node.send(signal.SIGTERM)
    node.wait_for_log("draining")
    node.send(signal.SIGTERM)
    assert node.wait(INTERRUPT_BOUND_S) != 0
    assert stream.finish().error


def test_drain_over_http_ends_the_cluster(processes: Processes, model: Path) -> None:
    node = processes.serve("single", model).wait_ready()
    assert node.post("/v1/cluster/drain", {"reason": "maintenance"}).status_code == 202
    assert node.wait(INTERRUPT_BOUND_S) == 0
    with pytest.raises(httpx.ConnectError):
        node.get("/livez")


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_head_that_waits_for_its_worker_can_be_stopped(
    processes: Processes, model: Path, number: signal.Signals, exit_code: int
) -> None:
    variables = head_variables(free_port(), world_size=2, num_workers=1)
    head = processes.serve("head", model, variables).wait_for_log("HTTP on")
    head.send(number)
    assert head.wait(INTERRUPT_BOUND_S) == exit_code


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_worker_that_waits_for_its_head_can_be_stopped(
    processes: Processes, model: Path, number: signal.Signals, exit_code: int
) -> None:
    variables = worker_variables(0, free_port(), world_size=2)
    worker = processes.serve("worker-0", model, variables).wait_for_log("HTTP on")
    worker.send(number)
    assert worker.wait(INTERRUPT_BOUND_S) == exit_code


def test_a_worker_that_leaves_while_others_are_awaited_ends_nobody_else(processes: Processes, model: Path) -> None:
    port = free_port()
    head = processes.serve("head", model, head_variables(port, world_size=3, num_workers=2)).wait_for_log("HTTP on")
    worker = processes.serve("worker-0", model, worker_variables(0, port, world_size=3))
    head.wait_until(lambda: node_names(head) == ["head", "worker-0"], "does not see the worker", timeout_s=READY_S)
    worker.send(signal.SIGTERM)
    assert worker.wait(INTERRUPT_BOUND_S) == 0
    assert head.get("/readyz").json()["phase"] == "register"
    again = processes.serve("worker-0-again", model, worker_variables(0, port, world_size=3))
    head.wait_until(lambda: again.pid in node_pids(head), "does not take the next one", timeout_s=READY_S)
    head.send(signal.SIGTERM)
    assert set(processes.exit_codes().values()) == {0}


def node_names(node: NodeProcess) -> list[str]:
    return [entry["node_id"] for entry in node.cluster()["nodes"]]


def node_pids(node: NodeProcess) -> list[int]:
    return [entry["pid"] for entry in node.cluster()["nodes"]]
