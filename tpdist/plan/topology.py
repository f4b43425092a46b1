"""Which rank is where: node sizes to global ranks, tensor-parallel groups and pipeline stages.

Global ranks are node-major, the head's first, then those of worker 0, worker 1 and so on. A tensor-parallel group is
a run of consecutive ranks, and each group is one stage. Knows no addresses and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tpdist.errors import JoinError, PlanError


@dataclass(frozen=True)
class RankPlace:
    """Where one rank is: on its node (`local_rank`), in its stage, and in the tensor-parallel group of that stage."""

    rank: int
    node_index: int
    local_rank: int
    stage: int
    tp_rank: int


@dataclass(frozen=True)
class Topology:
    """The ranks of a cluster; `node_sizes` in rank order. Raises PlanError unless tp_size * pp_size ranks are there."""

    node_sizes: tuple[int, ...]
    tp_size: int
    pp_size: int

    def __post_init__(self) -> None:
        if self.tp_size < 1 or self.pp_size < 1 or self.tp_size * self.pp_size != self.world_size:
            raise PlanError(
                f"{self.world_size} ranks ({_named(self.node_sizes)}) are not tensor-parallel size {self.tp_size} "
                f"times {self.pp_size} pipeline stages; change --tensor-parallel-size or --pipeline-parallel-size"
            )

    @property
    def world_size(self) -> int:
        return sum(self.node_sizes)

    @property
    def places(self) -> tuple[RankPlace, ...]:
        """One per rank, in rank order."""
        spots = [(node, local_rank) for node, size in enumerate(self.node_sizes) for local_rank in range(size)]
        return tuple(
            RankPlace(rank, node, local_rank, rank // self.tp_size, rank % self.tp_size)
            for rank, (node, local_rank) in enumerate(spots)
        )

    def first_rank(self, node_index: int) -> int:
        """The global rank of a node's local rank 0."""
        return sum(self.node_sizes[:node_index])


def local_world_sizes(requested: Sequence[int | None], global_world_size: int) -> tuple[int, ...]:
    """The number of ranks on each node, head first. A node that asks for None gets its even share of what the others
    leave; earlier nodes get the extra ones. Raises JoinError if that leaves a node without a rank, or the sum is not
    `global_world_size`."""
    open_nodes = [node for node, size in enumerate(requested) if size is None]
    rest = global_world_size - sum(size for size in requested if size is not None)
    if rest < len(open_nodes) or (rest and not open_nodes) or any(size == 0 for size in requested):
        raise JoinError(
            f"MISTRALRS_MN_GLOBAL_WORLD_SIZE is {global_world_size}, but the nodes' MISTRALRS_MN_LOCAL_WORLD_SIZE are "
            f"{_named(requested)}; they must add up, with at least one rank on every node"
        )
    sizes = list(requested)
    for position, node in enumerate(open_nodes):
        sizes[node] = rest // len(open_nodes) + (position < rest % len(open_nodes))
    return tuple(size for size in sizes if size is not None)


def _named(sizes: Sequence[int | None]) -> str:
    """Sizes with the names of their nodes, such as `head 2, worker 0 unset`."""
    names = ["head", *(f"worker {index}" for index in range(len(sizes) - 1))]
    return ", ".join(f"{name} {'unset' if size is None else size}" for name, size in zip(names, sizes, strict=True))
