"""Fixtures of the faults: one cluster for those that it survives, and the page that the figures go into."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import reference_tokens

from e2e.cluster import Processes
from e2e.faults.fleet import Figures, Fleet
from e2e.faults.page import write_table
from e2e.faults.traffic import Prompt

NUM_TOKENS = 60
PROMPTS: list[Prompt] = [tuple((7 * index + start) % 256 for index in range(3 + start)) for start in range(4)]
FIGURES = pytest.StashKey[list[Figures]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    page = session.config.getoption("--reliability")
    if page is not None and session.config.stash[FIGURES]:
        write_table(Path(page), session.config.stash[FIGURES])


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> list[Figures]:
    """Where a case puts what it measured."""
    return request.config.stash[FIGURES]


@pytest.fixture(scope="session")
def answers(model: Path) -> dict[Prompt, list[int]]:
    """What transformers gives to each prompt."""
    return dict(zip(PROMPTS, reference_tokens(model, PROMPTS, NUM_TOKENS), strict=True))


@pytest.fixture(scope="session")
def fleet(model: Path, answers: dict[Prompt, list[int]]) -> Iterator[Fleet]:
    """A head and two workers that are restarted as often as it takes."""
    with Processes() as processes:
        started = Fleet(processes, model, answers)
        started.start_all()
        yield started
        started.end()
