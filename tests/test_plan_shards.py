"""Intervals of every axis for every number of ranks, and the slices that follow from them."""

import math
from itertools import pairwise, product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plans import small_config

from tpdist.errors import PlanError
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.shards import (
    Axis,
    Blocks,
    Interval,
    KeyValueHeads,
    Partition,
    QueryHeads,
    Rows,
    Split,
    WeightSpec,
    check_shardable,
    local_shape,
    slices,
)

shares = st.lists(st.integers(1, 100), min_size=1, max_size=16).map(tuple)
heads = st.tuples(st.integers(1, 16), st.integers(1, 8))


def sizes(axis: Axis, shares: tuple[int, ...]) -> list[int]:
    return [interval.size for interval in axis.intervals(shares)]


def assert_covers(axis: Axis, shares: tuple[int, ...], size: int) -> None:
    intervals = axis.intervals(shares)
    assert len(intervals) == len(shares)
    assert intervals[0].start == 0
    assert intervals[-1].stop == size
    assert all(before.stop == after.start for before, after in pairwise(intervals))
    assert all(interval.size > 0 for interval in intervals)


@given(size=st.integers(1, 200_000), shares=shares)
def test_rows_and_blocks_cover_their_size_exactly_and_are_never_empty(size: int, shares: tuple[int, ...]) -> None:
    assume(size >= len(shares))
    assert_covers(Rows(size), shares, size)
    assert_covers(Blocks(size), shares, size)


@given(heads=heads, shares=shares)
def test_query_heads_are_covered_exactly_and_each_goes_with_its_key_value_head(
    heads: tuple[int, int], shares: tuple[int, ...]
) -> None:
    num_kv, group = heads
    assume(len(shares) <= num_kv * group)
    assert_covers(QueryHeads(num_kv * group, num_kv), shares, num_kv * group)
    queries = QueryHeads(num_kv * group, num_kv).intervals(shares)
    keys = KeyValueHeads(num_kv * group, num_kv).intervals(shares)
    for query, key in zip(queries, keys, strict=True):
        assert key.start == query.start // group
        assert key.stop == (query.stop - 1) // group + 1


@given(heads=heads, shares=shares)
def test_ranks_beyond_the_key_value_heads_hold_exactly_one_each(
    heads: tuple[int, int], shares: tuple[int, ...]
) -> None:
    num_kv, group = heads
    assume(num_kv < len(shares) <= num_kv * group)
    keys = KeyValueHeads(num_kv * group, num_kv).intervals(shares)
    assert all(key.size == 1 for key in keys)
    assert {key.start for key in keys} == set(range(num_kv))
    assert list(keys) == sorted(keys)


@given(size=st.integers(1, 200_000), shares=shares)
def test_rows_are_within_one_of_the_proportional_part_unless_that_is_less_than_one(
    size: int, shares: tuple[int, ...]
) -> None:
    quotas = [size * share / sum(shares) for share in shares]
    assume(min(quotas) >= 1)
    for count, quota in zip(sizes(Rows(size), shares), quotas, strict=True):
        assert abs(count - quota) < 1


@pytest.mark.parametrize(
    ("axis", "shares", "expected"),
    [
        (Rows(32000), (2, 1), [21333, 10667]),
        (Rows(10), (1, 1, 1), [4, 3, 3]),
        (Rows(100), (97, 1, 1, 1), [97, 1, 1, 1]),
        (Rows(3), (100, 1, 1), [1, 1, 1]),
        (KeyValueHeads(32, 8), (1, 1, 1), [3, 3, 2]),
        (QueryHeads(32, 8), (1, 1, 1), [12, 12, 8]),
        (QueryHeads(32, 8), (2, 1), [20, 12]),
        (QueryHeads(12, 12), (2, 1), [8, 4]),
        (QueryHeads(32, 2), (1, 1, 1), [8, 8, 16]),
        (QueryHeads(12, 1), (2, 1), [8, 4]),
        (QueryHeads(8, 4), (1,) * 5, [1, 1, 2, 2, 2]),
        (Blocks(11008), (1, 1, 1), [3712, 3648, 3648]),
        (Blocks(14336), (2, 1), [9536, 4800]),
        (Blocks(176), (1, 1), [96, 80]),
        (Blocks(100), (1, 1), [56, 44]),
        (Blocks(3), (1, 1, 1), [1, 1, 1]),
    ],
)
def test_uneven_shares_are_dealt_as_documented(axis: Axis, shares: tuple[int, ...], expected: list[int]) -> None:
    assert sizes(axis, shares) == expected


@given(size=st.integers(64, 100_000), num_ranks=st.integers(1, 8))
def test_blocks_start_at_multiples_of_the_largest_block_that_leaves_four_per_rank(size: int, num_ranks: int) -> None:
    fitting = [block for block in (1, 2, 4, 8, 16, 32, 64) if size >= 4 * block * num_ranks]
    starts = [interval.start for interval in Blocks(size).intervals((1,) * num_ranks)]
    assert all(start % max(fitting) == 0 for start in starts)


@pytest.mark.parametrize("axis", [Rows(2), Blocks(2), QueryHeads(2, 1), QueryHeads(2, 2), KeyValueHeads(2, 1)])
def test_more_ranks_than_steps_are_refused(axis: Axis) -> None:
    with pytest.raises(PlanError, match="3 ranks"):
        axis.intervals((1, 1, 1))


@pytest.mark.parametrize("shares", [(), (1, 0), (2, -1)])
def test_a_share_that_is_not_positive_is_refused(shares: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="positive share"):
        Partition(shares)


def test_a_rank_with_no_heads_is_refused_with_all_numbers_and_what_would_work() -> None:
    config = small_config(num_attention_heads=8, num_key_value_heads=2)
    check_shardable(config, Partition.even(8))
    with pytest.raises(PlanError, match=r"size 9.* 8 query heads \(2 key-value heads with groups of 4\).*at most 8"):
        check_shardable(config, Partition.even(9))


@given(
    heads=heads,
    unit=st.integers(1, 4),
    dim=st.integers(0, 1),
    offset=st.integers(0, 5),
    shares=shares,
)
def test_slices_lie_side_by_side_in_the_part_of_the_tensor(
    heads: tuple[int, int], unit: int, dim: int, offset: int, shares: tuple[int, ...]
) -> None:
    num_heads = heads[0] * heads[1]
    assume(len(shares) <= num_heads)
    shape = (num_heads * unit, 7) if dim == 0 else (7, num_heads * unit)
    split = Split(dim, QueryHeads(num_heads, heads[0]), unit)
    spec = WeightSpec(name="w", shape=shape, parameter="w", split=split, offset=offset)
    partition = Partition(shares)
    parts = [slices(spec, partition, rank) for rank in range(partition.size)]
    assert parts[0][dim].start == offset
    assert parts[-1][dim].stop == offset + shape[dim]
    assert all(before[dim].stop == after[dim].start for before, after in pairwise(parts))
    assert all(part[1 - dim] == slice(0, 7) for part in parts)
    total = sum(math.prod(local_shape(spec, partition, rank)) for rank in range(partition.size))
    assert total == math.prod(shape)


def test_a_weight_without_split_is_whole_on_every_rank() -> None:
    spec = WeightSpec(name="norm", shape=(64,), parameter="norm")
    assert all(slices(spec, Partition.even(3), rank) == (slice(0, 64),) for rank in range(3))


def test_the_table_names_every_tensor_once_and_no_part_twice() -> None:
    for bias, norm, tied in product((False, True), repeat=3):
        config = small_config(qkv_bias=bias, o_bias=bias, mlp_bias=bias, qk_norm=norm, tie_word_embeddings=tied)
        weights = decoder_weights(config)
        assert len({spec.name for spec in weights.specs}) == len(weights.specs)
        assert len({(spec.parameter, spec.part) for spec in weights.specs}) == len(weights.specs)
        assert ("lm_head.weight" in {spec.name for spec in weights.specs}) is not tied


def test_the_biases_after_a_sum_are_whole_on_every_rank() -> None:
    weights = decoder_weights(small_config(o_bias=True, mlp_bias=True))
    after_sum = [spec for spec in weights.specs if spec.name.endswith(("o_proj.bias", "down_proj.bias"))]
    assert len(after_sum) == 2 * small_config().num_hidden_layers
    assert all(spec.split is None for spec in after_sum)


def test_an_interval_knows_its_size() -> None:
    assert Interval(3, 7).size == 4
