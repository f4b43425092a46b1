"""Token embedding and output projection, split by vocabulary rows over a tensor-parallel group."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpdist.layers.packed import PackableLinear
from tpdist.parallel.group import RankGroup
from tpdist.plan.shards import Interval


class VocabParallelEmbedding(nn.Module):
    """y {partial over tp} = E[ids] for ids in I_r, else 0
    y = all_reduce(y)                          exact: only one rank adds anything but zeros

    E[I_r]: [rows.size, hidden_size]. One all-reduce of num_tokens * hidden_size elements.
    """

    def __init__(
        self, hidden_size: int, *, rows: Interval, group: RankGroup, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.rows = rows
        self.group = group
        shape = (rows.size, hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [num_tokens], replicated, each below the vocabulary size; returns [num_tokens, hidden_size]."""
        if self.group.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.rows.start
        foreign = (local < 0) | (local >= self.rows.size)
        embedded = F.embedding(local.masked_fill_(foreign, 0), self.weight)
        return self.group.all_reduce(embedded.masked_fill_(foreign[:, None], 0))


class LMHead(PackableLinear):
    """logits[:, I_r] = x @ W[I_r].T; logits = gather(logits) on rank 0

    W[I_r]: [rows[rank].size, hidden_size]. One gather of num_tokens * vocab_size elements, in x's dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        rows: Sequence[Interval],
        group: RankGroup,
        dtype: torch.dtype,
        device: torch.device,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        """rows: every rank's interval of the vocabulary. `tied_to`: use this embedding's parameter, not an own one;
        it is not packed, since tokens are looked up in it."""
        if tied_to is None:
            weight = torch.empty(rows[group.rank].size, hidden_size, dtype=dtype, device=device)
            super().__init__(nn.Parameter(weight, requires_grad=False))
        else:
            super().__init__(tied_to.weight)
        self.sizes = tuple(interval.size for interval in rows)
        self.group = group

    def forward(self, x: Tensor) -> Tensor | None:
        """x: [num_tokens, hidden_size], replicated; returns float32 [num_tokens, vocab_size] on rank 0, else None."""
        logits = self.group.gather(self.product(x), sizes=self.sizes)
        return None if logits is None else logits.float()
