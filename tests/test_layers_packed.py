"""Packed products against plain ones, in one process.

Tolerance: sums of 40 to 130 products of numbers near 1, taken in another order; 16-bit results are rounded once.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpdist.layers.packed import LEAST_ROWS, PackableLinear, can_pack

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def layer_of(weight: Tensor) -> PackableLinear:
    layer = PackableLinear(nn.Parameter(weight.clone(), requires_grad=False))
    layer.finish_loading("weight")
    return layer


@dtypes
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 128), (1, 1), (7, 40), (515, 45), (33, 130)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_is_the_plain_one_for_any_number_of_rows(dtype, out_features, in_features, bias):
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    added = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    layer = layer_of(weight)
    for num_rows in (1, 2, LEAST_ROWS - 1, LEAST_ROWS, 5, 16, 67):
        x = torch.randn(num_rows, in_features, generator=generator).to(dtype)
        tolerance = TOLERANCES[dtype] * in_features**0.5
        torch.testing.assert_close(
            layer.product(x, added), F.linear(x, weight, added), rtol=TOLERANCES[dtype], atol=tolerance
        )


@dtypes
def test_a_row_has_the_same_product_whether_it_is_padded_or_not(dtype):
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(torch.randn(30, 50, generator=generator).to(dtype))
    x = torch.randn(LEAST_ROWS, 50, generator=generator).to(dtype)
    torch.testing.assert_close(layer.product(x[:1]), layer.product(x)[:1])


def test_the_plain_weight_goes_once_it_is_packed():
    layer = layer_of(torch.ones(6, 8))
    assert can_pack(torch.ones(6, 8))
    assert layer.weight.numel() == 0


def test_what_cannot_be_packed_stays_as_it_is():
    layer = layer_of(torch.ones(0, 8))
    assert layer.product(torch.ones(3, 8)).shape == (3, 0)
    wide = layer_of(torch.ones(2, 8, dtype=torch.float64))
    assert wide.product(torch.ones(1, 8, dtype=torch.float64)).tolist() == [[8.0, 8.0]]


def test_only_the_weight_is_packed():
    layer = PackableLinear(nn.Parameter(torch.ones(2, 8), requires_grad=False))
    layer.finish_loading("bias")
    assert layer.weight.shape == (2, 8)
