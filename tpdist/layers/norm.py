"""Root-mean-square layer normalization (https://arxiv.org/abs/1910.07467)."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x ** 2) + eps), over the last dim. Replicated.

    Normalizes in float32 and rounds to x's dtype before the weight, as transformers does.
    """

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps: Tensor
        self.register_buffer("eps", torch.tensor(eps, dtype=torch.float32, device=device), persistent=False)
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size]; returns the same shape and dtype."""
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self.weight)
