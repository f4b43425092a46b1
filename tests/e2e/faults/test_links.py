"""What happens to the link of a worker: slow, silent, half-open, cut and mended. The cluster serves again, and the
worker that was cut off has ended its ranks, so that no old epoch answers."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Processes
from e2e.faults.fleet import NODE_LOST_S, Figures, Fleet
from e2e.faults.proxy import Proxy
from e2e.faults.traffic import Prompt
from e2e.namespaces import Machine, machines, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FAR = "worker-1"
NEAR = ["head", "worker-0"]
DELAY_S = 0.2


class Linked(Fleet):
    """A fleet whose last worker reaches the head's control port through a proxy."""

    def __init__(self, processes: Processes, model: Path, answers: dict[Prompt, list[int]]) -> None:
        super().__init__(processes, model, answers)
        self.proxy = Proxy(self.head_port)
        self.head_port_of[FAR] = self.proxy.port


@pytest.fixture(scope="module")
def linked(model: Path, answers: dict[Prompt, list[int]]) -> Iterator[Linked]:
    with Processes() as processes:
        fleet = Linked(processes, model, answers)
        with fleet.proxy:
            fleet.start_all()
            yield fleet
            fleet.end()


def test_a_slow_link_disturbs_nobody(linked: Linked) -> None:
    """200 ms more for every message of the control plane is no reason to lose a node."""
    epoch = linked.epoch
    linked.proxy.delay_s = DELAY_S
    try:
        with linked.traffic() as traffic:
            traffic.wait_flowing()
            linked.wait_heartbeats(FAR, seconds=2 * NODE_LOST_S)
    finally:
        linked.proxy.delay_s = 0
    assert set(traffic.tally.outcomes) == {"answered"}, traffic.tally
    assert linked.epoch == epoch


def test_a_stalled_link_loses_its_worker_and_a_mended_one_brings_it_back(
    linked: Linked, figures: list[Figures]
) -> None:
    def stall() -> None:
        linked.proxy.stalled = True

    def mend() -> None:
        linked.nodes[FAR].wait_for_log("ending the ranks of this node and registering again", timeout_s=10)
        linked.proxy.stalled = False

    figures.append(linked.measure("a stalled link, mended", stall, repair=mend, watched=NEAR, clients_of=NEAR))
    assert "worker 1" in linked.last_cause


def test_connections_that_are_cut(linked: Linked, figures: list[Figures]) -> None:
    """They could be made again at once, but tokens that were on their way would be missing from an answer."""
    epoch = linked.epoch
    figures.append(linked.measure("the connections of a worker cut", linked.proxy.cut))
    assert linked.epoch == epoch + 1


def test_a_half_open_connection(linked: Linked, figures: list[Figures]) -> None:
    """The head sees it closed, the worker does not: it comes back once it has heard nothing for long enough."""
    figures.append(
        linked.measure("a half-open connection", linked.proxy.hang_up_on_the_target, watched=NEAR, clients_of=NEAR)
    )
    assert "its connection has closed" in linked.last_cause


# -- machines ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Iterator[list[Machine]]:
    if reason := why_not():
        pytest.skip(reason)
    with machines(3, visible=True) as made:
        yield made


@pytest.fixture(scope="module")
def far_apart(
    network: list[Machine], model: Path, answers: dict[Prompt, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    key = tmp_path_factory.mktemp("key") / "cluster.key"
    subprocess.run([sys.executable, "-m", "tpdist", "keygen", str(key)], check=True, capture_output=True, timeout=60)
    names = ["head", "worker-0", "worker-1"]
    where = {name: (machine.address, machine.prefix) for name, machine in zip(names, network, strict=True)}
    with Processes() as processes:
        fleet = Fleet(processes, model, answers, settings={"TPDIST_KEY_FILE": key}, where=where)
        fleet.start_all()
        yield fleet
        fleet.end()


@pytest.mark.netns
def test_a_cable_that_is_pulled_and_plugged_in_again(
    far_apart: Fleet, network: list[Machine], figures: list[Figures]
) -> None:
    """While it is out, both sides know: the head has lost a worker, and the worker has ended its ranks."""
    cut_off = far_apart.nodes[FAR]

    def plug_in() -> None:
        cut_off.wait_for_log("ending the ranks of this node and registering again", timeout_s=10)
        network[2].link("up")

    figures.append(
        far_apart.measure(
            "the link of a machine down, and up again",
            lambda: network[2].link("down"),
            repair=plug_in,
            watched=NEAR,
            clients_of=NEAR,
        )
    )
    assert "worker 1" in far_apart.last_cause
