"""Every sharded layer against its unsharded self: all ranks of a group, one after another, in this process.

Tolerances: float32 sums over 24 to 60 products of numbers near 1, taken in another order, differ by some 1e-6.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tpdist.layers.embedding import LMHead, VocabParallelEmbedding
from tpdist.layers.linear import ColumnParallelLinear, GateUpParallelLinear, QKVParallelLinear, RowParallelLinear
from tpdist.parallel.group import FakeGroup, SingleGroup
from tpdist.plan.shards import Blocks, Interval, KeyValueHeads, Partition, QueryHeads, Rows

PARTITIONS = [Partition((1,)), Partition((1, 1)), Partition((2, 1)), Partition((1, 1, 1)), Partition((1, 5, 2))]
OPTIONS = {"dtype": torch.float32, "device": torch.device("cpu")}
HIDDEN, HEAD_DIM = 24, 6

partitions = pytest.mark.parametrize("partition", PARTITIONS, ids=lambda partition: str(partition.shares))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000 * len(shape)))


def rows(tensor: Tensor, interval: Interval, unit: int = 1) -> Tensor:
    return tensor[interval.start * unit : interval.stop * unit]


def fill(layer: ColumnParallelLinear, leaf: str, parts: list[Tensor]) -> None:
    for part, values in enumerate(parts):
        layer.part_view(leaf, part).copy_(values)


@partitions
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(12, 4), (6, 3), (8, 1), (9, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_each_rank_projects_its_own_query_key_and_value_heads(partition, num_heads, num_kv_heads, bias):
    x = random(5, HIDDEN)
    sizes = [num_heads * HEAD_DIM, num_kv_heads * HEAD_DIM, num_kv_heads * HEAD_DIM]
    weights = [random(size, HIDDEN, seed=part) for part, size in enumerate(sizes)]
    biases = [random(size, seed=part) if bias else None for part, size in enumerate(sizes)]
    whole = [F.linear(x, weight, b) for weight, b in zip(weights, biases, strict=True)]
    for rank in range(partition.size):
        query = partition.interval(QueryHeads(num_heads, num_kv_heads), rank)
        key = partition.interval(KeyValueHeads(num_heads, num_kv_heads), rank)
        layer = QKVParallelLinear(HIDDEN, query_heads=query, kv_heads=key, head_dim=HEAD_DIM, bias=bias, **OPTIONS)
        intervals = (query, key, key)
        fill(layer, "weight", [rows(w, i, HEAD_DIM) for w, i in zip(weights, intervals, strict=True)])
        if bias:
            fill(layer, "bias", [rows(b, i, HEAD_DIM) for b, i in zip(biases, intervals, strict=True)])
        expected = [rows(y.T, i, HEAD_DIM).T for y, i in zip(whole, intervals, strict=True)]
        torch.testing.assert_close(layer(x), torch.cat(expected, dim=-1), rtol=1e-5, atol=1e-5)


@partitions
@pytest.mark.parametrize("size", [60, 61, 259])
@pytest.mark.parametrize("bias", [False, True])
def test_the_ranks_of_a_gated_mlp_add_up_to_the_whole(partition, size, bias):
    x = random(5, HIDDEN)
    gate, up, down = random(size, HIDDEN, seed=1), random(size, HIDDEN, seed=2), random(HIDDEN, size, seed=3)
    gate_bias, up_bias, down_bias = random(size, seed=4), random(size, seed=5), random(HIDDEN, seed=6)
    inner = F.silu(F.linear(x, gate, gate_bias if bias else None)) * F.linear(x, up, up_bias if bias else None)
    total = torch.zeros(5, HIDDEN)
    for rank in range(partition.size):
        group, columns = FakeGroup(rank=rank, size=partition.size), partition.interval(Blocks(size), rank)
        gate_up = GateUpParallelLinear(HIDDEN, columns=columns, bias=bias, **OPTIONS)
        fill(gate_up, "weight", [rows(gate, columns), rows(up, columns)])
        if bias:
            fill(gate_up, "bias", [rows(gate_bias, columns), rows(up_bias, columns)])
        row_parallel = RowParallelLinear(HIDDEN, columns=columns, group=group, bias=False, **OPTIONS)
        row_parallel.weight.copy_(rows(down.T, columns).T)
        local_gate, local_up = gate_up(x).chunk(2, dim=-1)
        total += row_parallel(F.silu(local_gate) * local_up)
    torch.testing.assert_close(total, F.linear(inner, down), rtol=1e-4, atol=1e-4)
    whole = RowParallelLinear(HIDDEN, columns=Interval(0, size), group=SingleGroup(), bias=True, **OPTIONS)
    whole.weight.copy_(down)
    whole.bias.copy_(down_bias)
    torch.testing.assert_close(whole(inner), total + down_bias, rtol=1e-4, atol=1e-4)


class EchoGroup(FakeGroup):
    """Every rank adds the same part."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x * self.size


def test_a_row_parallel_bias_is_added_once_after_the_sum():
    layer = RowParallelLinear(3, columns=Interval(2, 4), group=EchoGroup(rank=1, size=4), bias=True, **OPTIONS)
    layer.weight.fill_(1.0)
    layer.bias.fill_(0.5)
    assert layer(torch.ones(1, 2)).tolist() == [[8.5, 8.5, 8.5]]


@partitions
@pytest.mark.parametrize("vocab_size", [40, 515])
def test_the_ranks_of_an_embedding_add_up_to_the_whole_bit_for_bit(partition, vocab_size):
    table = random(vocab_size, HIDDEN)
    token_ids = torch.tensor([0, vocab_size - 1, 7, 7, vocab_size // 2, vocab_size // 3, vocab_size // 3 + 1])
    total = torch.zeros(len(token_ids), HIDDEN)
    for rank in range(partition.size):
        interval = partition.interval(Rows(vocab_size), rank)
        group = FakeGroup(rank=rank, size=partition.size)
        layer = VocabParallelEmbedding(HIDDEN, rows=interval, group=group, **OPTIONS)
        layer.weight.copy_(rows(table, interval))
        total += layer(token_ids)
    assert torch.equal(total, table[token_ids])


@partitions
@pytest.mark.parametrize("vocab_size", [40, 515])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_logits_are_float32_and_those_of_the_whole(partition, vocab_size, dtype):
    table, x = random(vocab_size, HIDDEN).to(dtype), random(3, HIDDEN).to(dtype)
    intervals = Rows(vocab_size).intervals(partition.shares)
    total = torch.zeros(3, vocab_size)
    for rank in range(partition.size):
        group = FakeGroup(rank=rank, size=partition.size)
        head = LMHead(HIDDEN, rows=intervals, group=group, dtype=dtype, device=torch.device("cpu"))
        head.weight.copy_(rows(table, intervals[rank]))
        total += head(x)
    assert total.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # one rounding to 8 bits of a number below 20
    torch.testing.assert_close(total, F.linear(x, table).float(), rtol=tolerance, atol=tolerance)


def test_a_tied_head_shares_the_parameter_of_the_embedding():
    embedding = VocabParallelEmbedding(HIDDEN, rows=Interval(0, 9), group=SingleGroup(), **OPTIONS)
    head = LMHead(HIDDEN, rows=[Interval(0, 9)], group=SingleGroup(), tied_to=embedding, **OPTIONS)
    assert head.weight is embedding.weight


def test_a_part_view_is_a_view_of_the_parameter():
    layer = ColumnParallelLinear(4, parts=(2, 1, 3), bias=True, **OPTIONS)
    layer.weight.zero_()
    layer.bias.zero_()
    layer.part_view("weight", 1).fill_(1.0)
    layer.part_view("bias", 2).fill_(2.0)
    assert layer.weight[:, 0].tolist() == [0, 0, 1, 0, 0, 0]
    assert layer.bias.tolist() == [0, 0, 0, 2, 2, 2]
