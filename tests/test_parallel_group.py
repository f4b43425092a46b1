import pytest
import torch

from tpdist.parallel.group import FakeGroup, SingleGroup, sum_in_rank_order


def test_a_single_group_changes_nothing():
    group, x = SingleGroup(), torch.arange(6.0).view(2, 3)
    assert group.all_reduce(x) is x
    assert group.gather(x, sizes=[3]) is x
    assert group.broadcast(x) is x


def test_a_rank_outside_its_group_is_refused():
    with pytest.raises(AssertionError, match="rank 3 of 3"):
        FakeGroup(rank=3, size=3)


def test_a_fake_group_gathers_zeros_for_the_others():
    gathered = FakeGroup(rank=1, size=3).gather(torch.ones(2, 2), sizes=[1, 2, 3])
    assert gathered.tolist() == [[0, 1, 1, 0, 0, 0]] * 2


def test_a_shard_of_another_size_than_promised_is_refused():
    with pytest.raises(AssertionError, match="rank 1 of sizes"):
        FakeGroup(rank=1, size=2).gather(torch.ones(2, 2), sizes=[2, 3])


def test_the_sum_runs_in_rank_order():
    # In float32, 1e8 + 1 == 1e8: the sum depends on the order.
    forward, backward = [1.0, 1e8, -1e8], [-1e8, 1e8, 1.0]
    assert sum_in_rank_order(torch.tensor(forward)[:, None], out=torch.empty(1)).item() == 0.0
    assert sum_in_rank_order(torch.tensor(backward)[:, None], out=torch.empty(1)).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_sums_round_once(dtype):
    # 256 + 0.5 rounds to 256 in both types, so that rounding after each addition would lose all of the small parts.
    parts = torch.tensor([[2048.0], [0.5], [0.5], [7.0]], dtype=dtype)
    exact = torch.tensor([2056.0], dtype=dtype)
    assert torch.equal(sum_in_rank_order(parts, out=torch.empty(1, dtype=dtype)), exact)
