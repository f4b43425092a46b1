"""Decides what every rank does in the next step: continuous batching over a paged KV cache.

It knows token counts, slots and blocks. It knows nothing of tensors, ranks or sockets: StepPlans go out, StepResults
come in, and `schedule` may be called several times before the first result is back (steps run in order).

Rules, in the order in which `schedule` applies them:

    1  running sequences, oldest first: a decode, or the next chunk of a prefill, within the token budget
    2  waiting sequences in order of arrival, while a slot is free and the cache has room for all their known tokens

A sequence starts only with budget that all older ones have left over, so decodes come before prefill chunks.

A sequence gets the blocks of all known tokens when it starts, so only a decode can find the cache full. It then takes
the place of the newest running sequence, which is computed again later (its tokens are kept). The oldest sequence can
always go on, because no sequence may hold more tokens than the whole cache: there is no deadlock.

    what                      owned by                                  freed by
    slot, blocks              Sequence, from _admit                     _release: finished, aborted or preempted
    tokens of the completion  Sequence                                  the end of the request
    sample in flight          _in_flight, from schedule                 update, in the order of steps
"""

import random
from bisect import insort
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from tpdist.control.messages import (
    EngineStats,
    Generate,
    SequenceStart,
    SlotBlocks,
    SlotWork,
    StepPlan,
    TokenLogprobs,
    TokenOutput,
)
from tpdist.engine.block_manager import BlockManager
from tpdist.engine.sequence import Sequence, new_sequence
from tpdist.errors import RequestError
from tpdist.sampling_params import MAX_SEED

SPARE_BLOCKS_DIVISOR = 100
"""One block in this many stays free when a sequence starts beside others, so that it is not preempted at once."""

_by_arrival = attrgetter("arrival")


@dataclass(frozen=True)
class StepResult:
    """`token_ids`: (slot, token) for each SlotWork of the step that asked for a sample, in any order. By slot, where
    asked for: the log-probabilities of its sampled token, and those of the prompt's tokens that this step predicted
    (a chunk of n tokens from `start` predicts positions start + 1 ... start + n as far as the prompt goes)."""

    step: int
    token_ids: tuple[tuple[int, int], ...]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)


@dataclass
class _Draft:
    """The plan being made; `budget` is how many tokens it may still take."""

    budget: int
    start: list[SequenceStart] = field(default_factory=list)
    blocks: list[SlotBlocks] = field(default_factory=list)
    work: list[SlotWork] = field(default_factory=list)
    sampling: dict[int, Sequence] = field(default_factory=dict)


class Scheduler:
    """`epoch` stands on every plan; `seed` decides the seeds of requests that bring none."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        epoch: int,
        seed: int = 0,
    ) -> None:
        assert min(max_num_seqs, max_num_batched_tokens) >= 1, "a step must be able to run one token"
        self._block_manager = BlockManager(num_blocks=num_blocks, block_size=block_size)
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._epoch = epoch
        self._random = random.Random(seed)
        self._step = 0
        self._arrivals = 0
        self._preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._freed: list[int] = []
        self._in_flight: deque[tuple[int, dict[int, Sequence]]] = deque()

    @property
    def has_work(self) -> bool:
        """Whether a request is neither finished nor aborted."""
        return bool(self._sequences)

    @property
    def capacity(self) -> int:
        """Most tokens, prompt and completion, that one sequence can hold."""
        return min(self._max_model_len, self._block_manager.num_blocks * self._block_manager.block_size)

    def add(self, request: Generate) -> None:
        """Queue a request. Raises RequestError if it can never run."""
        self._check(request)
        self._arrivals += 1
        sequence = new_sequence(
            request, arrival=self._arrivals, seed=self._random.randint(0, MAX_SEED), capacity=self.capacity
        )
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks. An unknown id is one that has just finished: ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._release(sequence)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests_running=len(self._running),
            num_requests_waiting=len(self._waiting),
            kv_cache_usage=self._block_manager.num_used / self._block_manager.num_blocks,
            preemptions=self._preemptions,
        )

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run before a result of a step in flight."""
        draft = _Draft(budget=self._max_num_batched_tokens)
        self._continue_running(draft)
        self._admit(draft)
        if not draft.work:
            return None
        self._step += 1
        self._in_flight.append((self._step, draft.sampling))
        free, self._freed = tuple(self._freed), []
        return StepPlan(
            epoch=self._epoch,
            step=self._step,
            free=free,
            start=tuple(draft.start),
            blocks=tuple(draft.blocks),
            work=tuple(draft.work),
        )

    def update(self, result: StepResult) -> tuple[TokenOutput, ...]:
        """Take the tokens of the oldest step in flight. Aborted requests have no output."""
        step, sampling = self._in_flight.popleft()
        tokens = dict(result.token_ids)
        assert result.step == step, f"result of step {result.step}, but step {step} is the oldest in flight"
        assert tokens.keys() == sampling.keys(), f"step {step}: tokens of slots {[*tokens]}, asked for {[*sampling]}"
        live = ((slot, sequence) for slot, sequence in sampling.items() if self._is_live(sequence))
        return tuple(self._take(sequence, tokens[slot]) for slot, sequence in live)

    def check(self) -> None:
        """Assert what must hold between any two calls; for tests."""
        self._block_manager.check(sequence.blocks for sequence in self._running)
        slots = [sequence.slot for sequence in self._running]
        assert len({*slots, *self._free_slots}) == len(slots) + len(self._free_slots) == self._max_num_seqs, (
            "a slot is lost"
        )
        for queue in (self._running, self._waiting):
            assert _sorted_by_arrival(queue), "out of order"
        assert all(sequence.slot is None and not sequence.blocks for sequence in self._waiting)
        assert len(self._sequences) == len(self._running) + len(self._waiting)

    def _continue_running(self, draft: _Draft) -> None:
        for sequence in tuple(self._running):
            preempted = sequence.slot is None
            if preempted or sequence.sample_pending or draft.budget == 0:
                continue
            if self._has_block_for_decode(sequence, draft):
                self._work(sequence, draft)

    def _has_block_for_decode(self, sequence: Sequence, draft: _Draft) -> bool:
        """Make sure that the blocks reach over the known tokens, if need be at the expense of the newest sequence. A
        decode lacks one block at most, and every victim holds at least one. Without it the sequence sits this step
        out: newer ones that have a sample in flight will end or can be preempted later."""
        if self._block_manager.num_blocks_for(sequence.num_tokens) <= len(sequence.blocks):
            return True
        if self._block_manager.num_free == 0 and not self._preempt_newer_than(sequence):
            return False
        self._extend(sequence, draft)
        return True

    def _preempt_newer_than(self, sequence: Sequence) -> bool:
        """Preempt the newest running sequence if it came after `sequence`. One that has a sample in flight is passed
        over. The step being planned has no work for a newer one yet, since the oldest are planned first."""
        for victim in reversed(self._running):
            if victim is sequence:
                return False
            if not victim.sample_pending:
                self._release(victim)
                insort(self._waiting, victim, key=_by_arrival)
                self._preemptions += 1
                return True
        return False

    def _admit(self, draft: _Draft) -> None:
        while self._waiting and self._free_slots and draft.budget > 0 and self._has_room_for(self._waiting[0]):
            sequence = self._waiting.popleft()
            insort(self._running, sequence, key=_by_arrival)
            draft.start.append(sequence.start_in(self._free_slots.pop()))
            self._extend(sequence, draft)
            self._work(sequence, draft)

    def _has_room_for(self, sequence: Sequence) -> bool:
        spare = self._block_manager.num_blocks // SPARE_BLOCKS_DIVISOR if self._running else 0
        needed = self._block_manager.num_blocks_for(sequence.num_tokens)
        return needed + spare <= self._block_manager.num_free

    def _extend(self, sequence: Sequence, draft: _Draft) -> None:
        """Allocate the blocks that a sequence lacks for its known tokens."""
        assert sequence.slot is not None
        missing = self._block_manager.num_blocks_for(sequence.num_tokens) - len(sequence.blocks)
        blocks = self._block_manager.allocate(missing)
        sequence.blocks.extend(blocks)
        draft.blocks.append(SlotBlocks(sequence.slot, tuple(blocks)))

    def _work(self, sequence: Sequence, draft: _Draft) -> None:
        """Plan for as many known tokens as the budget allows; sample if that reaches the last."""
        assert sequence.slot is not None
        count = min(sequence.num_unscheduled, draft.budget)
        sample = count == sequence.num_unscheduled
        draft.work.append(SlotWork(sequence.slot, sequence.num_scheduled, count, sample))
        draft.budget -= count
        sequence.num_scheduled += count
        sequence.sample_pending = sample
        if sample:
            draft.sampling[sequence.slot] = sequence

    def _take(self, sequence: Sequence, token_id: int) -> TokenOutput:
        finish_reason = sequence.append(token_id)
        if finish_reason is not None:
            del self._sequences[sequence.request_id]
            self._release(sequence)
        return TokenOutput(sequence.request_id, (token_id,), finish_reason)

    def _release(self, sequence: Sequence) -> None:
        """Take slot and blocks from a running sequence. Steps in flight may still read them; they run before any step
        that is planned from now on."""
        self._running.remove(sequence)
        slot, blocks = sequence.stop_running()
        self._block_manager.free(blocks)
        self._free_slots.append(slot)
        self._freed.append(slot)

    def _is_live(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.request_id) is sequence

    def _check(self, request: Generate) -> None:
        if request.request_id in self._sequences:
            raise RequestError(f"request {request.request_id} is already in the engine", param="request_id")
        length = len(request.prompt_token_ids)
        if length == 0:
            raise RequestError("the prompt has no tokens, but must have at least one", param="prompt")
        if length >= self.capacity:
            raise RequestError(f"the prompt has {length} tokens, but {self._limit_in_words()}", param="prompt")
        lowest, highest = min(request.prompt_token_ids), max(request.prompt_token_ids)
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            message = f"the prompt has token id {wrong}, but the model's ids are 0 to {self._vocab_size - 1}"
            raise RequestError(message, param="prompt")

    def _limit_in_words(self) -> str:
        blocks, block_size = self._block_manager.num_blocks, self._block_manager.block_size
        if self._max_model_len <= blocks * block_size:
            return f"the model's limit is {self._max_model_len}, which includes at least one token of the answer"
        return (
            f"the KV cache holds {blocks * block_size} ({blocks} blocks of {block_size}), which includes at least one "
            f"token of the answer; a larger --kv-cache-memory-bytes or --gpu-memory-utilization makes room for the "
            f"model's limit of {self._max_model_len}"
        )


def _sorted_by_arrival(sequences: Iterable[Sequence]) -> bool:
    arrivals = [sequence.arrival for sequence in sequences]
    return arrivals == sorted(arrivals)
