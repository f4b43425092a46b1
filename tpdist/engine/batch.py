"""What a rank keeps about its slots, and the tensors of a step made from it.

Every rank holds the same SlotTable: plans bring changes only, and sampled tokens are appended on each rank. It knows
neither why a slot was given nor how tokens are computed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tpdist.control.messages import SequenceStart, StepPlan
from tpdist.engine.sampler import SampleRow
from tpdist.layers.attention import AttentionContext


@dataclass(frozen=True)
class Batch:
    """The input of one step, the same on every rank. `token_ids` and `positions` are [num_tokens] int64;
    `sample_index` [num_samples] int64 says which of the tokens are sampled after, and `sample_slots` for whom."""

    token_ids: Tensor
    positions: Tensor
    attention: AttentionContext
    sample_index: Tensor
    sample_slots: tuple[int, ...]


class SlotTable:
    """Tokens and block tables of all slots, as rows of preallocated arrays whose pages are touched on first use.

    A row counts up to its length only: what lies beyond is of an earlier sequence. Entries of a block table beyond
    its length are 0.
    """

    def __init__(self, *, max_num_seqs: int, max_tokens: int, block_size: int) -> None:
        """`max_tokens`: the most tokens, prompt and completion, that a sequence can hold."""
        self._block_size = block_size
        self._tokens = np.zeros((max_num_seqs, max_tokens), dtype=np.int32)
        self._blocks = np.zeros((max_num_seqs, -(-max_tokens // block_size)), dtype=np.int64)
        self._num_tokens = [0] * max_num_seqs
        self._num_blocks = [0] * max_num_seqs
        self._starts: list[SequenceStart | None] = [None] * max_num_seqs

    def apply(self, plan: StepPlan) -> None:
        """Take the changes of a plan: slots given up, sequences started, blocks appended."""
        for slot in plan.free:
            self._starts[slot] = None
            self._blocks[slot, : self._num_blocks[slot]] = 0
            self._num_blocks[slot] = self._num_tokens[slot] = 0
        for start in plan.start:
            tokens = np.frombuffer(start.token_ids, dtype="<i4")
            assert self._starts[start.slot] is None, f"slot {start.slot} is taken"
            self._starts[start.slot] = start
            self._tokens[start.slot, : len(tokens)] = tokens
            self._num_tokens[start.slot] = len(tokens)
        for more in plan.blocks:
            first = self._num_blocks[more.slot]
            self._num_blocks[more.slot] = first + len(more.blocks)
            self._blocks[more.slot, first : self._num_blocks[more.slot]] = more.blocks

    def batch(self, plan: StepPlan, *, device: torch.device) -> Batch:
        """The tensors of a plan whose changes are applied. Sequences lie in the order of its work."""
        starts = np.array([work.start for work in plan.work])
        lens = np.array([work.num_tokens for work in plan.work])
        slots = np.array([work.slot for work in plan.work])
        stops = np.cumsum(lens)
        inputs = np.empty((3, stops[-1]), dtype=np.int64)  # one copy to the device instead of three
        token_slots = np.repeat(slots, lens)
        positions = np.arange(stops[-1]) + np.repeat(starts - (stops - lens), lens)
        inputs[0] = self._tokens[token_slots, positions]
        inputs[1] = positions
        inputs[2] = self._places(token_slots, positions)
        token_ids, position_ids, slot_mapping = torch.from_numpy(inputs).to(device).unbind()
        attention = AttentionContext(
            slot_mapping=slot_mapping,
            block_tables=self._block_tables(slots, longest=int((starts + lens).max())).to(device),
            context_lens=(starts + lens).tolist(),
            query_lens=lens.tolist(),
            block_size=self._block_size,
        )
        samples = np.array([work.sample for work in plan.work])
        return Batch(
            token_ids=token_ids,
            positions=position_ids,
            attention=attention,
            sample_index=torch.from_numpy(stops[samples] - 1).to(device),
            sample_slots=tuple(slots[samples].tolist()),
        )

    def sample_rows(self, slots: Iterable[int]) -> list[SampleRow]:
        return [self._sample_row(slot) for slot in slots]

    def append(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Add one sampled token to each of `slots`."""
        for slot, token_id in zip(slots, token_ids, strict=True):
            length = self._num_tokens[slot]
            self._tokens[slot, length] = token_id
            self._num_tokens[slot] = length + 1

    def _places(self, token_slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where in the cache each token lies: block * block_size + offset."""
        block, offset = np.divmod(positions, self._block_size)
        places: np.ndarray = self._blocks[token_slots, block] * self._block_size + offset
        return places

    def _block_tables(self, slots: np.ndarray, *, longest: int) -> Tensor:
        """[num_seqs, blocks of the longest context] int64."""
        return torch.from_numpy(self._blocks[slots, : -(-longest // self._block_size)])

    def _sample_row(self, slot: int) -> SampleRow:
        start = self._starts[slot]
        assert start is not None, f"slot {slot} is free"
        return SampleRow(
            sampling=start.sampling,
            stop_token_ids=start.stop_token_ids,
            seed=start.seed,
            num_sampled=self._num_tokens[slot] - start.num_prompt_tokens,
            history=self._tokens[slot, : self._num_tokens[slot]],
        )
