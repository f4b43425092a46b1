"""Which rank is where, and how many ranks each node gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpdist.errors import JoinError, PlanError
from tpdist.plan.topology import RankPlace, Topology, local_world_sizes


def test_ranks_are_node_major_and_tensor_parallel_groups_consecutive() -> None:
    topology = Topology(node_sizes=(1, 3), tp_size=2, pp_size=2)
    assert topology.places == (
        RankPlace(rank=0, node_index=0, local_rank=0, stage=0, tp_rank=0),
        RankPlace(rank=1, node_index=1, local_rank=0, stage=0, tp_rank=1),
        RankPlace(rank=2, node_index=1, local_rank=1, stage=1, tp_rank=0),
        RankPlace(rank=3, node_index=1, local_rank=2, stage=1, tp_rank=1),
    )
    assert [topology.first_rank(node) for node in range(2)] == [0, 1]


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (3, 2), (0, 0), (-2, -2)])
def test_sizes_that_do_not_multiply_up_are_refused_with_the_nodes(tp_size: int, pp_size: int) -> None:
    with pytest.raises(PlanError, match=r"4 ranks \(head 1, worker 0 3\)"):
        Topology(node_sizes=(1, 3), tp_size=tp_size, pp_size=pp_size)


@pytest.mark.parametrize(
    ("requested", "world_size", "expected"),
    [
        ((2, 2), 4, (2, 2)),
        ((None, None), 4, (2, 2)),
        ((None, None, None), 8, (3, 3, 2)),
        ((1, None, None), 6, (1, 3, 2)),
        ((None,), 3, (3,)),
    ],
)
def test_a_node_that_asks_for_nothing_gets_its_even_share_of_what_is_left(
    requested: tuple[int | None, ...], world_size: int, expected: tuple[int, ...]
) -> None:
    assert local_world_sizes(requested, world_size) == expected


@given(st.lists(st.none() | st.integers(1, 8), min_size=1, max_size=8), st.integers(1, 64))
def test_sizes_add_up_or_the_error_names_every_one(requested: list[int | None], world_size: int) -> None:
    rest = world_size - sum(size or 0 for size in requested)
    num_open = requested.count(None)
    if rest < num_open or (rest > 0 and num_open == 0):
        with pytest.raises(JoinError, match=f"SIZE is {world_size}, .*" + "worker .*" * (len(requested) - 1)):
            local_world_sizes(requested, world_size)
        return
    sizes = local_world_sizes(requested, world_size)
    assert sum(sizes) == world_size
    assert min(sizes) >= 1
    assert all(wanted in (None, size) for wanted, size in zip(requested, sizes, strict=True))


@pytest.mark.parametrize(
    ("requested", "world_size"), [((2, 2), 5), ((2, 2), 3), ((4, None), 4), ((None, None), 1), ((0, 4), 4)]
)
def test_sizes_that_do_not_add_up_are_refused(requested: tuple[int | None, ...], world_size: int) -> None:
    with pytest.raises(JoinError, match="at least one rank on every node"):
        local_world_sizes(requested, world_size)
