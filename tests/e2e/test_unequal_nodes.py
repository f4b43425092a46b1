"""Nodes with different numbers of ranks: node-major ranks, plans over ipc on the head's node and over tcp elsewhere."""

from pathlib import Path

import pytest
from checkpoints import reference_tokens

from e2e.clients import completed_tokens
from e2e.cluster import Processes, free_port, head_variables, worker_variables

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROMPT = list(range(5, 45))
NUM_TOKENS = 8


@pytest.mark.parametrize(("head_ranks", "worker_ranks"), [(1, 2), (2, 1)])
def test_nodes_of_unequal_size_answer_as_transformers(model: Path, head_ranks: int, worker_ranks: int) -> None:
    port, world_size = free_port(), head_ranks + worker_ranks
    sizes = [{"MISTRALRS_MN_LOCAL_WORLD_SIZE": str(size)} for size in (head_ranks, worker_ranks)]
    with Processes() as processes:
        head = processes.serve("head", model, head_variables(port, world_size=world_size, num_workers=1) | sizes[0])
        worker = processes.serve("worker-0", model, worker_variables(0, port, world_size=world_size) | sizes[1])
        processes.wait_ready()
        expected = reference_tokens(model, [PROMPT], NUM_TOKENS)[0]
        assert [completed_tokens(node, PROMPT, NUM_TOKENS) for node in (head, worker)] == [expected, expected]
        ranks = [[rank["rank"] for rank in node["ranks"]] for node in worker.cluster()["nodes"]]
        assert ranks == [list(range(head_ranks)), list(range(head_ranks, world_size))]
        processes.stop()
