"""Matrix products with a weight that does not change, which oneDNN packs once on a CPU.

A plain product packs its weight anew in every call: a decode of one token then reaches about half of the memory
bandwidth. `PackableLinear` is the base of the layers that hold such a weight. It knows nothing of groups or shards.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_ROWS = 4
"""Fewer rows are padded to this many: oneDNN's kernels read the weight faster for four rows than for one."""


class PackableLinear(nn.Module):
    """Holds `weight`, [out_features, in_features]. A CPU packs it when `finish_loading` says that it is complete; then
    the packed copy alone is held, and `weight` is empty."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._packed: Tensor | None = None

    def finish_loading(self, leaf: str) -> None:
        """Pack the weight if this device and dtype allow it. Peak memory: the weight twice, for this layer alone."""
        if leaf == "weight" and can_pack(self.weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), LEAST_ROWS)
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    @property
    def packed_bytes(self) -> int:
        """What the packed copy takes."""
        return 0 if self._packed is None else self._packed.numel() * self._packed.element_size()

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias. x: [num_rows, in_features]; returns [num_rows, out_features]."""
        if self._packed is None:
            return F.linear(x, self.weight, bias)
        num_rows = len(x)
        if num_rows < LEAST_ROWS:
            x = x.expand(LEAST_ROWS, -1) if num_rows == 1 else F.pad(x, (0, 0, 0, LEAST_ROWS - num_rows))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return y[:num_rows]


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has kernels of its own for products with this weight."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or weight.numel() == 0 or not available:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
