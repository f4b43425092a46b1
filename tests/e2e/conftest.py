"""Fixtures of all end-to-end tests: a checkpoint, processes that leave nothing behind, and a cluster to share."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint

from e2e.cluster import NodeProcess, Processes, free_port, head_variables, worker_variables

THREE_OVER_FOUR_HEADS = {
    "hidden_size": 96,
    "head_dim": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that fits over one, two or three ranks, with a tokenizer and a long context."""
    torch.set_num_threads(1)
    return make_checkpoint(tmp_path_factory.mktemp("model"), tokenizer=True, **THREE_OVER_FOUR_HEADS)


@pytest.fixture
def processes() -> Iterator[Processes]:
    """For the nodes of one test. Afterwards nothing of them may be left."""
    with Processes() as started:
        yield started


@pytest.fixture(scope="session")
def three_nodes(model: Path) -> Iterator[Processes]:
    """A head and two workers with one rank each, for every test that does not end them.

    One worker starts before the head and one after it, one uses the older name of the head's address, and what the
    head alone sets holds for all.
    """
    port = free_port()
    with Processes() as started:
        early = worker_variables(1, port, world_size=3)
        early["MISTRALRS_WORKER_SERVER_ADDR"] = early.pop("MISTRALRS_MN_WORKER_SERVER_ADDR")
        engine = {"TPDIST_KV_CACHE_MEMORY_BYTES": "8MiB", "TPDIST_MAX_NUM_SEQS": "32"}
        worker = started.serve("worker-1", model, early).wait_for_log("HTTP on")
        assert worker.get("/livez").status_code == 200
        assert worker.get("/readyz").status_code == 503
        started.serve("head", model, head_variables(port, world_size=3, num_workers=2, **engine)).wait_for_log(
            "HTTP on"
        )
        started.serve("worker-0", model, worker_variables(0, port, world_size=3))
        started.nodes.sort(key=lambda node: node.name)
        started.wait_ready()
        yield started
        started.stop()


@pytest.fixture(params=["head", "worker-0", "worker-1"])
def each_node(request: pytest.FixtureRequest, three_nodes: Processes) -> NodeProcess:
    """Each node of the shared cluster in turn."""
    return next(node for node in three_nodes.nodes if node.name == request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of all nodes of a test that failed."""
    report = yield
    if report.failed:
        arguments: dict[str, Any] = getattr(item, "funcargs", {})
        clusters = {id(value): value for value in arguments.values() if isinstance(value, Processes)}
        nodes = [node for cluster in clusters.values() for node in cluster.nodes if node.folder.exists()]
        report.sections += [(f"log of {node.name}", node.log) for node in nodes if node.log not in report.longreprtext]
    return report
