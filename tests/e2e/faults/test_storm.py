"""One fault after another while clients stream: nothing adds up, nothing is left, no token is wrong."""

import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from e2e.faults.fleet import BOUND_S, Figures, Fleet, kill, stop, wake

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_FAULTS = 10
Fault = tuple[str, Callable[[], None], Callable[[], None] | None]


def faults_of(fleet: Fleet, chance: random.Random) -> Fault:
    """Something that goes wrong, and what mends it once it is noticed."""
    name = chance.choice(fleet.names)
    worker = chance.choice(fleet.names[1:])
    rank = chance.randrange(len(fleet.names))
    pid = fleet.nodes[name].pid
    return chance.choice(
        [
            (f"kill -9 of rank {rank}", lambda: kill(fleet.rank_pid(rank)), None),
            (f"SIGSTOP of rank {rank}", lambda: stop(fleet.rank_pid(rank)), None),
            (f"kill -9 of {worker}", fleet.nodes[worker].kill, lambda: fleet.restart(worker)),
            (f"kill -9 of {name}", fleet.nodes[name].kill, lambda: fleet.restart(name)),
            (f"SIGSTOP of {name}", lambda: stop(pid), lambda: wake(pid)),
        ]
    )


@pytest.mark.timeout(1800)
def test_a_storm_of_faults(fleet: Fleet, figures: list[Figures], request: pytest.FixtureRequest) -> None:
    chance = random.Random(5)
    ends_at = time.monotonic() + request.config.getoption("--soak")
    seen: list[Figures] = []
    while len(seen) < NUM_FAULTS or time.monotonic() < ends_at:
        case, fault, repair = faults_of(fleet, chance)
        others = [name for name in fleet.names if not case.endswith(name)]
        seen.append(fleet.measure(case, fault, repair=repair, watched=others))
    figures.append(summary(seen))
    assert all(each.recovered_s < BOUND_S for each in seen)


def summary(seen: list[Figures]) -> Figures:
    """All faults together: the slowest of each, and the sum of what clients got."""
    total = replace(
        seen[0],
        case=f"{len(seen)} faults one after another",
        detected_s=max(each.detected_s or 0 for each in seen),
        recovered_s=max(each.recovered_s for each in seen),
        longest_wait_s=max(each.longest_wait_s for each in seen),
    )
    counted = ("answered", "failed", "refused", "retried", "wrong", "hung")
    return replace(total, **{name: sum(getattr(each, name) for each in seen) for name in counted})
