"""Decides what every rank does in the next step: continuous batching over a paged KV cache.

It knows token counts, slots and blocks. It knows nothing of tensors, ranks or sockets: StepPlans go out, StepResults
come in, and `schedule` may be called several times before the first result is back (steps run in order).

Sequences are served in the order of (priority, arrival). `schedule` applies four rules, one after the other:

    1  a waiting sequence that lacks a slot or blocks takes those of running ones of lower priority
    2  each decode gets one token of the budget, and a block if it lacks one
    3  waiting sequences start, while a slot is free, the cache has room for all their known tokens, and some budget
       is left; nobody overtakes one that does not fit
    4  prefills share what is left of the budget: the first in order takes half, or what the others leave; of the
       others the higher priority goes first and then the one with less left to do. So a long prompt does not hold back
       short ones behind it, nor do they hold it back, and prompts of one length end one after the other

When a sequence starts, the blocks of all its known tokens are promised to it. It gets them with each chunk, since by
then another one may have computed them: sequences with the same prompt work on it together. (So where several prefills
share a step, chunks end with a block.) Only a decode can find the cache full. It then takes the place of the last
running sequence in order, which is computed again later; its tokens are kept.

There is no deadlock: the first sequence in order is preempted by nobody and may preempt everybody (those with a sample
in flight once it is back), no sequence may hold more tokens than the whole cache, and the decodes that go before its
prefill end. So it ends, and the next is the first. There is no livelock: who was preempted waits behind the one that
took its place and cannot take it back. A low priority may wait as long as higher ones arrive.

    what                      owned by                                   freed by
    slot, promised blocks     Sequence, from _start                      _release: finished, aborted or preempted
    blocks                    Sequences that share them, from _start,    the last _release; full ones stay cached
                              _run_chunk, _add_block                     until BlockManager.allocate needs them
    tokens of the completion  Sequence                                   the end of the request
    results in flight         _in_flight, from schedule                  update, in the order of steps
"""

import random
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from math import inf
from operator import attrgetter

from tpdist.control.messages import EngineStats, Generate, StepPlan, StepResult, TokenOutput
from tpdist.engine.block_manager import BlockManager
from tpdist.engine.block_tables import BlockTables
from tpdist.engine.draft import Draft, InFlight
from tpdist.engine.limits import Limits
from tpdist.engine.sequence import Sequence, new_sequence
from tpdist.errors import RequestError
from tpdist.sampling_params import MAX_SEED

SPARE_BLOCKS_DIVISOR = 100
"""One block in this many stays free when a sequence starts beside others, so that it is not preempted at once."""

MAX_STARTED_TOKENS = 1 << 20
"""No sequence starts in a plan that already starts this many tokens: they travel with it, and a message has a limit."""

_in_order = attrgetter("priority", "arrival")
_shortest_first = attrgetter("priority", "num_unscheduled", "arrival")


class Scheduler:
    """`epoch` stands on every plan; `seed` decides the seeds of requests that bring none. With several stages, so many
    steps are in flight at once: each takes its part of the decodes and of the budget, and plans bring the tokens that
    were sampled meanwhile. `clock` is read for the time that requests wait; nothing is decided by it."""

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
        enable_prefix_caching: bool = True,
        num_stages: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert min(max_num_seqs, max_num_batched_tokens) >= 1, "a step must be able to run one token"
        self._limits = Limits(
            max_model_len=max_model_len, num_blocks=num_blocks, block_size=block_size, vocab_size=vocab_size
        )
        self._block_manager = BlockManager(num_blocks=num_blocks, block_size=block_size)
        self._tables = BlockTables(self._block_manager, enable_prefix_caching=enable_prefix_caching)
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._num_stages = num_stages
        self._max_num_batched_tokens = -(-max_num_batched_tokens // num_stages)
        self._epoch = epoch
        self._clock = clock
        self._random = random.Random(seed)
        self._step = 0
        self._arrivals = 0
        self._preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._freed: list[int] = []
        self._sampled: list[tuple[int, int]] = []
        self._in_flight: deque[InFlight] = deque()

    @property
    def has_work(self) -> bool:
        """Whether a request is neither finished nor aborted."""
        return bool(self._sequences)

    @property
    def capacity(self) -> int:
        """Most tokens, prompt and completion, that one sequence can hold."""
        return self._limits.capacity

    def add(self, request: Generate) -> None:
        """Queue a request. Raises RequestError if it can never run."""
        if request.request_id in self._sequences:
            raise RequestError(f"request {request.request_id} is already in the engine", param="request_id")
        self._limits.check(request)
        self._arrivals += 1
        sequence = new_sequence(
            request,
            arrival=self._arrivals,
            now=self._clock(),
            seed=self._random.randint(0, MAX_SEED),
            capacity=self.capacity,
        )
        self._sequences[request.request_id] = sequence
        insort(self._waiting, sequence, key=_in_order)

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
            prefix_cache_queries=self._tables.num_queries,
            prefix_cache_hits=self._tables.num_hits,
        )

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run before a result of a step in flight."""
        draft = Draft(step=self._step + 1, budget=self._max_num_batched_tokens)
        self._make_way()
        self._decode(draft)
        self._admit(draft)
        self._prefill(draft)
        plan = draft.plan(epoch=self._epoch, free=self._freed, sampled=self._sampled)
        if plan is not None:
            self._step = plan.step
            self._in_flight.append(draft.in_flight)
            self._freed = []
            self._sampled = []
        return plan

    def update(self, result: StepResult) -> tuple[TokenOutput, ...]:
        """Take the results of the oldest step in flight. Aborted requests have no output."""
        asked = self._in_flight.popleft()
        tokens = dict(result.token_ids)
        assert result.step == asked.step, f"result of step {result.step}, but {asked.step} is the oldest in flight"
        assert tokens.keys() == asked.sampling.keys(), (
            f"step {asked.step}: tokens of slots {[*tokens]}, asked for {[*asked.sampling]}"
        )
        scores = {
            slot: sequence.deliver(start, result.prompt_logprobs.get(slot, ()))
            for slot, (sequence, start) in asked.scoring.items()
            if self._is_live(sequence)
        }
        chunks = (slot for slot, entries in scores.items() if entries and slot not in asked.sampling)
        outputs = [TokenOutput(asked.scoring[slot][0].request_id, (), prompt_logprobs=scores[slot]) for slot in chunks]
        for slot, sequence in asked.sampling.items():
            if self._is_live(sequence):
                logprobs = (result.logprobs[slot],) if slot in result.logprobs else ()
                output = sequence.take(tokens[slot], logprobs=logprobs, prompt_logprobs=scores.get(slot, ()))
                outputs.append(output)
                if output.finish_reason is not None:
                    del self._sequences[sequence.request_id]
                    self._release(sequence)
                elif self._num_stages > 1:
                    self._sampled.append((slot, tokens[slot]))
        return tuple(outputs)

    def check(self) -> None:
        """Assert what must hold between any two calls; for tests."""
        self._tables.check(self._running)
        slots = [sequence.slot for sequence in self._running]
        assert len({*slots, *self._free_slots}) == len(slots) + len(self._free_slots) == self._max_num_seqs, (
            "a slot is lost"
        )
        for queue in (self._running, self._waiting):
            assert queue == sorted(queue, key=_in_order), "out of order"
        assert all(sequence.slot is None and not sequence.blocks for sequence in self._waiting)
        assert len(self._sequences) == len(self._running) + len(self._waiting)

    def _make_way(self) -> None:
        """Rule 1, for the first that waits, if it can help. Nothing is planned yet, so a victim has no work in this
        plan."""
        if not self._waiting or not self._running:
            return
        first = self._waiting[0]
        victims = [sequence for sequence in self._running if sequence.priority > first.priority]
        if not victims or not self._tables.could_fit(first, victims):
            return
        while not self._fits(first, self._tables.find(first)):
            if not self._preempt_after((first.priority, inf)):
                return

    def _decode(self, draft: Draft) -> None:
        """Rule 2. A sequence that gets no block sits this step out: those behind it have a sample in flight, and will
        end or can be preempted later. With several stages a step takes its part of the decodes, so that there are as
        many for each of the others."""
        share = -(-sum(not sequence.prefilling for sequence in self._running) // self._num_stages)
        for sequence in tuple(self._running):
            if sequence.prefilling or sequence.sample_pending or sequence.slot is None:
                continue
            if draft.budget == 0 or share == 0:
                return
            has_block = sequence.num_tokens <= len(sequence.blocks) * self._block_size
            if has_block or self._add_block(sequence, draft):
                self._run(sequence, 1, draft)
                share -= 1

    def _add_block(self, sequence: Sequence, draft: Draft) -> bool:
        """Add a block for a decode, if need be at the expense of those behind it. A victim may yield none: its blocks
        may be shared."""
        while self._block_manager.num_available == 0:
            if not self._preempt_after((sequence.priority, sequence.arrival)):
                return False
        draft.add_blocks(sequence, self._tables.extend(sequence, sequence.num_tokens))
        return True

    def _preempt_after(self, bound: tuple[int, float]) -> bool:
        """Preempt the last running sequence if it comes after `bound` in order. One that has a sample in flight, maybe
        of this very plan, is passed over. No other work can be in this plan yet: prefills are planned last."""
        for victim in reversed(self._running):
            if (victim.priority, victim.arrival) <= bound:
                return False
            if not victim.sample_pending:
                self._release(victim)
                insort(self._waiting, victim, key=_in_order)
                self._preemptions += 1
                return True
        return False

    def _admit(self, draft: Draft) -> None:
        """Rule 3. There is budget for one token at least, so the plan has work."""
        while self._waiting and self._free_slots and draft.budget > 0 and draft.num_started < MAX_STARTED_TOKENS:
            sequence = self._waiting[0]
            found = self._tables.find(sequence)
            if not self._fits(sequence, found):
                return
            del self._waiting[0]
            self._start(sequence, found, draft)

    def _fits(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether a waiting sequence can start now, with the cached blocks `found`."""
        spare = self._block_manager.num_blocks // SPARE_BLOCKS_DIVISOR if self._running else 0
        return bool(self._free_slots) and self._tables.fits(sequence, found, spare=spare)

    def _start(self, sequence: Sequence, found: list[int], draft: Draft) -> None:
        insort(self._running, sequence, key=_in_order)
        if sequence.queue_s is None:
            sequence.queue_s = max(0.0, self._clock() - sequence.arrived_s)
        draft.start(sequence, self._free_slots.pop())
        self._tables.start(sequence, found)
        draft.add_blocks(sequence, found)

    def _prefill(self, draft: Draft) -> None:
        """Rule 4."""
        prefills = [sequence for sequence in self._running if sequence.prefilling]
        if not prefills or draft.budget == 0:
            return
        first, others = prefills[0], prefills[1:]
        left_by_others = draft.budget - sum(sequence.num_unscheduled for sequence in others)
        share = max(self._block_size, -(-draft.budget // 2), left_by_others)
        whole_blocks = bool(others) and draft.budget >= self._block_size
        self._run_chunk(first, share, draft, whole_blocks=whole_blocks)
        for sequence in sorted(others, key=_shortest_first):
            self._run_chunk(sequence, draft.budget, draft, whole_blocks=whole_blocks)

    def _run_chunk(self, sequence: Sequence, share: int, draft: Draft, *, whole_blocks: bool) -> None:
        """Plan up to `share` tokens of a prefill behind what the cache has by now. If they are not the last, they end
        with a block where `whole_blocks` says so, and there may be none."""
        if draft.budget == 0:
            return
        found = self._tables.find(sequence)
        self._tables.take(sequence, found)
        start = sequence.num_scheduled
        stop = min(sequence.num_tokens, start + min(share, draft.budget))
        if whole_blocks and stop < sequence.num_tokens:
            stop -= stop % self._block_size
        stop = max(start, stop)
        draft.add_blocks(sequence, found + self._tables.extend(sequence, stop))
        if stop > start:
            self._run(sequence, stop - start, draft)

    def _run(self, sequence: Sequence, count: int, draft: Draft) -> None:
        first = sequence.num_scheduled // self._block_size
        draft.work(sequence, count)
        if sequence.num_scheduled >= (first + 1) * self._block_size:
            self._tables.register(sequence, first=first)

    def _release(self, sequence: Sequence) -> None:
        """Take slot and blocks from a running sequence. Steps in flight may still write to them and read them; they
        run before any step that is planned from now on."""
        self._running.remove(sequence)
        self._tables.release(sequence)
        slot = sequence.stop_running()
        self._free_slots.append(slot)
        self._freed.append(slot)

    def _is_live(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.request_id) is sequence
