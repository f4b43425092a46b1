"""Linear layers whose weight is split over the ranks of a tensor-parallel group.

Column-parallel layers hold some output rows of W and give their part of y; row-parallel layers hold some input columns,
take their part of x, and give the whole y after a sum over the ranks. A pair of the two needs one all-reduce. Parts may
differ in size between ranks. Which rows or columns a rank holds was decided by the plan; here they are only Intervals.

`part_view(leaf, part)` is where a loader copies each part of a parameter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tpdist.layers.packed import PackableLinear
from tpdist.parallel.group import RankGroup
from tpdist.plan.shards import Interval


class ColumnParallelLinear(PackableLinear):
    """y[:, I_r] = x @ W[I_r].T + b[I_r]          no collective

    W[I_r]: [sum(parts), in_features], one or more parts (as q, k and v) one below the other, each of which may be
    another layer in the checkpoint.
    """

    def __init__(
        self, in_features: int, *, parts: Sequence[int], bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        """parts: this rank's number of rows of each part."""
        rows = sum(parts)
        super().__init__(_empty(rows, in_features, dtype=dtype, device=device))
        self.parts = tuple(parts)
        self.bias = _empty(rows, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features], replicated; returns [num_tokens, sum(parts)], sharded."""
        return self.product(x, self.bias)

    def part_view(self, leaf: str, part: int) -> Tensor:
        """The rows of one part of `leaf` (weight or bias), as a view."""
        parameter: Tensor = self.get_parameter(leaf)
        return parameter.narrow(0, sum(self.parts[:part]), self.parts[part])


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections of this rank's heads in one product; parts 0, 1, 2 are q, k, v.

    W[I_r]: [(num_query_heads + 2 * num_kv_heads) * head_dim, hidden_size], heads counted on this rank.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        query_heads: Interval,
        kv_heads: Interval,
        head_dim: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        heads = (query_heads.size, kv_heads.size, kv_heads.size)
        super().__init__(hidden_size, parts=[size * head_dim for size in heads], bias=bias, dtype=dtype, device=device)


class GateUpParallelLinear(ColumnParallelLinear):
    """Gate and up projections of this rank's interval of the intermediate size; parts 0, 1 are gate, up.

    W[I_r]: [2 * columns.size, hidden_size].
    """

    def __init__(
        self, hidden_size: int, *, columns: Interval, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(hidden_size, parts=(columns.size, columns.size), bias=bias, dtype=dtype, device=device)


class RowParallelLinear(PackableLinear):
    """y {partial over tp} = x[:, I_r] @ W[:, I_r].T
    y = all_reduce(y) + b                      bias once, after the sum

    W[:, I_r]: [out_features, columns.size]; b: [out_features], whole on every rank. One all-reduce of
    num_tokens * out_features elements.
    """

    def __init__(
        self,
        out_features: int,
        *,
        columns: Interval,
        group: RankGroup,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(_empty(out_features, columns.size, dtype=dtype, device=device))
        self.group = group
        self.bias = _empty(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, columns.size], sharded; returns [num_tokens, out_features], replicated."""
        y = self.group.all_reduce(self.product(x))
        return y if self.bias is None else y.add_(self.bias)


def _empty(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
