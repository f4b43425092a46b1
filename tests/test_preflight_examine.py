"""The head's examination, with nodes that are played: who is asked for what, and what becomes of answers."""

import asyncio
from dataclasses import dataclass, field

import pytest
from clusters import gpus, probe_of
from examinations import findings_of, node_of
from hypothesis import given
from hypothesis import strategies as st
from waiting import within

from tpdist.control.layout import HeadAddress
from tpdist.preflight.examine import make_head_address, measure_links, measure_reduce, nccl_ranks, rounds
from tpdist.preflight.words import (
    Answer,
    Failed,
    LinkFigures,
    Listen,
    Port,
    Reach,
    Reduce,
    ReduceFigures,
    Work,
)

DEADLINE_S = 20.0
HEAD = HeadAddress("10.0.0.1", "eth0")
FIGURES = LinkFigures(latency_s=1e-4, bandwidth=1e9, skew_s=0.0)


@dataclass
class Played:
    """A node that listens on a port of its own number and answers as it is told."""

    number: int
    opens: bool = True
    asked: list[Work] = field(default_factory=list)

    async def ask(self, work: Work, *, timeout_s: float) -> Answer:
        self.asked.append(work)
        match work:
            case Listen():
                return Port(port=40000 + self.number) if self.opens else Failed(problem="no port")
            case Reach():
                return FIGURES
            case Reduce():
                return ReduceFigures(small_s=1e-3, large_s=1e-2)


@given(st.integers(1, 12))
def test_every_ordered_pair_of_nodes_has_a_round_in_which_both_do_nothing_else(num_nodes: int) -> None:
    met = list(rounds(num_nodes))
    for pairs in met:
        nodes = [node for pair in pairs for node in pair]
        assert len(nodes) == len(set(nodes))
    every = [pair for pairs in met for pair in pairs]
    assert sorted(every) == [(a, b) for a in range(num_nodes) for b in range(num_nodes) if a != b]


def test_every_node_reaches_every_other_by_the_address_that_it_knows() -> None:
    nodes = [node_of(), node_of(0), node_of(1)]
    played = [Played(number) for number in range(3)]
    links = asyncio.run(within(DEADLINE_S, measure_links(played, [node.register for node in nodes], HEAD)))
    assert [(link.source, link.target, link.host, link.port) for link in links] == [
        (0, 1, "10.0.0.2", 40001),
        (0, 2, "10.0.0.3", 40002),
        (1, 0, "10.0.0.1", 40000),
        (1, 2, "10.0.0.3", 40002),
        (2, 0, "10.0.0.1", 40000),
        (2, 1, "10.0.0.2", 40001),
    ]
    assert [work.host for each in played for work in each.asked if isinstance(work, Listen)] == [
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.3",
    ]


def test_a_node_that_opens_no_port_fails_the_ways_to_it_alone() -> None:
    nodes, played = [node_of(), node_of(0)], [Played(0), Played(1, opens=False)]
    links = asyncio.run(within(DEADLINE_S, measure_links(played, [node.register for node in nodes], HEAD)))
    assert [link.answer for link in links] == [Failed(problem="no port"), FIGURES]


def test_ranks_of_a_sum_are_numbered_node_by_node_and_meet_at_the_heads_address() -> None:
    nodes, played = [node_of(), node_of(0)], [Played(0), Played(1)]
    measuring = measure_reduce(played, nodes, HEAD, backend="nccl", num_ranks=[2, 3], open_store=lambda host: 5000)
    found = asyncio.run(within(DEADLINE_S, measuring))
    works = [each.asked[0] for each in played]
    assert [(work.first_rank, work.num_ranks, work.world_size) for work in works if isinstance(work, Reduce)] == [
        (0, 2, 5),
        (2, 3, 5),
    ]
    assert {(work.host, work.port) for work in works[1:] if isinstance(work, Reduce)} == {("10.0.0.1", 5000)}
    assert len(found.answers) == 2


def test_a_store_port_that_is_taken_fails_the_sum() -> None:
    def taken(host: str) -> int:
        raise OSError(98, "Address already in use")

    nodes, played = [node_of(), node_of(0)], [Played(0), Played(1)]
    measuring = measure_reduce(played, nodes, HEAD, backend="gloo", num_ranks=[1, 1], open_store=taken)
    (answer,) = asyncio.run(within(DEADLINE_S, measuring)).answers
    assert isinstance(answer, Failed)
    assert "already in use" in answer.problem
    assert not played[1].asked


@pytest.mark.parametrize(
    ("counts", "machines", "ranks"),
    [
        ([4, 4], ["a", "b"], [4, 4]),
        ([4, 0], ["a", "b"], None),
        ([1, 1], ["a", "a"], None),
        ([2], ["a"], [2]),
        ([1], ["a"], None),
    ],
)
def test_nccl_is_tried_where_every_rank_has_a_gpu_of_its_own(
    counts: list[int], machines: list[str], ranks: list[int] | None
) -> None:
    probes = [probe_of(devices=gpus(count), host_id=machine) for count, machine in zip(counts, machines, strict=True)]
    assert nccl_ranks([node_of(findings=findings_of(probe=probe)) for probe in probes]) == ranks


def test_the_head_listens_where_the_workers_reach_it() -> None:
    assert make_head_address([node_of(), node_of(0)], lambda address: "eth7") == HeadAddress("10.0.0.1", "eth7")
