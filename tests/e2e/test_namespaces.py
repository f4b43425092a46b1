"""Three machines with addresses of their own, as far as the network can tell: with the right key, a wrong one, none."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import reference_tokens

from e2e.clients import completed_tokens
from e2e.cluster import NodeProcess, Processes, free_port, head_variables, worker_variables
from e2e.namespaces import Machine, machines, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.netns]

PROMPT = [(5 * index) % 256 for index in range(40)]
NUM_TOKENS = 8
AT_ONCE_S = 20.0


@pytest.fixture(scope="module")
def network() -> Iterator[list[Machine]]:
    if reason := why_not():
        pytest.skip(reason)
    with machines(3) as made:
        yield made


@dataclass(frozen=True)
class Network:
    """A cluster over three machines, and what was seen while its head still waited for the workers."""

    processes: Processes
    machines: list[Machine]
    stranger: NodeProcess
    stranger_exit_code: int
    readiness: dict[str, str]


@pytest.fixture(scope="module")
def cluster(network: list[Machine], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Before the workers comes one with another key."""
    keys = tmp_path_factory.mktemp("keys")
    key, other = (make_key(keys / name) for name in ("cluster.key", "other.key"))
    port = free_port()
    with Processes() as processes, Processes() as strangers:
        started = [processes]

        def worker(where: Processes, name: str, worker_id: int, **more: object) -> NodeProcess:
            variables = worker_variables(worker_id, port, world_size=3, host=network[0].address, **more)
            machine = network[worker_id + 1]
            return where.serve(name, model, {"TPDIST_HOST": machine.address, **variables}, prefix=machine.prefix)

        head_settings = head_variables(port, world_size=3, num_workers=2, TPDIST_KEY_FILE=key)
        address = network[0].address
        head = processes.serve("head", model, {"TPDIST_HOST": address, **head_settings}, prefix=network[0].prefix)
        network[0].call(head.wait_for_log, "HTTP on")
        stranger = worker(strangers, "stranger", 0, TPDIST_KEY_FILE=other, TPDIST_REGISTER_TIMEOUT_S=3)
        exit_code = stranger.wait(AT_ONCE_S)
        readiness = network[0].call(head.get, "/readyz").json()
        for worker_id in range(2):
            worker(processes, f"worker-{worker_id}", worker_id, TPDIST_KEY_FILE=key)
        for node, machine in zip(processes.nodes, network, strict=True):
            machine.call(node.wait_ready)
        yield Network(started[0], network, stranger, exit_code, readiness)
        processes.stop()


def make_key(path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "tpdist", "keygen", str(path)], check=True, capture_output=True, timeout=60)
    return path


@pytest.mark.parametrize("client", range(3))
@pytest.mark.parametrize("server", range(3))
def test_every_machine_answers_every_other_on_its_address(
    cluster: Network, model: Path, client: int, server: int
) -> None:
    node = cluster.processes.nodes[server]
    answer = cluster.machines[client].call(completed_tokens, node, PROMPT, NUM_TOKENS)
    assert answer == reference_tokens(model, [PROMPT], NUM_TOKENS)[0]


def test_collectives_take_the_interface_of_the_route_to_the_head(cluster: Network) -> None:
    head = cluster.processes.nodes[0]
    ranks = [rank for node in cluster.machines[0].call(head.cluster)["nodes"] for rank in node["ranks"]]
    for rank in ranks:
        environ = Path(f"/proc/{rank['pid']}/environ").read_bytes().split(b"\0")
        assert b"GLOO_SOCKET_IFNAME=eth0" in environ


def test_only_the_control_plane_listens_on_all_addresses(cluster: Network) -> None:
    """Store and process group have no authentication: they listen on the address that the workers use."""
    port = cluster.processes.nodes[0].log.partition("control plane on port ")[2].partition(" ")[0]
    everywhere = {"*", "0.0.0.0", "[::]"}
    listening = [address.rpartition(":") for address in listening_addresses(cluster.machines[0])]
    assert [found for host, _, found in listening if host in everywhere] == [port]


def listening_addresses(machine: Machine) -> list[str]:
    command = [*machine.prefix, "ss", "-Hltn"]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    return [line.split()[3] for line in found.stdout.splitlines()]


def test_a_worker_with_another_key_hears_no_head_and_the_head_goes_on(cluster: Network) -> None:
    assert cluster.stranger_exit_code == 5
    assert f"no head answered at tcp://{cluster.machines[0].address}" in cluster.stranger.log
    assert "TPDIST_KEY_FILE" in cluster.stranger.log
    assert cluster.readiness["state"] == "starting"
    assert cluster.readiness["phase"] == "register"


def test_a_worker_without_a_key_does_not_leave_its_machine(cluster: Network, processes: Processes, model: Path) -> None:
    variables = worker_variables(0, free_port(), world_size=3, host=cluster.machines[0].address)
    worker = processes.serve("keyless", model, variables, prefix=cluster.machines[1].prefix)
    assert worker.wait(AT_ONCE_S) == 2
    assert "TPDIST_KEY_FILE" in worker.log
    assert cluster.machines[0].address in worker.log


def test_a_head_without_a_key_is_not_reachable_from_another_machine(
    network: list[Machine], processes: Processes, model: Path
) -> None:
    port = free_port()
    head = processes.serve("head", model, head_variables(port, world_size=2, num_workers=1), prefix=network[0].prefix)
    head.wait_for_log("this machine only")
    assert "TPDIST_KEY_FILE" in head.log
    network[0].call(connect, "127.0.0.1", port)
    with pytest.raises(ConnectionRefusedError):
        network[1].call(connect, network[0].address, port)


def connect(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=5).close()
