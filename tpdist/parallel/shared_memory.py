"""A group of ranks on one machine whose collectives go through shared memory, and no system call while all keep pace.

It knows nothing of how the ranks found each other (hosts.py), nor of how they wait (segment.py).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tpdist.parallel.group import PeerLostError, RankGroup, sum_in_rank_order
from tpdist.parallel.segment import SLOT_BYTES, MembersLostError, Segment

# Views of the slots are kept for this many (shape, dtype) pairs: a decode step uses a few, over and over.
MAX_SHAPES = 256
# With more than two ranks, larger tensors are added up in shares.
UNDIVIDED_BYTES = 128 * 1024


class SharedMemoryGroup(RankGroup):
    """The members of a segment as ranks, in the same order.

    all_reduce: every rank copies its part into its slot and adds up all slots in rank order: one meeting, x read
    size + 1 times. With more than two ranks a large x is divided: each rank adds up its share of all slots, and copies
    the other ranks' sums: two meetings, x read 4 times whatever the size. Tensors larger than a slot go in pieces.
    CUDA tensors are staged through the host.
    """

    def __init__(self, segment: Segment, *, ranks: Sequence[int]) -> None:
        """ranks: what the members are called in messages."""
        super().__init__(rank=segment.member, size=segment.size)
        self._segment = segment
        self._ranks = tuple(ranks)
        self._views: dict[tuple[torch.Size, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        try:
            divided = self.size > 2 and x.nbytes > UNDIVIDED_BYTES
            return self._in_pieces(x, self._sum_divided_piece if divided else self._sum_piece)
        except MembersLostError as lost:
            raise self._peer_lost("all_reduce", x, lost) from lost

    def gather(self, x: Tensor, *, sizes: Sequence[int]) -> Tensor | None:
        assert len(sizes) == self.size, f"sizes {tuple(sizes)} for {self.size} ranks"
        assert sizes[self.rank] == x.shape[-1], f"rank {self.rank} of sizes {tuple(sizes)}, shard {tuple(x.shape)}"
        shard = x.cpu().reshape(x.shape[:-1].numel(), x.shape[-1])
        try:
            gathered = self._gather_rows(shard, sizes)
        except MembersLostError as lost:
            raise self._peer_lost("gather", x, lost) from lost
        return None if gathered is None else gathered.view(*x.shape[:-1], sum(sizes)).to(x.device)

    def broadcast(self, x: Tensor) -> Tensor:
        try:
            return self._in_pieces(x, self._copy_piece)
        except MembersLostError as lost:
            raise self._peer_lost("broadcast", x, lost) from lost

    def _in_pieces(self, x: Tensor, collective: Callable[[Tensor], object]) -> Tensor:
        """Apply `collective`, which changes its argument and takes at most a slot, contiguous, to all of x."""
        if not x.is_cpu:
            return x.copy_(self._in_pieces(x.cpu(), collective))
        if x.nbytes <= SLOT_BYTES and x.is_contiguous():
            collective(x)
            return x
        flat = x.contiguous().view(-1)
        for piece in torch.split(flat, SLOT_BYTES // x.element_size()):
            collective(piece)
        return x if x.is_contiguous() else x.copy_(flat.view(x.shape))

    def _sum_piece(self, x: Tensor) -> None:
        sum_in_rank_order(self._meet_with(x), out=x)

    def _sum_divided_piece(self, x: Tensor) -> None:
        parts = self._meet_with(x)
        segment = self._segment
        step = segment.begin()
        sums = [self._share(each, rank) for rank, each in enumerate(self._slots(x.shape, x.dtype, step))]
        sum_in_rank_order([self._share(part, self.rank) for part in parts], out=sums[self.rank])
        segment.post(step)
        segment.meet(step)
        torch.cat(sums, out=x.view(-1))

    def _meet_with(self, x: Tensor) -> list[Tensor]:
        """Put x into this rank's slot, and return all ranks' slots, like x each, once all are filled."""
        segment = self._segment
        step = segment.begin()
        parts = self._slots(x.shape, x.dtype, step)
        parts[self.rank].copy_(x)
        segment.post(step)
        segment.meet(step)
        return parts

    def _share(self, x: Tensor, rank: int) -> Tensor:
        """The part of x, flat, that `rank` adds up."""
        return x.view(-1)[x.numel() * rank // self.size : x.numel() * (rank + 1) // self.size]

    def _copy_piece(self, x: Tensor) -> None:
        segment = self._segment
        step = segment.begin()
        source = self._slots(x.shape, x.dtype, step)[0]
        if self.rank == 0:
            source.copy_(x)
            segment.post(step)
        else:
            segment.post(step)
            segment.wait_for(0, step)
            x.copy_(source)

    def _gather_rows(self, shard: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """shard: [num_rows, sizes[rank]]; returns [num_rows, sum(sizes)] on rank 0, None on the others.

        Goes by blocks of rows, and of columns where a single row of the widest shard is larger than a slot.
        """
        num_rows, widest = len(shard), max(sizes)
        columns = max(1, min(widest, SLOT_BYTES // shard.element_size()))
        rows = SLOT_BYTES // shard.element_size() // columns
        gathered = shard.new_empty(num_rows, sum(sizes)) if self.rank == 0 else None
        shards = [shard] if gathered is None else [shard, *torch.split(gathered, list(sizes), dim=1)[1:]]
        for row in range(0, num_rows, rows):
            for column in range(0, widest, columns):
                self._gather_block([each[row : row + rows, column : column + columns] for each in shards])
        if gathered is not None:
            gathered[:, : sizes[0]] = shard
        return gathered

    def _gather_block(self, blocks: list[Tensor]) -> None:
        """Fill rank 0's `blocks[1:]`, [rows, columns] each, with the other ranks' `blocks[0]`."""
        segment = self._segment
        step = segment.begin()
        if self.rank:
            self._slots(blocks[0].shape, blocks[0].dtype, step)[self.rank].copy_(blocks[0])
        segment.post(step)
        if self.rank == 0:
            segment.meet(step)
            for rank, block in enumerate(blocks[1:], start=1):
                block.copy_(self._slots(block.shape, block.dtype, step)[rank])

    def _slots(self, shape: torch.Size, dtype: torch.dtype, step: int) -> list[Tensor]:
        """Every rank's slot for this step as a tensor: [*shape] each, shared."""
        views = self._views.get((shape, dtype))
        if views is None:
            if len(self._views) == MAX_SHAPES:
                self._views.clear()
            views = self._views[shape, dtype] = self._view(shape, dtype, 0), self._view(shape, dtype, 1)
        return views[step & 1]

    def _view(self, shape: torch.Size, dtype: torch.dtype, parity: int) -> list[Tensor]:
        # Views of another dtype that are made in inference mode could not be written outside of it.
        with torch.inference_mode(mode=False):
            slots = self._segment.slots(parity, shape.numel() * dtype.itemsize)
            return [slot.view(dtype).view(shape) for slot in slots]

    def _peer_lost(self, name: str, x: Tensor, lost: MembersLostError) -> PeerLostError:
        ranks = [self._ranks[member] for member in lost.members]
        who = f"rank {ranks[0]} of this host has" if len(ranks) == 1 else f"ranks {ranks} of this host have"
        return PeerLostError(f"{name} of {tuple(x.shape)} failed on rank {self._ranks[self.rank]}: {who} {lost.what}")
