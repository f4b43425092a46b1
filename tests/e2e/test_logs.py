"""A node's log as JSON, from its start to the rank that ends it: every line is an event."""

import json
import os
import signal
from pathlib import Path

import pytest

from e2e.cluster import Processes

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_every_line_of_a_node_is_an_event_to_the_last(processes: Processes, model: Path) -> None:
    two_ranks = {"MISTRALRS_MN_LOCAL_WORLD_SIZE": "2", "TPDIST_DEVICE": "cpu", "TPDIST_MAX_RESTARTS": "0"}
    node = processes.serve("single", model, {**two_ranks, "TPDIST_LOG_FORMAT": "json"}).wait_ready()
    assert node.metric("tpdist_ranks_ready") == 2
    rank = node.cluster()["nodes"][0]["ranks"][1]
    os.kill(rank["pid"], signal.SIGKILL)
    assert processes.exit_codes() == {"single": 6}
    events = [json.loads(line) for line in node.log.splitlines()]
    assert {event["node"] for event in events} == {"head"}
    assert {(event["rank"], event["epoch"]) for event in events if event["rank"] is not None} == {(0, 1), (1, 1)}
    assert [event["plan"]["tp_size"] for event in events if "plan" in event] == [2]
    last = events[-1]
    assert (last["level"], last["exit_code"]) == ("ERROR", 6)
    assert "rank 1 on head" in last["message"]
    assert "was killed by SIGKILL" in last["message"]
    assert "  | " in last["message"], "the last lines of the rank"
