"""Which part of every weight each rank of a tensor-parallel group holds: intervals, not divisions.

An axis is what a dimension is counted in: query heads, key-value heads, blocks of the intermediate size, vocabulary
rows. It cuts itself into one interval per rank, never empty, in proportion to the ranks' shares. A split lays an axis
along one dimension of a tensor. A weight spec names a tensor of the checkpoint, the parameter it belongs to and its
split.

Knows no files and no torch: shapes are tuples, and a slice is meant for the checkpoint's tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

from tpdist.errors import PlanError
from tpdist.plan.model_config import ModelConfig

MAX_BLOCK = 64
MIN_BLOCKS_PER_RANK = 4


class Interval(NamedTuple):
    """The steps start <= i < stop of an axis."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Axis(Protocol):
    """Something that is dealt to the ranks of a tensor-parallel group."""

    def intervals(self, shares: tuple[int, ...]) -> tuple[Interval, ...]:
        """One interval per rank, none empty, covering the axis in rank order. PlanError if there are too many ranks."""
        ...


@dataclass(frozen=True)
class KeyValueHeads:
    """Key-value heads, consecutive ones on a rank; with more ranks than heads, consecutive ranks hold the same one."""

    num_attention_heads: int
    num_key_value_heads: int

    def intervals(self, shares: tuple[int, ...]) -> tuple[Interval, ...]:
        if len(shares) <= self.num_key_value_heads:
            return _consecutive(_apportion(self.num_key_value_heads, shares))
        counts = _ranks_per_head(self, len(shares))
        return tuple(Interval(head, head + 1) for head, count in enumerate(counts) for _ in range(count))


@dataclass(frozen=True)
class QueryHeads:
    """Query heads. They go with their key-value head; the ranks that share one deal its group among themselves."""

    num_attention_heads: int
    num_key_value_heads: int

    def intervals(self, shares: tuple[int, ...]) -> tuple[Interval, ...]:
        heads = KeyValueHeads(self.num_attention_heads, self.num_key_value_heads)
        group = self.num_attention_heads // self.num_key_value_heads
        if len(shares) <= self.num_key_value_heads:
            return tuple(Interval(i.start * group, i.stop * group) for i in heads.intervals(shares))
        bounds = [0, *accumulate(_ranks_per_head(heads, len(shares)))]
        return _consecutive([n for start, stop in pairwise(bounds) for n in _apportion(group, shares[start:stop])])


@dataclass(frozen=True)
class Blocks:
    """A size dealt in blocks of a power of two, at most `block`: the largest that still gives every rank four of them
    on average. The last block may be short."""

    size: int
    block: int = MAX_BLOCK

    def intervals(self, shares: tuple[int, ...]) -> tuple[Interval, ...]:
        block = self.block
        while block > 1 and self.size < MIN_BLOCKS_PER_RANK * block * len(shares):
            block //= 2
        counts = _apportion(-(-self.size // block), shares)
        return tuple(Interval(i.start * block, min(i.stop * block, self.size)) for i in _consecutive(counts))


@dataclass(frozen=True)
class Rows:
    """A size that may be cut anywhere, such as the rows of a vocabulary."""

    size: int

    def intervals(self, shares: tuple[int, ...]) -> tuple[Interval, ...]:
        return _consecutive(_apportion(self.size, shares))


@dataclass(frozen=True)
class Partition:
    """The ranks of one tensor-parallel group: a positive weight for each, in rank order."""

    shares: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.shares or min(self.shares) < 1:
            raise PlanError(f"a partition needs one positive share per rank, got {self.shares}")

    @classmethod
    def even(cls, size: int) -> "Partition":
        return cls((1,) * size)

    @property
    def size(self) -> int:
        return len(self.shares)

    def interval(self, axis: Axis, rank: int) -> Interval:
        """What `rank` of this group holds of `axis`."""
        return _intervals(axis, self.shares)[rank]  # type: ignore[arg-type]  # every axis is a frozen dataclass


@lru_cache(maxsize=4096)
def _intervals(axis: Axis, shares: tuple[int, ...]) -> tuple[Interval, ...]:
    """Plans ask for the same ones once for each rank."""
    return axis.intervals(shares)


@dataclass(frozen=True)
class Split:
    """`axis` lies along dimension `dim`; one step of it is `unit` elements (head_dim, for heads)."""

    dim: int
    axis: Axis
    unit: int = 1

    def elements(self, partition: Partition, rank: int) -> Interval:
        """The elements of the dimension that `rank` holds, counted from the start of the part."""
        interval = partition.interval(self.axis, rank)
        return Interval(interval.start * self.unit, interval.stop * self.unit)


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """One tensor of a checkpoint, or one part of a tensor that is fused on disk, and where it goes.

    `name` stands in the checkpoint. `parameter` is the dotted path of ours; several specs with the same one are its
    parts, in the order of `part`. `shape` is the whole part over all ranks; in the checkpoint's tensor it starts at
    `offset` along the split dimension (dimension 0 without a split). Without a split every rank holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    part: int = 0
    split: Split | None = None
    offset: int = 0

    @property
    def dim(self) -> int:
        """The dimension along which parts of one tensor lie."""
        return self.split.dim if self.split else 0


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All that a model takes from its checkpoint.

    `ignorable` are regular expressions of names that may stand in a checkpoint unused. `tied` are pairs (unused name,
    used name): if a checkpoint holds both, they must be equal.
    """

    specs: tuple[WeightSpec, ...]
    ignorable: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()


def slices(spec: WeightSpec, partition: Partition, rank: int) -> tuple[slice, ...]:
    """What `rank` holds of the checkpoint's tensor, one slice per dimension."""
    bounds = [(0, size) for size in spec.shape]
    if spec.split:
        bounds[spec.dim] = spec.split.elements(partition, rank)
    start, stop = bounds[spec.dim]
    bounds[spec.dim] = (start + spec.offset, stop + spec.offset)
    return tuple(slice(start, stop) for start, stop in bounds)


def local_shape(spec: WeightSpec, partition: Partition, rank: int) -> tuple[int, ...]:
    """The shape of what `rank` holds."""
    return tuple(part.stop - part.start for part in slices(spec, partition, rank))


def query_heads(config: ModelConfig) -> QueryHeads:
    return QueryHeads(config.num_attention_heads, config.num_key_value_heads)


def key_value_heads(config: ModelConfig) -> KeyValueHeads:
    return KeyValueHeads(config.num_attention_heads, config.num_key_value_heads)


def check_shardable(config: ModelConfig, partition: Partition) -> None:
    """Raise PlanError, with all numbers, if some rank of `partition` would get nothing of some axis."""
    tp_size = partition.size
    limit = min(config.num_attention_heads, config.intermediate_size, config.vocab_size)
    if tp_size <= limit:
        return
    group = config.num_attention_heads // config.num_key_value_heads
    raise PlanError(
        f"{config.architecture} cannot be sharded over tensor-parallel size {tp_size}: it has "
        f"{config.num_attention_heads} query heads ({config.num_key_value_heads} key-value heads with groups of "
        f"{group}), intermediate size {config.intermediate_size} and {config.vocab_size} vocabulary rows, and every "
        f"rank needs at least one of each; use a tensor-parallel size of at most {limit}, with "
        f"pipeline stages for the other ranks"
    )


def _ranks_per_head(heads: KeyValueHeads, num_ranks: int) -> tuple[int, ...]:
    """How many consecutive ranks hold each key-value head; earlier heads get the extra rank."""
    counts = _apportion(num_ranks, (1,) * heads.num_key_value_heads)
    if max(counts) * heads.num_key_value_heads > heads.num_attention_heads:
        raise PlanError(
            f"{num_ranks} ranks cannot share {heads.num_attention_heads} query heads; use at most as many ranks"
        )
    return counts


def _apportion(total: int, shares: tuple[int, ...]) -> tuple[int, ...]:
    """Deal `total` units in proportion to `shares`: at least one each, then by largest remainder, the earlier rank
    first among equals (https://en.wikipedia.org/wiki/Largest_remainders_method)."""
    if total < len(shares):
        raise PlanError(f"{total} units cannot be dealt to {len(shares)} ranks; use at most {total} ranks")
    counts = dict.fromkeys(_too_small(total, shares), 1)
    ranks = [rank for rank in range(len(shares)) if rank not in counts]
    rest, weight = total - len(counts), sum(shares[rank] for rank in ranks)
    counts |= {rank: rest * shares[rank] // weight for rank in ranks}
    by_remainder = sorted(ranks, key=lambda rank: -(rest * shares[rank] % weight))
    for rank in by_remainder[: total - sum(counts.values())]:
        counts[rank] += 1
    return tuple(counts[rank] for rank in range(len(shares)))


def _too_small(total: int, shares: tuple[int, ...]) -> set[int]:
    """Ranks whose proportional part would be less than one unit once all such ranks have been given one."""
    small: set[int] = set()
    while True:
        weight = sum(share for rank, share in enumerate(shares) if rank not in small)
        rest = total - len(small)
        more = {rank for rank, share in enumerate(shares) if rank not in small and rest * share < weight}
        if not more:
            return small
        small |= more


def _consecutive(counts: Sequence[int]) -> tuple[Interval, ...]:
    """Intervals of these sizes, one after another from zero."""
    return tuple(Interval(start, stop) for start, stop in pairwise((0, *accumulate(counts))))
