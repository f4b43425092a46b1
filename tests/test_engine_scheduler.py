"""The scheduler against simulated ranks that keep a cache of labels, so that a clobbered block or slot is seen."""

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpdist.control.messages import Generate, SequenceStart, StepPlan, TokenOutput
from tpdist.engine.block_manager import BlockManager
from tpdist.engine.scheduler import Scheduler, StepResult
from tpdist.errors import RequestError
from tpdist.sampling_params import SamplingParams

VOCAB_SIZE = 50
EOS = 7


def next_token(tokens: list[int]) -> int:
    """The token that the simulated model samples after `tokens`."""
    return hashlib.sha256(bytes(tokens)).digest()[0] % VOCAB_SIZE


@dataclass
class Slot:
    start: SequenceStart
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


class SimulatedRanks:
    """Applies plans in order, as every rank does, and asserts the contract of StepPlan on the way.

    A cache entry is the prefix of tokens up to it: a sequence must find its own whole prefix in its blocks.
    """

    def __init__(self, *, num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}
        self.slots: dict[int, Slot] = {}
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.step = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.step += 1
        assert plan.step == self.step
        for index in plan.free:
            del self.slots[index]
        for start in plan.start:
            assert start.slot not in self.slots
            assert 0 <= start.slot < self.max_num_seqs
            self.slots[start.slot] = Slot(start, np.frombuffer(start.token_ids, dtype="<i4").tolist())
        for more in plan.blocks:
            self.slots[more.slot].blocks.extend(more.blocks)
        self.check_blocks()
        assert len({work.slot for work in plan.work}) == len(plan.work)
        assert 0 < sum(work.num_tokens for work in plan.work) <= self.max_num_batched_tokens
        tokens = [self.run(work.slot, work.start, work.num_tokens, work.sample) for work in plan.work]
        return StepResult(plan.step, tuple(pair for pair in tokens if pair))

    def check_blocks(self) -> None:
        held = [block for slot in self.slots.values() for block in slot.blocks]
        assert len(held) == len(set(held))
        assert all(0 <= block < self.num_blocks for block in held)

    def run(self, index: int, start: int, count: int, sample: bool) -> tuple[int, int] | None:
        slot = self.slots[index]
        assert start == slot.num_computed
        stop = start + count
        assert stop <= len(slot.tokens)
        assert sample == (stop == len(slot.tokens))
        assert stop <= len(slot.blocks) * self.block_size
        for position in range(start, stop):
            self.cache[self.place(slot, position)] = tuple(slot.tokens[: position + 1])
        for position in range(stop):
            assert self.cache[self.place(slot, position)] == tuple(slot.tokens[: position + 1])
        slot.num_computed = stop
        if not sample:
            return None
        slot.tokens.append(next_token(slot.tokens))
        return index, slot.tokens[-1]

    def place(self, slot: Slot, position: int) -> tuple[int, int]:
        return slot.blocks[position // self.block_size], position % self.block_size


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


def request(name: str, prompt: list[int], **sampling: Any) -> Generate:
    params = SamplingParams(**sampling)
    return Generate(request_id=name, prompt_token_ids=tuple(prompt), sampling=params, eos_token_ids=(EOS,))


def scheduler(**changes: int) -> Scheduler:
    options = {
        "num_blocks": 8,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "vocab_size": VOCAB_SIZE,
        "epoch": 1,
    }
    return Scheduler(**(options | changes))


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[str, Any]], int]:
    """Sizes, a list of events (a request, an abort of the n-th request, a step), and the plans in flight."""
    sizes = {
        "num_blocks": draw(st.integers(2, 12)),
        "block_size": draw(st.integers(1, 5)),
        "max_num_seqs": draw(st.integers(1, 5)),
        "max_num_batched_tokens": draw(st.integers(1, 24)),
        "max_model_len": draw(st.integers(2, 40)),
    }
    prompt = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30)
    max_tokens = st.one_of(st.none(), st.integers(1, 30))
    arrival = st.tuples(st.just("add"), st.tuples(prompt, max_tokens, st.booleans()))
    abort = st.tuples(st.just("abort"), st.integers(0, 10))
    step = st.tuples(st.just("step"), st.none())
    return sizes, draw(st.lists(st.one_of(arrival, step, step, abort), max_size=40)), draw(st.integers(1, 3))


class Simulation:
    """A scheduler, simulated ranks with a queue of plans, and the answers so far."""

    def __init__(self, sizes: dict[str, int], max_in_flight: int) -> None:
        self.scheduler = scheduler(**sizes)
        ranks = ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")
        self.ranks = SimulatedRanks(**{name: sizes[name] for name in ranks})
        self.max_in_flight = max_in_flight
        self.plans: deque[StepPlan] = deque()
        self.answers: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.aborted: set[str] = set()

    def step(self) -> None:
        while len(self.plans) < self.max_in_flight and (plan := self.scheduler.schedule()):
            self.scheduler.check()
            self.plans.append(plan)
        assert bool(self.plans) >= self.scheduler.has_work, "there is work, but no step to do it"
        if self.plans:
            for output in self.scheduler.update(self.ranks.execute(self.plans.popleft())):
                self.take(output)
        self.scheduler.check()

    def take(self, output: TokenOutput) -> None:
        assert output.request_id not in self.finished
        assert output.request_id not in self.aborted
        self.answers.setdefault(output.request_id, []).extend(output.token_ids)
        if output.finish_reason:
            self.finished[output.request_id] = output.finish_reason

    def run_to_the_end(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work and not self.plans:
                return
            self.step()
        raise AssertionError(f"still busy after {limit} steps")


@settings(max_examples=400, deadline=None)
@given(scenarios())
def test_every_request_ends_with_the_answer_it_would_get_alone(
    scenario: tuple[dict[str, int], list[tuple[str, Any]], int],
) -> None:
    sizes, events, max_in_flight = scenario
    simulation = Simulation(sizes, max_in_flight)
    requests: dict[str, Generate] = {}
    for name, (kind, value) in zip(map(str, range(len(events))), events, strict=True):
        if kind == "step":
            simulation.step()
        elif kind == "abort":
            wanted = [*requests][value] if value < len(requests) else "unknown"
            if wanted not in simulation.finished:
                simulation.aborted.add(wanted)
            simulation.scheduler.abort(wanted)
        else:
            prompt, max_tokens, ignore_eos = value
            new = request(name, prompt, max_tokens=max_tokens, ignore_eos=ignore_eos)
            if len(prompt) >= simulation.scheduler.capacity:
                with pytest.raises(RequestError, match=f"{len(prompt)} tokens"):
                    simulation.scheduler.add(new)
                continue
            simulation.scheduler.add(new)
            requests[name] = new
        simulation.scheduler.check()
    simulation.run_to_the_end()
    assert simulation.scheduler.stats().kv_cache_usage == 0
    for name, done in requests.items():
        if name not in simulation.aborted:
            answer = (simulation.answers[name], simulation.finished[name])
            assert answer == expected_answer(done, simulation.scheduler.capacity)


def test_decodes_and_prefill_chunks_share_a_step_under_the_token_budget() -> None:
    simulation = Simulation({"num_blocks": 20, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 8}, 1)
    simulation.scheduler.add(request("a", [1, 2], ignore_eos=True))
    simulation.step()
    simulation.scheduler.add(request("b", [3] * 12, ignore_eos=True))
    plan = simulation.scheduler.schedule()
    assert plan is not None
    assert [(work.start, work.num_tokens, work.sample) for work in plan.work] == [(2, 1, True), (0, 7, False)]
    simulation.scheduler.update(simulation.ranks.execute(plan))
    plan = simulation.scheduler.schedule()
    assert plan is not None
    assert [(work.start, work.num_tokens, work.sample) for work in plan.work] == [(3, 1, True), (7, 5, True)]


def test_a_waiting_request_does_not_overtake_an_earlier_one_that_does_not_fit() -> None:
    engine = scheduler(num_blocks=8, block_size=4)
    engine.add(request("a", [1] * 20))
    engine.add(request("large", [2] * 20))
    engine.add(request("small", [3]))
    engine.schedule()
    assert (engine.stats().num_requests_running, engine.stats().num_requests_waiting) == (1, 2)


def test_when_blocks_run_out_the_newest_is_preempted_and_keeps_its_tokens() -> None:
    sizes = {"num_blocks": 4, "block_size": 2, "max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 8}
    simulation = Simulation(sizes, 1)
    old = request("old", [1, 2, 3], max_tokens=4, ignore_eos=True)
    new = request("new", [4, 5, 6], max_tokens=4, ignore_eos=True)
    simulation.scheduler.add(old)
    simulation.scheduler.add(new)
    simulation.step()
    simulation.step()
    plan = simulation.scheduler.schedule()
    assert plan is not None
    assert plan.free == (1,)
    assert [work.slot for work in plan.work] == [0]
    assert simulation.scheduler.stats().preemptions == 1
    for output in simulation.scheduler.update(simulation.ranks.execute(plan)):
        simulation.take(output)
    simulation.run_to_the_end()
    assert (simulation.answers["old"], "length") == expected_answer(old, 8)
    assert (simulation.answers["new"], "length") == expected_answer(new, 8)


def test_a_lone_sequence_that_fills_the_cache_ends_with_length() -> None:
    simulation = Simulation({"num_blocks": 2, "block_size": 4, "max_num_seqs": 1, "max_num_batched_tokens": 8}, 1)
    simulation.scheduler.add(request("a", [1, 2, 3], max_tokens=None, ignore_eos=True))
    simulation.run_to_the_end()
    assert simulation.finished == {"a": "length"}
    assert len(simulation.answers["a"]) == 8 - 3


def test_a_stop_token_ends_the_answer_and_is_part_of_it() -> None:
    prompt = [1, 2, 3]
    first = next_token(prompt)
    simulation = Simulation({"num_blocks": 8, "block_size": 4, "max_num_seqs": 1, "max_num_batched_tokens": 8}, 1)
    simulation.scheduler.add(request("a", prompt, stop_token_ids=(first,)))
    simulation.run_to_the_end()
    assert (simulation.answers["a"], simulation.finished["a"]) == ([first], "stop")


def test_blocks_of_an_aborted_request_are_free_at_once_and_its_slot_is_in_the_next_plan() -> None:
    simulation = Simulation({"num_blocks": 8, "block_size": 4, "max_num_seqs": 1, "max_num_batched_tokens": 8}, 1)
    simulation.scheduler.add(request("a", [1, 2, 3], ignore_eos=True))
    simulation.scheduler.add(request("b", [4], ignore_eos=True))
    simulation.step()
    simulation.scheduler.abort("a")
    assert simulation.scheduler.stats().kv_cache_usage == 0
    plan = simulation.scheduler.schedule()
    assert plan is not None
    assert plan.free == (0,)
    assert [start.slot for start in plan.start] == [0]


def test_a_request_aborted_while_its_sample_is_in_flight_has_no_output() -> None:
    simulation = Simulation({"num_blocks": 8, "block_size": 4, "max_num_seqs": 1, "max_num_batched_tokens": 8}, 1)
    simulation.scheduler.add(request("a", [1, 2, 3]))
    plan = simulation.scheduler.schedule()
    assert plan is not None
    simulation.scheduler.abort("a")
    assert simulation.scheduler.update(simulation.ranks.execute(plan)) == ()
    assert not simulation.scheduler.has_work


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ([1] * 32, r"32 tokens, but the KV cache holds 32 \(8 blocks of 4\)"),
        ([1, VOCAB_SIZE], "token id 50, but the model's ids are 0 to 49"),
        ([1, -3], "token id -3"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused_with_the_numbers(prompt: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        scheduler().add(request("a", prompt))
    assert refused.value.param == "prompt"


def test_a_prompt_over_the_models_limit_is_refused_with_the_limit() -> None:
    with pytest.raises(RequestError, match="20 tokens, but the model's limit is 16"):
        scheduler(max_model_len=16).add(request("a", [1] * 20))


def test_a_request_without_a_seed_gets_one_that_follows_from_the_engines_seed() -> None:
    def seeds(seed: int) -> list[int]:
        engine = scheduler(seed=seed)
        for name in "abc":
            engine.add(request(name, [1], seed=5 if name == "b" else None))
        plan = engine.schedule()
        assert plan is not None
        return [start.seed for start in plan.start]

    assert seeds(1) == seeds(1) != seeds(2)
    assert seeds(1)[1] == 5
    assert len(set(seeds(1))) == 3


def test_a_block_given_back_twice_is_refused() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    blocks = manager.allocate(2)
    manager.free(blocks)
    with pytest.raises(KeyError):
        manager.free(blocks)


def test_a_sequence_with_a_sample_in_flight_is_not_preempted() -> None:
    sizes = {"num_blocks": 2, "block_size": 2, "max_num_seqs": 2, "max_num_batched_tokens": 8}
    engine, ranks = scheduler(**sizes), SimulatedRanks(**sizes)
    engine.add(request("old", [1, 2], ignore_eos=True))
    first = engine.schedule()
    engine.add(request("new", [3], ignore_eos=True))
    second = engine.schedule()
    assert first is not None
    assert second is not None
    engine.update(ranks.execute(first))
    assert engine.schedule() is None
    assert engine.stats().preemptions == 0
    engine.update(ranks.execute(second))
    assert engine.schedule() is not None
    assert engine.stats().preemptions == 1


def test_some_blocks_stay_free_when_a_sequence_starts_beside_others() -> None:
    engine = scheduler(num_blocks=200, block_size=1, max_num_batched_tokens=400, max_model_len=300)
    engine.add(request("a", [1] * 100))
    engine.add(request("b", [1] * 99))
    engine.schedule()
    assert engine.stats().num_requests_running == 1
