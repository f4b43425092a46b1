"""Hidden states between stages over gloo: what arrives is what was sent, in the order of steps, and a stage that goes
away is named in time."""

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from ranks import Meeting, open_store, run_processes
from torch import Tensor

from tpdist.parallel.group import PeerLostError
from tpdist.parallel.pipeline import Alone, ProcessPipe
from tpdist.parallel.process_group import connect, disconnect

HIDDEN_SIZE = 7
NUM_TOKENS = (1, 5, 1, 64, 3, 1, 2, 9)
PATIENCE_S = 30.0
SHORT_S = 1.5
SOON_S = 10.0
"""For what should take SHORT_S, on a machine that has other things to do."""


@dataclass(frozen=True)
class Pipeline:
    """`host_id` as in `connect`: an empty one keeps ranks from sharing memory."""

    world_size: int
    tp_size: int = 1
    dtype: torch.dtype = torch.float32
    max_in_flight: int = 3
    timeout_s: float = PATIENCE_S
    host_id: str | None = None

    def __str__(self) -> str:
        memory = "gloo" if self.host_id == "" else "shared memory"
        return f"{self.world_size // self.tp_size} stages of {self.tp_size}, {self.dtype}, {memory}"


def open_pipe(rank: int, meeting: Meeting, pipeline: Pipeline) -> ProcessPipe:
    group = connect(
        rank=rank,
        world_size=pipeline.world_size,
        tp_size=pipeline.tp_size,
        backend="gloo",
        store=open_store(meeting),
        timeout_s=PATIENCE_S,
        host_id=pipeline.host_id,
    )
    return ProcessPipe(
        rank=rank,
        world_size=pipeline.world_size,
        group=group,
        hidden_size=HIDDEN_SIZE,
        dtype=pipeline.dtype,
        device=torch.device("cpu"),
        max_in_flight=pipeline.max_in_flight,
        timeout_s=pipeline.timeout_s,
    )


def sent_in(step: int, dtype: torch.dtype) -> Tensor:
    """What the first stage sends: no row, and no step, like another."""
    values = torch.randn(NUM_TOKENS[step], HIDDEN_SIZE, generator=torch.Generator().manual_seed(step))
    return values.to(dtype)


def run_steps(rank: int, meeting: Meeting, pipeline: Pipeline) -> tuple[bool, bool, list[Any]]:
    """Every stage adds its rank's stage to what came. Whether it is the first and the last, and what came to it."""
    pipe = open_pipe(rank, meeting, pipeline)
    seen: list[Any] = []
    for step in range(len(NUM_TOKENS)):
        x = sent_in(step, pipeline.dtype) if pipe.is_first else pipe.receive(NUM_TOKENS[step], step=step)
        if not pipe.is_first:
            seen.append(x.float().tolist())
        if not pipe.is_last:
            pipe.send(x + 1, step=step)
    told(meeting, f"done/{rank}")
    wait_for(meeting, *(f"done/{each}" for each in range(pipeline.world_size)))
    disconnect()
    return pipe.is_first, pipe.is_last, seen


def told(meeting: Meeting, key: str) -> None:
    open_store(meeting).set(key, "")


def wait_for(meeting: Meeting, *keys: str) -> None:
    open_store(meeting).wait(list(keys), timedelta(seconds=PATIENCE_S))


@pytest.mark.parametrize(
    "pipeline",
    [
        Pipeline(2),
        Pipeline(3, dtype=torch.bfloat16),
        pytest.param(Pipeline(4, tp_size=2), marks=pytest.mark.slow),
        pytest.param(Pipeline(4, tp_size=2, host_id=""), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_rank_of_a_stage_gets_what_the_stage_before_sent_step_by_step(pipeline: Pipeline) -> None:
    last_stage = pipeline.world_size // pipeline.tp_size - 1
    for rank, (is_first, is_last, seen) in enumerate(run_processes(run_steps, pipeline.world_size, pipeline)):
        stage = rank // pipeline.tp_size
        assert (is_first, is_last) == (stage == 0, stage == last_stage)
        expected = [sent_in(step, pipeline.dtype) for step in range(len(NUM_TOKENS))]
        for _ in range(stage):
            expected = [x + 1 for x in expected]
        assert seen == ([x.float().tolist() for x in expected] if stage else [])


def send_ahead(rank: int, meeting: Meeting, pipeline: Pipeline) -> list[Any]:
    """The second stage looks only after the first has sent as much as may be in flight, which changes nothing that it
    sent, and has memory of other shapes."""
    pipe = open_pipe(rank, meeting, pipeline)
    steps = range(pipeline.max_in_flight)
    seen = []
    if pipe.is_first:
        for step in steps:
            pipe.send(sent_in(step, pipeline.dtype).t().contiguous().t(), step=step)
        told(meeting, "sent")
    else:
        wait_for(meeting, "sent")
        seen = [pipe.receive(NUM_TOKENS[step], step=step).tolist() for step in steps]
        told(meeting, "received")
    wait_for(meeting, "received")
    disconnect()
    return seen


def test_a_stage_sends_several_steps_before_the_next_one_looks() -> None:
    pipeline = Pipeline(2, max_in_flight=4)
    _, seen = run_processes(send_ahead, 2, pipeline)
    assert seen == [sent_in(step, pipeline.dtype).tolist() for step in range(4)]


# -- peers that go away -----------------------------------------------------------------------------------------------


def lose(rank: int, meeting: Meeting, pipeline: Pipeline, gone: int, dies: bool) -> tuple[str, float] | None:
    """What each rank but `gone` says of it, and after how long. `gone` dies, or lives and says nothing."""
    pipe = open_pipe(rank, meeting, pipeline)
    if rank == gone:
        told(meeting, "gone")
        if not dies:
            wait_for(meeting, *(f"noticed/{each}" for each in range(pipeline.world_size) if each != gone))
        return None
    wait_for(meeting, "gone")
    began = time.monotonic()
    try:
        for step in range(1, 200):
            x = torch.zeros(1, HIDDEN_SIZE) if pipe.is_first else pipe.receive(1, step=step)
            if not pipe.is_last:
                pipe.send(x, step=step)
    except PeerLostError as error:
        took_s = time.monotonic() - began
        told(meeting, f"noticed/{rank}")
        return str(error), took_s
    return None


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "is silent"])
def test_a_stage_in_the_middle_that_goes_away_is_named_by_both_its_neighbours(dies: bool) -> None:
    pipeline = Pipeline(3, timeout_s=SHORT_S)
    before, nothing, after = run_processes(lose, 3, pipeline, 1, dies)
    assert nothing is None
    assert before is not None
    assert after is not None
    assert "send between stages failed on rank 0: rank 1 has gone or did not answer in time" in before[0]
    assert "receive between stages failed on rank 2: rank 1 has gone or did not answer in time" in after[0]
    assert max(before[1], after[1]) < SOON_S


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 2], ids=["the first sends no more", "the first receives no more"])
def test_the_first_rank_of_a_neighbouring_group_is_named(gone: int) -> None:
    """The other rank of its own group is stopped by that group's deadline, which is none of the pipe's."""
    seen = run_processes(lose_between_groups, 4, Pipeline(4, tp_size=2, timeout_s=SHORT_S), gone)
    witness = 2 - gone
    message, took_s = seen[witness]
    assert f"failed on rank {witness}: rank {gone} has gone" in message
    assert took_s < SOON_S


def lose_between_groups(rank: int, meeting: Meeting, pipeline: Pipeline, gone: int) -> tuple[str, float] | None:
    if rank in (gone, 2 - gone):
        return lose(rank, meeting, pipeline, gone, True)
    open_pipe(rank, meeting, pipeline)
    wait_for(meeting, f"noticed/{2 - gone}")
    return None


def test_alone_a_stage_is_the_first_and_the_last_and_has_nobody_to_talk_to() -> None:
    alone = Alone()
    assert alone.is_first
    assert alone.is_last
    with pytest.raises(AssertionError, match="no stage comes before"):
        alone.receive(1, step=1)
    with pytest.raises(AssertionError, match="no stage comes after"):
        alone.send(torch.zeros(1, 1), step=1)
