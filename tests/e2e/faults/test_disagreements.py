"""Nodes that cannot mean what they were told: every one of them ends, soon, with the variables and the numbers.

What one node can see by itself ends with 2 before anything starts; what only the head can see ends all nodes with 5.
"""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from e2e.clients import completed_tokens
from e2e.cluster import LOOPBACK, Processes, free_port, head_variables, worker_variables

OTHER_RELEASE = """
import importlib.metadata as metadata

real = metadata.version
metadata.version = lambda name: "0.0.9" if name == "tpdist" else real(name)
"""
"""Python runs it at its start: this node says that another release is installed."""

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EARLY_S = 30.0
AT_ONCE_S = 20.0
SOON_S = 30.0


def refused(processes: Processes, model: Path, variables: dict[str, str], *, exit_code: int = 2) -> str:
    """What one node says that ends at once. It has started nothing, and shows no traceback."""
    node = processes.serve("node", model, variables)
    assert node.wait(AT_ONCE_S) == exit_code, node.log
    assert "Traceback" not in node.log
    return node.log


# -- seen by one node -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        pytest.param(
            {"MISTRALRS_MN_HEAD_NUM_WORKERS": "1"},
            ["MISTRALRS_MN_HEAD_NUM_WORKERS=1", "MISTRALRS_MN_GLOBAL_WORLD_SIZE", "MISTRALRS_MN_HEAD_PORT"],
            id="half of the head's variables",
        ),
        pytest.param(
            {"MISTRALRS_MN_WORKER_ID": "0", "MISTRALRS_MN_GLOBAL_WORLD_SIZE": "2"},
            ["MISTRALRS_MN_WORKER_ID=0", "MISTRALRS_MN_WORKER_SERVER_ADDR"],
            id="half of a worker's variables",
        ),
        pytest.param(
            {**head_variables(5555, world_size=2, num_workers=1), "MISTRALRS_MN_WORKER_ID": "0"},
            ["MISTRALRS_MN_HEAD_NUM_WORKERS=1", "MISTRALRS_MN_WORKER_ID=0"],
            id="both roles",
        ),
        pytest.param(
            {"MISTRALRS_MN_GLOBAL_WORLD_SIZE": "2"},
            ["MISTRALRS_MN_GLOBAL_WORLD_SIZE=2", "MISTRALRS_MN_HEAD_NUM_WORKERS", "MISTRALRS_MN_WORKER_ID"],
            id="a size without a role",
        ),
        pytest.param(
            head_variables(70000, world_size=2, num_workers=1), ["MISTRALRS_MN_HEAD_PORT=70000", "65535"], id="bad port"
        ),
        pytest.param(
            {"MISTRALRS_NO_NCCL": "1", **head_variables(5555, world_size=2, num_workers=1)},
            ["MISTRALRS_NO_NCCL=1", "MISTRALRS_MN_GLOBAL_WORLD_SIZE=2"],
            id="device mapping on several nodes",
        ),
    ],
)
def test_a_role_that_does_not_add_up_is_wrong_usage(
    processes: Processes, model: Path, variables: dict[str, str], named: list[str]
) -> None:
    log = refused(processes, model, variables)
    assert not [text for text in named if text not in log], log


def test_an_http_port_that_is_taken_is_wrong_usage(processes: Processes, model: Path) -> None:
    with taken_port() as port:
        log = refused(processes, model, {"TPDIST_PORT": str(port)})
    assert f"{LOOPBACK}:{port}" in log


def test_a_head_port_that_is_taken_is_wrong_usage(processes: Processes, model: Path) -> None:
    with taken_port() as listener_port:
        log = refused(processes, model, head_variables(listener_port, world_size=2, num_workers=1))
    assert str(listener_port) in log
    assert "taken" in log


def test_a_key_that_others_may_read_is_wrong_usage(processes: Processes, model: Path, tmp_path: Path) -> None:
    key = tmp_path / "cluster.key"
    key.write_text("00" * 32)
    key.chmod(0o644)
    log = refused(processes, model, head_variables(5555, world_size=2, num_workers=1, TPDIST_KEY_FILE=key))
    assert str(key) in log


def test_a_misspelt_variable_is_named_with_the_nearest(processes: Processes, model: Path) -> None:
    log = refused(processes, model, {"MISTRALRS_MN_HEADPORT": "5555"})
    assert "MISTRALRS_MN_HEADPORT is not a variable" in log
    assert "MISTRALRS_MN_HEAD_PORT" in log


# -- seen by the head -------------------------------------------------------------------------------------------------


def all_end_with_5(processes: Processes) -> str:
    """Wait for every node to end as disagreeing; returns their logs. No rank was started, and there is no traceback."""
    codes = processes.exit_codes(SOON_S)
    assert set(codes.values()) == {5}, f"{codes}\n{processes.logs()}"
    assert "rank=" not in processes.logs()
    assert "Traceback" not in processes.logs()
    return processes.logs()


def each_names(processes: Processes, *texts: str) -> None:
    for node in processes.nodes:
        missing = [text for text in texts if text not in node.log]
        assert not missing, f"{node.name} does not name {missing}\n{node.log}"


def test_sizes_that_do_not_sum_to_the_global_size_end_every_node(processes: Processes, model: Path) -> None:
    port, local = free_port(), "MISTRALRS_MN_LOCAL_WORLD_SIZE"
    processes.serve("head", model, head_variables(port, world_size=4, num_workers=1, **{local: 1}))
    processes.serve("worker-0", model, worker_variables(0, port, world_size=4, **{local: 2}))
    all_end_with_5(processes)
    each_names(processes, "4", "1", "2", "WORLD_SIZE")


def test_different_global_sizes_end_every_node(processes: Processes, model: Path) -> None:
    port = free_port()
    processes.serve("head", model, head_variables(port, world_size=2, num_workers=1))
    processes.serve("worker-0", model, worker_variables(0, port, world_size=3))
    all_end_with_5(processes)
    each_names(processes, "MISTRALRS_MN_GLOBAL_WORLD_SIZE is 3 on worker 0", "2 on the head")


def test_a_worker_id_beyond_the_heads_workers_ends_every_node(processes: Processes, model: Path) -> None:
    port = free_port()
    processes.serve("head", model, head_variables(port, world_size=4, num_workers=1)).wait_for_log("HTTP on")
    processes.serve("worker-1", model, worker_variables(1, port, world_size=4))
    processes.serve("worker-2", model, worker_variables(2, port, world_size=4, TPDIST_REGISTER_TIMEOUT_S=15))
    codes = processes.exit_codes(SOON_S)
    assert set(codes.values()) == {5}, f"{codes}\n{processes.logs()}"
    head, first, _ = processes.nodes
    assert all("MISTRALRS_MN_HEAD_NUM_WORKERS=1" in node.log for node in (head, first)), processes.logs()


def test_a_setting_of_a_worker_that_differs_from_the_heads_ends_every_node(processes: Processes, model: Path) -> None:
    port = free_port()
    processes.serve("head", model, head_variables(port, world_size=2, num_workers=1))
    processes.serve("worker-0", model, worker_variables(0, port, world_size=2, TPDIST_BLOCK_SIZE=32))
    all_end_with_5(processes)
    each_names(processes, "block_size", "head=16", "worker 0=32")


def test_another_model_on_one_node_ends_every_node(processes: Processes, model: Path, tmp_path: Path) -> None:
    fine_tuned = make_checkpoint(
        tmp_path / "other",
        tokenizer=True,
        seed=1,
        hidden_size=96,
        head_dim=8,
        num_attention_heads=12,
        num_hidden_layers=2,
        max_position_embeddings=4096,
    )
    port = free_port()
    processes.serve("head", model, head_variables(port, world_size=2, num_workers=1))
    processes.serve("worker-0", fine_tuned, worker_variables(0, port, world_size=2))
    log = all_end_with_5(processes)
    each_names(processes, "model.safetensors")
    assert "config.json" not in log, "only the weights differ"


@pytest.mark.parametrize("damaged", ["head", "worker-0"])
def test_a_truncated_checkpoint_on_one_node_ends_every_node_with_its_file(
    processes: Processes, model: Path, tmp_path: Path, damaged: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    port = free_port()
    variables = {
        "head": head_variables(port, world_size=2, num_workers=1),
        "worker-0": worker_variables(0, port, world_size=2),
    }
    for name, values in variables.items():
        processes.serve(name, folder if name == damaged else model, values)
    assert processes.exit_codes(AT_ONCE_S) == {"head": 4, "worker-0": 4}, processes.logs()
    each_names(processes, str(weights))
    assert "Traceback" not in processes.logs()


def test_another_release_on_one_node_ends_every_node(processes: Processes, model: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(OTHER_RELEASE)
    port = free_port()
    processes.serve("head", model, head_variables(port, world_size=2, num_workers=1))
    processes.serve("worker-0", model, worker_variables(0, port, world_size=2, PYTHONPATH=tmp_path))
    all_end_with_5(processes)
    each_names(processes, "tpdist", "worker 0=0.0.9")


def test_a_missing_worker_is_named_when_time_is_up(processes: Processes, model: Path) -> None:
    port, deadline = free_port(), {"TPDIST_REGISTER_TIMEOUT_S": 3}
    processes.serve("head", model, head_variables(port, world_size=3, num_workers=2, **deadline))
    processes.serve("worker-0", model, worker_variables(0, port, world_size=3))
    all_end_with_5(processes)
    each_names(processes, "TPDIST_REGISTER_TIMEOUT_S", "worker 1: missing")


def test_a_worker_without_a_head_says_where_it_looked(processes: Processes, model: Path) -> None:
    port = free_port()
    log = refused(processes, model, worker_variables(0, port, world_size=2, TPDIST_REGISTER_TIMEOUT_S=2), exit_code=5)
    assert f"no head answered at tcp://{LOOPBACK}:{port}" in log


# -- when the cluster runs already ------------------------------------------------------------------------------------


def test_a_worker_too_many_ends_and_the_cluster_goes_on(
    three_nodes: Processes, processes: Processes, model: Path
) -> None:
    late = worker_variables(2, control_port(three_nodes), world_size=3)
    log = refused(processes, model, late, exit_code=5)
    assert "MISTRALRS_MN_HEAD_NUM_WORKERS=2" in log
    assert_it_serves(three_nodes)


def test_a_second_instance_of_a_worker_waits_and_the_cluster_goes_on(
    three_nodes: Processes, processes: Processes, model: Path
) -> None:
    twin = worker_variables(0, control_port(three_nodes), world_size=3, TPDIST_REGISTER_TIMEOUT_S=4)
    log = refused(processes, model, twin, exit_code=5)
    assert "waiting to join: worker 0 is already here" in log
    assert_it_serves(three_nodes)


def test_a_second_head_ends_and_the_cluster_goes_on(three_nodes: Processes, processes: Processes, model: Path) -> None:
    log = refused(processes, model, head_variables(control_port(three_nodes), world_size=3, num_workers=2))
    assert "is taken by another process" in log
    assert_it_serves(three_nodes)


def test_a_late_worker_with_another_size_ends_and_the_cluster_goes_on(
    three_nodes: Processes, processes: Processes, model: Path
) -> None:
    late = worker_variables(1, control_port(three_nodes), world_size=5)
    log = refused(processes, model, late, exit_code=5)
    assert "MISTRALRS_MN_GLOBAL_WORLD_SIZE is 5 on worker 1" in log
    assert_it_serves(three_nodes)


def control_port(cluster: Processes) -> int:
    """The head's control port, as its log names it."""
    head = next(node for node in cluster.nodes if node.name == "head")
    return int(head.log.partition(f"control plane on {LOOPBACK}:")[2].partition(",")[0])


def assert_it_serves(cluster: Processes) -> None:
    answers = [completed_tokens(node, [1, 2, 3], 4) for node in cluster.nodes]
    assert answers == [answers[0]] * len(answers)


class EarlyWorker:
    """A worker that waits for its head while the other tests of this file run."""

    def __init__(self, model: Path) -> None:
        self.processes = Processes()
        self.port = free_port()
        self.started_s = time.monotonic()
        self.node = self.processes.serve("worker-0", model, worker_variables(0, self.port, world_size=2))


@pytest.fixture(scope="module", autouse=True)
def early_worker(model: Path) -> Iterator[EarlyWorker]:
    worker = EarlyWorker(model)
    with worker.processes:
        yield worker


def test_a_worker_that_was_started_half_a_minute_before_its_head_joins_it(
    early_worker: EarlyWorker, model: Path
) -> None:
    """The last test of this file, so that there is little left to wait for."""
    time.sleep(max(0.0, EARLY_S - (time.monotonic() - early_worker.started_s)))
    assert early_worker.node.get("/readyz").json()["phase"] == "register"
    head = early_worker.processes.serve("head", model, head_variables(early_worker.port, world_size=2, num_workers=1))
    answers = [completed_tokens(node.wait_ready(), [1, 2, 3], 4) for node in (head, early_worker.node)]
    assert answers[0] == answers[1]
    early_worker.processes.stop()


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield listener.getsockname()[1]
