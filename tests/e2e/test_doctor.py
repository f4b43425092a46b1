"""`tpdist doctor` as its users start it: on one machine, on several, with machines and links that are not there."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import NodeProcess, Processes, free_port, head_variables, worker_variables
from e2e.namespaces import Machine, machines, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DONE_S = 120.0


def examine(
    processes: Processes, name: str, variables: dict[str, str], *words: object, prefix: Sequence[str] = ()
) -> NodeProcess:
    """Start `tpdist doctor --json`."""
    command = [*prefix, sys.executable, "-m", "tpdist", "doctor", "--json", *map(str, words)]
    return processes.run(name, command, variables)


def diagnosis(node: NodeProcess) -> Any:
    """The JSON object that a doctor printed, behind what it said on stderr."""
    return json.loads(next(line for line in node.log.splitlines() if line.startswith("{")))


def red_lines(node: NodeProcess) -> list[dict[str, Any]]:
    return [line for line in diagnosis(node)["lines"] if line["state"] == "red"]


def test_a_machine_alone_adds_up_over_its_own_ranks(processes: Processes, model: Path) -> None:
    node = examine(processes, "alone", {}, model)
    assert node.wait(DONE_S) == 0, node.log
    found = diagnosis(node)
    assert found["exit_code"] == 0
    checks = {line["check"]: line["state"] for line in found["lines"]}
    assert checks["model"] == checks["gloo all-reduce"] == "green"
    assert found["examination"]["reduces"][0]["world_size"] == 2


def test_two_nodes_say_the_same_and_what_should_cross_their_link(
    processes: Processes, model: Path, tmp_path: Path
) -> None:
    port, inventory = free_port(), tmp_path / "found.toml"
    worker = examine(processes, "worker-0", worker_variables(0, port, world_size=2), model)
    head = examine(
        processes,
        "head",
        head_variables(port, world_size=2, num_workers=1),
        *(model, "--write-inventory", inventory),
    )
    assert (head.wait(DONE_S), worker.wait(DONE_S)) == (0, 0), processes.logs()
    assert diagnosis(head) == diagnosis(worker)
    assert "should cross the links between the nodes" in diagnosis(head)["advice"][0]
    assert [(link["source"], link["target"]) for link in diagnosis(head)["examination"]["links"]] == [(0, 1), (1, 0)]
    plan = [sys.executable, "-m", "tpdist", "plan", str(model), "--inventory", str(inventory), "--json"]
    planned = json.loads(subprocess.run(plan, check=True, capture_output=True, timeout=60).stdout)
    assert [each["device"]["node"] for each in planned["devices"]] == ["head", "worker-0"]


def test_a_worker_without_a_head_and_a_head_without_a_worker_end_with_5(processes: Processes) -> None:
    worker = examine(processes, "worker-0", worker_variables(0, free_port(), world_size=2), "--timeout-s", 1)
    head = examine(processes, "head", head_variables(free_port(), world_size=2, num_workers=1), "--timeout-s", 1)
    assert (worker.wait(DONE_S), head.wait(DONE_S)) == (5, 5), processes.logs()
    assert [(line["check"], line["where"]) for line in red_lines(head)] == [("node", "worker 0")]
    assert [line["check"] for line in red_lines(worker)] == ["way to head"]
    assert "refused" in red_lines(worker)[0]["found"]


def test_a_worker_with_another_key_than_its_head_is_told_of_the_key(processes: Processes, tmp_path: Path) -> None:
    port, keys = free_port(), [tmp_path / name for name in ("head.key", "worker.key")]
    for key in keys:
        make_key(key)
    variables = {**head_variables(port, world_size=2, num_workers=1), "TPDIST_KEY_FILE": str(keys[0])}
    head = examine(processes, "head", variables, "--timeout-s", 10).wait_for_log("waiting for 1 workers")
    variables = worker_variables(0, port, world_size=2, TPDIST_KEY_FILE=keys[1])
    worker = examine(processes, "worker-0", variables, "--timeout-s", 15)
    assert (worker.wait(DONE_S), head.wait(DONE_S)) == (5, 5), processes.logs()
    (line,) = red_lines(worker)
    assert "comes about, but no doctor answered" in line["found"]
    assert "the same key" in line["next_step"]


def test_a_control_port_that_is_taken_is_named(processes: Processes) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        head = examine(processes, "head", head_variables(port, world_size=2, num_workers=1))
        assert head.wait(DONE_S) == 2
    assert str(port) in head.log
    assert "`tpdist status`" in head.log


@pytest.fixture(scope="module")
def network() -> Iterator[list[Machine]]:
    if reason := why_not():
        pytest.skip(reason)
    with machines(3) as made:
        yield made


@pytest.mark.netns
def test_a_link_that_drops_packets_is_named_on_every_machine(
    network: list[Machine], processes: Processes, tmp_path: Path
) -> None:
    key, port = tmp_path / "cluster.key", free_port()
    make_key(key)
    lose_packets(network[1], network[2])
    head = {**head_variables(port, world_size=3, num_workers=2), "TPDIST_KEY_FILE": str(key)}
    nodes = [examine(processes, "head", head, prefix=network[0].prefix)]
    for worker_id in range(2):
        variables = worker_variables(worker_id, port, world_size=3, host=network[0].address, TPDIST_KEY_FILE=key)
        prefix = network[worker_id + 1].prefix
        nodes.append(examine(processes, f"worker-{worker_id}", variables, prefix=prefix))
    assert [node.wait(DONE_S) for node in nodes] == [5, 5, 5], processes.logs()
    found = [red_lines(node) for node in nodes]
    assert found[0] == found[1] == found[2]
    assert [line["where"] for line in found[0]] == ["worker 0 to worker 1", "worker 1 to worker 0"]
    assert network[2].address in found[0][0]["found"]
    assert "no answer within 5 s" in found[0][0]["found"]
    assert network[1].address in found[0][0]["next_step"]


@pytest.mark.netns
def test_a_name_of_the_head_that_stands_for_the_worker_itself_is_named(
    network: list[Machine], processes: Processes, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 alpha\n")
    own_hosts = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]
    variables = worker_variables(0, free_port(), world_size=2, host="alpha")
    prefix = [*network[1].prefix, *own_hosts]
    worker = examine(processes, "worker-0", variables, "--timeout-s", 1, prefix=prefix)
    assert worker.wait(DONE_S) == 5, worker.log
    assert [line["check"] for line in red_lines(worker)] == ["way to head"]
    assert "alpha stands for 127.0.1.1, which is this machine" in red_lines(worker)[0]["found"]
    assert "/etc/hosts" in red_lines(worker)[0]["next_step"]


@pytest.mark.netns
@pytest.mark.parametrize("blackhole", [False, True])
def test_a_head_without_a_route_is_named_with_what_shows_the_routes(
    network: list[Machine], processes: Processes, tmp_path: Path, blackhole: bool
) -> None:
    make_key(key := tmp_path / "cluster.key")
    address = "198.51.100.1" if blackhole else "192.0.2.1"
    if blackhole:
        command = ["ip", "-n", network[1].name, "route", "add", "blackhole", "198.51.100.0/24"]
        subprocess.run(command, check=True, capture_output=True, timeout=10)
    variables = worker_variables(0, free_port(), world_size=2, host=address, TPDIST_KEY_FILE=key)
    worker = examine(processes, "worker-0", variables, "--timeout-s", 1, prefix=network[1].prefix)
    assert worker.wait(DONE_S) == 5, worker.log
    (line,) = red_lines(worker)
    assert line["check"] == "route to head"
    assert f"ip route get {address}" in line["next_step"]
    assert "127.0.0.1" not in line["found"] + line["next_step"]


def make_key(file: Path) -> None:
    subprocess.run([sys.executable, "-m", "tpdist", "keygen", str(file)], check=True, capture_output=True, timeout=60)


def lose_packets(machine: Machine, other: Machine) -> None:
    """What `machine` sends to `other` goes to a card that nobody has."""
    entry = [other.address, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent"]
    command = ["ip", "-n", machine.name, "neigh", "replace", *entry]
    subprocess.run(command, check=True, capture_output=True, timeout=10)
