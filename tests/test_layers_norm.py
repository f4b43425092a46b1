import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tpdist.layers.norm import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_transformers_but_for_a_rounding(dtype):
    """The sum of squares is added up in another order, and its root is rounded: a few units in the last place."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 3, 40, generator=generator).to(dtype), torch.randn(40, generator=generator).to(dtype)
    reference = LlamaRMSNorm(40, eps=1e-5).to(dtype)
    reference.weight.data.copy_(weight)
    norm = RMSNorm(40, eps=1e-5, dtype=dtype, device=torch.device("cpu"))
    norm.weight.copy_(weight)
    torch.testing.assert_close(norm(x), reference(x), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_a_huge_sixteen_bit_input_does_not_overflow():
    norm = RMSNorm(2, eps=1e-6, dtype=torch.float16, device=torch.device("cpu"))
    norm.weight.fill_(1.0)
    assert norm(torch.full((1, 2), 60000.0, dtype=torch.float16)).tolist() == [[1.0, 1.0]]
