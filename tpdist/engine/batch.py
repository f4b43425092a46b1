"""What a rank keeps about its slots, and the tensors of a step made from it.

Every rank holds the same SlotTable: plans bring changes only, and sampled tokens are appended on each rank, on earlier
pipeline stages with a later plan. It knows neither why a slot was given nor how tokens are computed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tpdist.control.messages import SequenceStart, StepPlan
from tpdist.engine.sample_row import SampleRow
from tpdist.engine.transfer import to_device
from tpdist.layers.attention import AttentionContext


class Samples(NamedTuple):
    """`rows` [num_samples] int64 says which of a step's tokens are sampled after (None: each one), `slots` for whom."""

    slots: tuple[int, ...]
    rows: Tensor | None


@dataclass(frozen=True)
class Batch:
    """The input of one step, the same on every rank. `token_ids` and `positions` are [num_tokens] int64."""

    token_ids: Tensor
    positions: Tensor
    attention: AttentionContext
    samples: Samples


class PromptChunk(NamedTuple):
    """Tokens of a prompt whose log-probabilities are asked for: `token_ids[i]` [num_tokens] int64 is predicted by the
    step's token `first + i`; `num_top` as in SamplingParams.prompt_logprobs."""

    slot: int
    first: int
    token_ids: np.ndarray
    num_top: int


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
        self._num_blocks = [0] * max_num_seqs
        self._rows: list[SampleRow | None] = [None] * max_num_seqs
        self._with_prompt_logprobs: set[int] = set()

    def apply(self, plan: StepPlan) -> None:
        """Take the changes of a plan: slots given up, sequences started, blocks appended."""
        for slot in plan.free:
            self._rows[slot] = None
            self._with_prompt_logprobs.discard(slot)
            self._blocks[slot, : self._num_blocks[slot]] = 0
            self._num_blocks[slot] = 0
        for start in plan.start:
            self._start(start)
        for more in plan.blocks:
            first = self._num_blocks[more.slot]
            self._num_blocks[more.slot] = first + len(more.blocks)
            self._blocks[more.slot, first : self._num_blocks[more.slot]] = more.blocks

    def batch(self, plan: StepPlan, *, device: torch.device) -> Batch:
        """The tensors of a plan whose changes are applied. Sequences lie in the order of its work."""
        slots = np.array([work.slot for work in plan.work])
        starts = np.array([work.start for work in plan.work])
        lens = np.array([work.num_tokens for work in plan.work])
        ends, stops = starts + lens, lens.cumsum()
        token_slots, positions = _each_token(slots, starts, lens, stops)
        last_tokens = stops[[work.sample for work in plan.work]] - 1
        block_tables = self._blocks[slots, : -(-int(ends.max()) // self._block_size)]
        token_ids, position_ids, slot_mapping, blocks, sample_index = _send(
            self._tokens[token_slots, positions],
            positions,
            self._places(token_slots, positions),
            block_tables.ravel(),
            last_tokens,
            device=device,
        )
        attention = AttentionContext(
            slot_mapping=slot_mapping,
            block_tables=blocks.view(block_tables.shape),
            context_lens=ends.tolist(),
            query_lens=lens.tolist(),
            block_size=self._block_size,
        )
        return Batch(
            token_ids=token_ids,
            positions=position_ids,
            attention=attention,
            samples=Samples(
                tuple(work.slot for work in plan.work if work.sample),
                None if len(last_tokens) == len(positions) else sample_index,
            ),
        )

    def decodes(self, plan: StepPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a plan of one token each: slots and positions [num_seqs], block tables [num_seqs, max_blocks]."""
        slots = np.array([work.slot for work in plan.work])
        positions = np.array([work.start for work in plan.work])
        return slots, positions, self._blocks[slots, : int(positions.max()) // self._block_size + 1]

    def prompt_chunks(self, plan: StepPlan) -> Iterator[PromptChunk]:
        """The tokens whose log-probabilities this plan's step can tell: work on the tokens from `start` predicts those
        from `start + 1`, of which the prompt's are asked for."""
        if not self._with_prompt_logprobs:
            return
        first = 0
        for work in plan.work:
            row = self._row(work.slot)
            num_top = row.sampling.prompt_logprobs
            stop = min(work.start + work.num_tokens + 1, row.num_prompt_tokens)
            if num_top is not None and stop > work.start + 1:
                token_ids = row.tokens[work.start + 1 : stop].astype(np.int64)
                yield PromptChunk(work.slot, first, token_ids, num_top)
            first += work.num_tokens

    def sample_rows(self, slots: Iterable[int]) -> list[SampleRow]:
        return [self._row(slot) for slot in slots]

    def append(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Add one sampled token to each of `slots`."""
        for slot, token_id in zip(slots, token_ids, strict=True):
            row = self._row(slot)
            row.tokens[row.num_tokens] = token_id
            row.num_tokens += 1

    def _start(self, start: SequenceStart) -> None:
        assert self._rows[start.slot] is None, f"slot {start.slot} is taken"
        tokens = np.frombuffer(start.token_ids, dtype="<i4")
        memory = self._tokens[start.slot]
        memory[: len(tokens)] = tokens
        self._rows[start.slot] = SampleRow(
            sampling=start.sampling,
            stop_token_ids=start.stop_token_ids,
            seed=start.seed,
            num_prompt_tokens=start.num_prompt_tokens,
            tokens=memory,
            num_tokens=len(tokens),
        )
        if start.sampling.prompt_logprobs is not None:
            self._with_prompt_logprobs.add(start.slot)

    def _row(self, slot: int) -> SampleRow:
        row = self._rows[slot]
        assert row is not None, f"slot {slot} is free"
        return row

    def _places(self, token_slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where in the cache each token lies: block * block_size + offset."""
        block, offset = np.divmod(positions, self._block_size)
        places: np.ndarray = self._blocks[token_slots, block] * self._block_size + offset
        return places


def _each_token(
    slots: np.ndarray, starts: np.ndarray, lens: np.ndarray, stops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Slot and position of each token of a step, [num_tokens], from those of its sequences."""
    num_tokens = int(stops[-1])
    if num_tokens == len(lens):
        return slots, starts
    return np.repeat(slots, lens), np.arange(num_tokens) + np.repeat(starts - (stops - lens), lens)


def _send(*arrays: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
    """One-dimensional integer arrays as int64 tensors, in one copy to the device."""
    together = np.concatenate(arrays, dtype=np.int64)
    return torch.split_with_sizes(to_device(together, device), [len(array) for array in arrays])
