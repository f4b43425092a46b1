"""Ranks without tensors: they keep a cache of labels and apply plans as every rank does, so that a clobbered block or
slot is seen; and a Simulation that drives a scheduler with them."""

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tpdist.control.messages import Generate, SequenceStart, SlotWork, StepPlan, StepResult, TokenLogprobs, TokenOutput
from tpdist.engine.scheduler import Scheduler
from tpdist.sampling_params import SamplingParams

VOCAB_SIZE = 50
EOS = 7
SIZES = {"num_blocks": 8, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64}


def next_token(tokens: list[int]) -> int:
    """The token that the simulated model samples after `tokens`."""
    return hashlib.sha256(bytes(tokens)).digest()[0] % VOCAB_SIZE


def score(tokens: list[int]) -> TokenLogprobs:
    """The log-probability of the last of `tokens` after the others; another one for other tokens."""
    return TokenLogprobs((tokens[-1],), (-float(hashlib.sha256(bytes(tokens)).digest()[1]),), len(tokens))


@dataclass
class Slot:
    start: SequenceStart
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


class SimulatedRanks:
    """Applies plans in order, and asserts the contract of StepPlan on the way. All writes of a step come before its
    reads, as in every layer.

    A cache entry is the prefix of tokens up to it: a sequence must find its own whole prefix in its blocks.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, **_: int
    ) -> None:
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}
        self.slots: dict[int, Slot] = {}
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.step = 0
        self.num_computed = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.step += 1
        assert plan.step == self.step
        self.apply(plan)
        assert len({work.slot for work in plan.work}) == len(plan.work)
        num_tokens = sum(work.num_tokens for work in plan.work)
        assert 0 < num_tokens <= self.max_num_batched_tokens
        self.num_computed += num_tokens
        for work in plan.work:
            self.write(work)
        for slot in self.slots.values():
            self.read(slot)
        prompt_logprobs = {work.slot: entries for work in plan.work if (entries := self.prompt_logprobs(work))}
        sampled = [(work.slot, self.slots[work.slot]) for work in plan.work if work.sample]
        for _, slot in sampled:
            slot.tokens.append(next_token(slot.tokens))
        return StepResult(
            plan.step,
            tuple((index, slot.tokens[-1]) for index, slot in sampled),
            {index: score(slot.tokens) for index, slot in sampled if slot.start.sampling.logprobs is not None},
            prompt_logprobs,
        )

    def apply(self, plan: StepPlan) -> None:
        for index in plan.free:
            del self.slots[index]
        for start in plan.start:
            assert start.slot not in self.slots
            assert 0 <= start.slot < self.max_num_seqs
            self.slots[start.slot] = Slot(start, np.frombuffer(start.token_ids, dtype="<i4").tolist())
        for more in plan.blocks:
            assert more.blocks
            self.slots[more.slot].blocks.extend(more.blocks)
        for slot in self.slots.values():
            assert len(set(slot.blocks)) == len(slot.blocks)
            assert all(0 <= block < self.num_blocks for block in slot.blocks)

    def write(self, work: SlotWork) -> None:
        slot = self.slots[work.slot]
        skipped = work.start - slot.num_computed
        assert skipped >= 0
        assert skipped % self.block_size == 0
        assert skipped == 0 or work.start % self.block_size == 0
        stop = work.start + work.num_tokens
        assert stop <= len(slot.tokens)
        assert work.sample == (stop == len(slot.tokens))
        assert stop <= len(slot.blocks) * self.block_size
        for position in range(work.start, stop):
            self.cache[self.place(slot, position)] = tuple(slot.tokens[: position + 1])
        slot.num_computed = stop

    def read(self, slot: Slot) -> None:
        """Also of a slot without work: what it has must still be there when its turn comes."""
        for position in range(slot.num_computed):
            assert self.cache[self.place(slot, position)] == tuple(slot.tokens[: position + 1])

    def prompt_logprobs(self, work: SlotWork) -> tuple[TokenLogprobs, ...]:
        start, tokens = self.slots[work.slot].start, self.slots[work.slot].tokens
        if start.sampling.prompt_logprobs is None:
            return ()
        stop = min(start.num_prompt_tokens, work.start + work.num_tokens + 1)
        return tuple(score(tokens[: position + 1]) for position in range(work.start + 1, stop))

    def place(self, slot: Slot, position: int) -> tuple[int, int]:
        return slot.blocks[position // self.block_size], position % self.block_size


class FirstStage:
    """What a rank of an earlier stage knows of tokens: those of sequences that start, and those that plans bring."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}

    def apply(self, plan: StepPlan) -> None:
        for slot, token in plan.sampled:
            self.tokens[slot].append(token)
        for slot in plan.free:
            del self.tokens[slot]
        for start in plan.start:
            self.tokens[start.slot] = np.frombuffer(start.token_ids, dtype="<i4").tolist()

    def inputs(self, plan: StepPlan) -> list[list[int]]:
        """The tokens that go into the first layer."""
        return [self.tokens[work.slot][work.start :][: work.num_tokens] for work in plan.work]


def expected_answer(request: Generate, capacity: int) -> tuple[list[int], str]:
    """What one sequence alone in an endless cache would generate."""
    tokens = list(request.prompt_token_ids)
    sampling = request.sampling
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(request.eos_token_ids))
    limit = min(capacity, len(tokens) + (sampling.max_tokens or capacity))
    answer: list[int] = []
    while True:
        answer.append(next_token(tokens))
        tokens.append(answer[-1])
        if answer[-1] in stops:
            return answer, "stop"
        if len(tokens) >= limit:
            return answer, "length"


def request(name: str, prompt: list[int], *, priority: int = 0, **sampling: Any) -> Generate:
    return Generate(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**sampling),
        eos_token_ids=(EOS,),
        priority=priority,
    )


def scheduler(**changes: Any) -> Scheduler:
    return Scheduler(**(SIZES | {"vocab_size": VOCAB_SIZE, "epoch": 1} | changes))


class Simulation:
    """A scheduler, simulated ranks with a queue of plans, the outputs so far, and the step that ended each answer."""

    def __init__(self, max_in_flight: int = 1, **sizes: Any) -> None:
        """With sizes["num_stages"] above 1, also what the first stage knows is checked."""
        self.scheduler = scheduler(**sizes)
        self.first_stage = FirstStage() if sizes.get("num_stages", 1) > 1 else None
        self.ranks = SimulatedRanks(**(SIZES | sizes))
        self.max_in_flight = max_in_flight
        self.plans: deque[StepPlan] = deque()
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.ended: dict[str, int] = {}
        self.aborted: set[str] = set()

    def add(self, name: str, prompt: list[int], **options: Any) -> Generate:
        new = request(name, prompt, **options)
        self.scheduler.add(new)
        return new

    def abort(self, name: str) -> None:
        if not self.is_finished(name):
            self.aborted.add(name)
        self.scheduler.abort(name)

    def plan(self) -> StepPlan:
        """Schedule a step, to be run by `step`; there must be something to do."""
        plan = self.scheduler.schedule()
        assert plan is not None
        self.scheduler.check()
        self.plans.append(plan)
        return plan

    def step(self) -> None:
        """Fill the queue of plans, and run the oldest."""
        while len(self.plans) < self.max_in_flight and (plan := self.scheduler.schedule()):
            self.scheduler.check()
            self.plans.append(plan)
        assert bool(self.plans) >= self.scheduler.has_work, "there is work, but no step to do it"
        if self.plans:
            self.run_oldest_plan()
        self.scheduler.check()

    def run_oldest_plan(self) -> None:
        plan = self.plans.popleft()
        result = self.ranks.execute(plan)
        if self.first_stage is not None:
            self.first_stage.apply(plan)
            known = [self.ranks.slots[work.slot].tokens[work.start :][: work.num_tokens] for work in plan.work]
            assert self.first_stage.inputs(plan) == known
        for output in self.scheduler.update(result):
            self.take(output)

    def take(self, output: TokenOutput) -> None:
        name = output.request_id
        assert not self.is_finished(name)
        assert name not in self.aborted
        assert output.token_ids or output.prompt_logprobs
        assert not (output.prompt_logprobs and self.answer(name)), "log-probabilities of the prompt after a token"
        assert output.num_cached_tokens == 0 or name not in self.outputs
        self.outputs.setdefault(name, []).append(output)
        if output.finish_reason is not None:
            self.ended[name] = self.ranks.step

    def answer(self, name: str) -> list[int]:
        return [token for output in self.outputs.get(name, ()) for token in output.token_ids]

    def logprobs(self, name: str) -> list[TokenLogprobs]:
        return [entry for output in self.outputs.get(name, ()) for entry in output.logprobs]

    def prompt_logprobs(self, name: str) -> list[TokenLogprobs]:
        return [entry for output in self.outputs.get(name, ()) for entry in output.prompt_logprobs]

    def num_cached(self, name: str) -> int:
        return self.outputs[name][0].num_cached_tokens

    def finish_reason(self, name: str) -> str | None:
        return self.outputs[name][-1].finish_reason

    def is_finished(self, name: str) -> bool:
        return name in self.ended

    def run_until(self, name: str) -> int:
        """Run until `name` has its first token; returns how many steps that took."""
        steps = 0
        while not self.answer(name):
            self.step()
            steps += 1
        return steps

    def run_to_the_end(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work and not self.plans:
                return
            self.step()
        raise AssertionError(f"still busy after {limit} steps")

    def assert_answered(self, done: Generate) -> None:
        """The tokens and log-probabilities of a request are those it would get alone."""
        name, prompt, sampling = done.request_id, list(done.prompt_token_ids), done.sampling
        answer = self.answer(name)
        assert (answer, self.finish_reason(name)) == expected_answer(done, self.scheduler.capacity)
        tokens = prompt + answer
        scores = [score(tokens[: position + 1]) for position in range(len(tokens))]
        assert self.logprobs(name) == (scores[len(prompt) :] if sampling.logprobs is not None else [])
        assert self.prompt_logprobs(name) == (scores[1 : len(prompt)] if sampling.prompt_logprobs is not None else [])
