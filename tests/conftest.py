"""How all property tests run: no time limit for an example, since machines are shared, and no complaint about examples
that are slow to make or left out by an `assume`. And a fixture for tests that start ranks."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "shared", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
settings.load_profile("shared")


@pytest.fixture
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No child process, and no run folder, outlives its LLM."""
    for name in [name for name in os.environ if name.startswith(("TPDIST_", "MISTRALRS_"))]:
        monkeypatch.delenv(name)
    before = set(psutil.Process().children(recursive=True))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [child for child in left if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.glob("tpdist-*"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", metavar="PAGE", help="write the figures of tests/e2e/faults into this page")
    parser.addoption("--soak", type=float, default=60.0, metavar="S", help="how long faults follow one another")
