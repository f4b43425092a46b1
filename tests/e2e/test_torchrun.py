"""Two ranks that torchrun starts: they answer, drain when torchrun is told to stop, and end when one of them dies."""

import os
import signal
import sys
from pathlib import Path

import pytest
from checkpoints import reference_tokens

from e2e.clients import Stream, completed_tokens
from e2e.cluster import LOOPBACK, NodeProcess, Processes, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROMPTS = [[7], [(3 * index) % 256 for index in range(40)]]
NUM_TOKENS = 8
STREAM_TOKENS = 150
END_S = 20.0
"""torchrun looks every tenth of a second, tells the other ranks to end, and our agent gives its ranks five seconds."""


def torchrun(processes: Processes, model: Path, **variables: str) -> NodeProcess:
    flags = ("--nproc-per-node", "2", "--master-port", str(free_port()))
    return processes.run("torchrun", command(model, *flags), variables)


def command(model: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "tpdist", "serve", str(model)]


def test_two_ranks_answer_and_drain(processes: Processes, model: Path) -> None:
    node = torchrun(processes, model).wait_ready()
    assert [completed_tokens(node, prompt, NUM_TOKENS) for prompt in PROMPTS] == reference_tokens(
        model, PROMPTS, NUM_TOKENS
    )
    ranks = [rank for each in node.cluster()["nodes"] for rank in each["ranks"]]
    assert [(rank["rank"], rank["state"]) for rank in ranks] == [(0, "ready"), (1, "ready")]
    stream = Stream(node, [1, 2, 3], max_tokens=STREAM_TOKENS).wait_first()
    node.send(signal.SIGTERM)
    stream.finish()
    assert stream.done
    assert len(stream.token_ids) == STREAM_TOKENS
    node.wait(END_S)


def test_two_groups_answer_each_on_a_port_of_its_own(processes: Processes, model: Path) -> None:
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", LOOPBACK, "--master-port", str(free_port()))
    for group in range(2):
        processes.run(f"group-{group}", command(model, *meeting, "--node-rank", str(group)), {})
    processes.wait_ready()
    expected = reference_tokens(model, PROMPTS[1:], NUM_TOKENS)[0]
    assert [completed_tokens(node, PROMPTS[1], NUM_TOKENS) for node in processes.nodes] == [expected] * 2
    processes.nodes[0].send(signal.SIGTERM)
    processes.exit_codes(END_S)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_everything(processes: Processes, model: Path, rank: int) -> None:
    node = torchrun(processes, model).wait_ready()
    stream = Stream(node, [1, 2, 3], max_tokens=4000).wait_first()
    pids = [entry["pid"] for each in node.cluster()["nodes"] for entry in each["ranks"]]
    os.kill(pids[rank], signal.SIGKILL)
    node.killed = rank == 0  # its folder was rank 0's to remove
    assert node.wait(END_S) != 0
    assert stream.finish().error
    assert not stream.done


def test_multi_node_variables_under_torchrun_are_wrong_usage(processes: Processes, model: Path) -> None:
    node = torchrun(processes, model, MISTRALRS_MN_GLOBAL_WORLD_SIZE="2")
    assert node.wait(END_S) == 1
    assert "MISTRALRS_MN_GLOBAL_WORLD_SIZE=2 set under torchrun" in node.log
    assert "exitcode  : 2" in node.log
