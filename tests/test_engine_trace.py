"""What a rank writes of when it did what: a line for each part of a step, whole at any time, and nothing without a
folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from tpdist.engine.trace import Trace

PLANTED = "planted"


def events(folder: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]


def test_each_part_of_a_step_is_a_line_with_its_times(tmp_path: Path) -> None:
    trace = Trace(tmp_path, rank=3)
    with trace.span("forward", step=7, num_tokens=5):
        pass
    with trace.span("send", step=7, num_tokens=5):
        pass
    first, second = events(tmp_path, 3)
    assert {name: first[name] for name in ("rank", "step", "name", "num_tokens")} == {
        "rank": 3,
        "step": 7,
        "name": "forward",
        "num_tokens": 5,
    }
    assert second["name"] == "send"
    assert first["begin"] <= first["end"] <= second["begin"] <= second["end"]


def test_lines_are_there_while_the_rank_runs(tmp_path: Path) -> None:
    """A rank that is killed leaves what it did until then."""
    trace = Trace(tmp_path, rank=0)
    for step in range(3):
        with trace.span("forward", step=step, num_tokens=1):
            assert len(events(tmp_path, 0)) == step
        assert [event["step"] for event in events(tmp_path, 0)] == list(range(step + 1))


def test_ranks_write_to_files_of_their_own(tmp_path: Path) -> None:
    for rank in range(2):
        with Trace(tmp_path, rank=rank).span("forward", step=rank, num_tokens=1):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.jsonl", "rank-1.jsonl"]
    assert [events(tmp_path, rank)[0]["step"] for rank in range(2)] == [0, 1]


def test_a_part_that_failed_is_no_line(tmp_path: Path) -> None:
    trace = Trace(tmp_path, rank=0)
    with pytest.raises(RuntimeError, match=PLANTED), trace.span("receive", step=1, num_tokens=2):
        raise RuntimeError(PLANTED)
    assert events(tmp_path, 0) == []


def test_without_a_folder_nothing_is_written_or_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tpdist.engine.trace.time.monotonic", lambda: pytest.fail("measured"))
    with Trace(None, rank=0).span("forward", step=1, num_tokens=1):
        pass
    assert list(tmp_path.iterdir()) == []
