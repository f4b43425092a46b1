"""kill -9 and SIGSTOP of each kind of process while clients stream on every node: all nodes serve again."""

import pytest

from e2e.faults.fleet import Figures, Fleet, kill, stop, wake

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.parametrize(("rank", "name"), [(0, "rank 0"), (2, "a rank of a worker")])
def test_a_killed_rank(fleet: Fleet, figures: list[Figures], rank: int, name: str) -> None:
    epoch = fleet.epoch
    figures.append(fleet.measure(f"kill -9 of {name}", lambda: kill(fleet.rank_pid(rank))))
    assert fleet.epoch == epoch + 1
    assert "SIGKILL" in fleet.last_cause


@pytest.mark.parametrize(("rank", "name"), [(0, "rank 0"), (2, "a rank of a worker")])
def test_a_stopped_rank(fleet: Fleet, figures: list[Figures], rank: int, name: str) -> None:
    figures.append(fleet.measure(f"SIGSTOP of {name}", lambda: stop(fleet.rank_pid(rank))))
    assert f"rank {rank} on" in fleet.last_cause
    assert "stopped" in fleet.last_cause


def test_a_killed_worker_agent(fleet: Fleet, figures: list[Figures]) -> None:
    """Its service manager starts it again; its rank has gone with it."""
    figures.append(
        fleet.measure(
            "kill -9 of a worker agent, started again",
            fleet.nodes["worker-1"].kill,
            repair=lambda: fleet.restart("worker-1"),
            watched=["head", "worker-0"],
        )
    )
    assert "worker 1" in fleet.last_cause


def test_a_killed_head_agent(fleet: Fleet, figures: list[Figures]) -> None:
    """The workers wait for their head, and join the next one."""
    figures.append(
        fleet.measure(
            "kill -9 of the head agent, started again",
            fleet.nodes["head"].kill,
            repair=lambda: fleet.restart("head"),
            watched=["worker-0", "worker-1"],
        )
    )


@pytest.mark.parametrize("name", ["worker-1", "head"])
def test_a_stopped_agent(fleet: Fleet, figures: list[Figures], name: str) -> None:
    """It is lost like a dead one; woken up, it comes back by itself."""
    others = [other for other in fleet.names if other != name]
    pid = fleet.nodes[name].pid
    figures.append(
        fleet.measure(
            f"SIGSTOP of {'the head' if name == 'head' else 'a worker'} agent, woken up when noticed",
            lambda: stop(pid),
            repair=lambda: wake(pid),
            watched=others,
        )
    )
