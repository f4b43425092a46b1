"""A group of ranks as layers see it: who am I, how many are we, and three collectives.

A layer takes a RankGroup and never asks where the others are: the same layer runs alone (SingleGroup), over processes
(process_group.ProcessGroup), and as any rank of any size inside one process (FakeGroup). This module knows nothing of
sockets, devices or torch.distributed.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tpdist.errors import TpdistError


class PeerLostError(TpdistError):
    """A collective failed or timed out because a peer is gone. Seldom the first cause: the peer has that."""


class RankGroup(ABC):
    """`rank` of `size` ranks. Every rank must enter the same collectives in the same order with tensors of the same
    shape (but for the last dim of `gather`) and dtype."""

    capturable = False
    """Whether a CUDA graph can hold this group's collectives. The same on every rank."""

    def __init__(self, *, rank: int, size: int) -> None:
        assert 0 <= rank < size, f"rank {rank} of {size}"
        self.rank = rank
        self.size = size

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, with equal bits on every rank. May return x itself, changed.

        x: any shape, partial. Raises PeerLostError.
        """

    @abstractmethod
    def gather(self, x: Tensor, *, sizes: Sequence[int]) -> Tensor | None:
        """Concatenate the ranks' shards along the last dim, on rank 0; None on the others.

        x: [..., sizes[rank]]; returns [..., sum(sizes)]. `sizes`: the last dim of every rank's x, known to all.
        Raises PeerLostError.
        """

    @abstractmethod
    def broadcast(self, x: Tensor) -> Tensor:
        """Overwrite x with rank 0's, and return it. Raises PeerLostError."""


class SingleGroup(RankGroup):
    """One rank: every collective is the identity."""

    capturable = True

    def __init__(self) -> None:
        super().__init__(rank=0, size=1)

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, *, sizes: Sequence[int]) -> Tensor:
        assert tuple(sizes) == (x.shape[-1],), f"sizes {tuple(sizes)}, shard {tuple(x.shape)}"
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x


class FakeGroup(RankGroup):
    """Rank `rank` of `size` without peers, who contribute zeros: shapes are right, and partial sums stay partial, so
    that one process can build every rank and add them up itself."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, *, sizes: Sequence[int]) -> Tensor | None:
        """On every rank, unlike a real group, so that each rank's part can be looked at."""
        assert sizes[self.rank] == x.shape[-1], f"rank {self.rank} of sizes {tuple(sizes)}, shard {tuple(x.shape)}"
        return F.pad(x, (sum(sizes[: self.rank]), sum(sizes[self.rank + 1 :])))

    def broadcast(self, x: Tensor) -> Tensor:
        return x


def pad_last_dim(x: Tensor, size: int) -> Tensor:
    """x [..., n] with zeros appended up to [..., size]; x itself when n == size. Contiguous."""
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x.contiguous()


def sum_in_rank_order(parts: Sequence[Tensor], *, out: Tensor) -> Tensor:
    """out = parts[0] + parts[1] + ..., in this order, so that every rank that holds the same parts gets equal bits.

    parts: at least two, each of out's shape and dtype, none of them out. 16-bit types are added in float32 and rounded
    once, which makes the sum as exact as a float32 accumulator of an unsharded matrix product would be.
    """
    if out.dtype not in (torch.bfloat16, torch.float16) or len(parts) == 2:
        # torch adds two 16-bit numbers in float32, too.
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out += part
        return out
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return out.copy_(total)
