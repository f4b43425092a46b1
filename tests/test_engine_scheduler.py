"""The scheduler's rules against simulated ranks: who runs when, for whom others make way, and what comes out."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import EOS, VOCAB_SIZE, Simulation, next_token, request, scheduler

from tpdist.control.messages import Generate, StepPlan
from tpdist.errors import RequestError

Scenario = tuple[dict[str, int], list[tuple[str, Any]], int]


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Sizes, a list of events (a request, an abort of the n-th request, a step), and the plans in flight. Prompts
    begin with a piece of one of two stems."""
    sizes = {
        "num_blocks": draw(st.integers(4, 16)),
        "block_size": draw(st.integers(1, 5)),
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.integers(1, 24)),
        "max_model_len": draw(st.integers(2, 60)),
        "enable_prefix_caching": draw(st.sampled_from([1, 1, 1, 0])),
    }
    token = st.integers(0, VOCAB_SIZE - 1)
    stems = draw(st.lists(st.lists(token, min_size=6, max_size=16), min_size=2, max_size=2))
    stem = st.tuples(st.sampled_from(stems), st.integers(0, 16)).map(lambda pair: pair[0][: pair[1]])
    prompt = st.tuples(stem, st.lists(token, min_size=1, max_size=4)).map(lambda pair: pair[0] + pair[1])
    options = st.fixed_dictionaries(
        {
            "max_tokens": st.one_of(st.none(), st.integers(1, 20)),
            "ignore_eos": st.sampled_from([True, True, False]),
            "priority": st.integers(0, 2),
            "logprobs": st.sampled_from([None, 0]),
            "prompt_logprobs": st.sampled_from([None, None, 0]),
        }
    )
    arrival = st.tuples(st.just("add"), st.tuples(st.one_of(prompt, st.sampled_from(stems)), options))
    abort = st.tuples(st.just("abort"), st.integers(0, 10))
    step = st.tuples(st.just("step"), st.none())
    some = st.lists(st.one_of(arrival, step), max_size=6)
    many = st.lists(st.one_of(arrival, arrival, arrival, step, step, abort), min_size=12, max_size=40)
    return sizes, draw(st.one_of(some, many)), draw(st.integers(1, 3))


def play(simulation: Simulation, events: list[tuple[str, Any]]) -> dict[str, Generate]:
    """Let the events happen; the requests that were accepted."""
    requests: dict[str, Generate] = {}
    for name, (kind, value) in zip(map(str, range(len(events))), events, strict=True):
        if kind == "step":
            simulation.step()
        elif kind == "abort":
            simulation.abort([*requests][value] if value < len(requests) else "unknown")
        elif len(value[0]) < simulation.scheduler.capacity:
            requests[name] = simulation.add(name, value[0], **value[1])
        else:
            with pytest.raises(RequestError, match=f"{len(value[0])} tokens"):
                simulation.add(name, value[0], **value[1])
        simulation.scheduler.check()
    return requests


def test_the_first_token_tells_how_long_its_request_waited() -> None:
    """From when it was handed over, or else was added, to its first start; a preemption does not count anew."""
    now = 100.0
    simulation = Simulation(num_blocks=4, block_size=2, max_num_seqs=1, clock=lambda: now)
    simulation.add("first", [1, 2], max_tokens=3, ignore_eos=True)
    simulation.scheduler.add(msgspec.structs.replace(request("second", [3]), handed_over_s=90.0))
    now = 101.5
    while not simulation.is_finished("first"):
        simulation.step()
    now = 107.0
    simulation.run_to_the_end()
    waits = {name: [output.queue_s for output in outputs] for name, outputs in simulation.outputs.items()}
    assert waits["first"] == [1.5, None, None]
    assert waits["second"][0] == 17.0
    assert set(waits["second"][1:]) <= {None}


@settings(max_examples=400, deadline=None)
@given(scenarios())
def test_every_request_ends_with_the_answer_it_would_get_alone(scenario: Scenario) -> None:
    sizes, events, max_in_flight = scenario
    simulation = Simulation(max_in_flight, **sizes)
    requests = play(simulation, events)
    simulation.run_to_the_end()
    answered = {name: done for name, done in requests.items() if name not in simulation.aborted}
    stats = simulation.scheduler.stats()
    assert (stats.kv_cache_usage, stats.num_requests_running, stats.num_requests_waiting) == (0, 0, 0)
    for name, done in answered.items():
        simulation.assert_answered(done)
        size, length = sizes["block_size"], len(done.prompt_token_ids)
        assert simulation.num_cached(name) % size == 0
        assert simulation.num_cached(name) < length
        assert simulation.num_cached(name) == 0 or done.sampling.prompt_logprobs is None
    found = sum(simulation.num_cached(name) for name in answered)
    asked = sum(len(each.prompt_token_ids) for each in answered.values() if each.sampling.prompt_logprobs is None)
    if not sizes["enable_prefix_caching"]:
        assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (0, 0)
    elif len(answered) == len(requests):
        assert stats.prefix_cache_hits == found
        assert asked <= stats.prefix_cache_queries <= asked + len(answered)


@settings(max_examples=200, deadline=None)
@given(scenarios(), st.integers(2, 4))
def test_with_stages_every_request_ends_with_the_answer_it_would_get_alone(scenario: Scenario, num_stages: int) -> None:
    sizes, events, _ = scenario
    simulation = Simulation(num_stages, **sizes, num_stages=num_stages)
    requests = play(simulation, events)
    simulation.run_to_the_end()
    for name, done in requests.items():
        if name not in simulation.aborted:
            simulation.assert_answered(done)
    assert simulation.scheduler.stats().kv_cache_usage == 0


def test_stages_share_the_decodes_so_that_each_has_as_many() -> None:
    simulation = Simulation(3, num_blocks=100, max_num_seqs=10, max_num_batched_tokens=60, num_stages=3)
    for name in map(str, range(7)):
        simulation.add(name, [1], max_tokens=12, ignore_eos=True)
    sizes = []
    for _ in range(9):
        simulation.step()
        sizes.append([len(plan.work) for plan in simulation.plans])
    assert all(len(plans) == 2 and max(plans) <= 3 for plans in sizes[4:]), sizes
    simulation.run_to_the_end()


def test_steps_in_flight_together_keep_the_token_budget() -> None:
    simulation = Simulation(2, num_blocks=100, max_num_batched_tokens=9, max_model_len=200, num_stages=2)
    simulation.add("long", [1] * 40, max_tokens=1, ignore_eos=True)
    plans = [simulation.plan() for _ in range(2)]
    assert [plan.work[0].num_tokens for plan in plans] == [5, 5]
    simulation.run_to_the_end()


def work(plan: StepPlan) -> list[tuple[int, int, bool]]:
    return [(each.start, each.num_tokens, each.sample) for each in plan.work]


def test_decodes_and_prefill_chunks_share_a_step_under_the_token_budget() -> None:
    simulation = Simulation(num_blocks=20, max_num_batched_tokens=8)
    simulation.add("a", [1, 2], ignore_eos=True)
    simulation.step()
    simulation.add("b", [3] * 12, ignore_eos=True)
    assert work(simulation.plan()) == [(2, 1, True), (0, 7, False)]
    simulation.step()
    assert work(simulation.plan()) == [(3, 1, True), (7, 5, True)]


def test_a_short_prompt_gets_its_first_token_while_a_long_one_before_it_is_prefilled() -> None:
    simulation = Simulation(num_blocks=100, max_model_len=200)
    simulation.add("long", [1] * 160, ignore_eos=True)
    simulation.step()
    simulation.add("short", [2] * 6, ignore_eos=True)
    assert simulation.run_until("short") == 1
    assert not simulation.answer("long")


def test_a_short_prompt_is_not_held_back_by_several_long_ones() -> None:
    simulation = Simulation(num_blocks=200, max_model_len=200)
    for number in range(3):
        simulation.add(f"long {number}", [number] * 160, ignore_eos=True)
    simulation.step()
    simulation.add("short", [9] * 6, ignore_eos=True)
    assert simulation.run_until("short") == 1


def test_short_prompts_take_no_more_than_half_of_the_steps_from_a_long_one_before_them() -> None:
    simulation = Simulation(num_blocks=200, max_num_seqs=20, max_model_len=200)
    simulation.add("long", [1] * 160, ignore_eos=True)
    for number in range(15):
        simulation.add(f"short {number}", [number] * 15, max_tokens=1, ignore_eos=True)
    assert simulation.run_until("long") == 160 // (16 // 2)


def test_prompts_of_one_length_are_prefilled_one_after_the_other_rather_than_all_at_once() -> None:
    simulation = Simulation(num_blocks=200, max_model_len=200)
    for number in range(4):
        simulation.add(str(number), [number] * 64, max_tokens=1, ignore_eos=True)
    steps = [simulation.run_until(str(number)) for number in range(4)]
    assert steps == [8, 0, 8, 0]


def test_the_budget_that_a_prefill_does_not_need_goes_to_the_next() -> None:
    simulation = Simulation(num_blocks=20, max_num_batched_tokens=16)
    simulation.add("a", [1] * 5, ignore_eos=True)
    simulation.add("b", [2] * 20, ignore_eos=True)
    simulation.add("c", [3] * 30, ignore_eos=True)
    assert work(simulation.plan()) == [(0, 5, True), (0, 8, False)]


def test_a_waiting_request_does_not_overtake_an_earlier_one_that_does_not_fit() -> None:
    engine = scheduler(num_blocks=8, block_size=4)
    engine.add(request("a", [1] * 20))
    engine.add(request("large", [2] * 20))
    engine.add(request("small", [3]))
    engine.schedule()
    assert (engine.stats().num_requests_running, engine.stats().num_requests_waiting) == (1, 2)


def test_no_request_starts_while_decodes_take_the_whole_budget() -> None:
    simulation = Simulation(max_num_batched_tokens=1)
    simulation.add("a", [1], max_tokens=3, ignore_eos=True)
    simulation.step()
    simulation.add("b", [2], max_tokens=3, ignore_eos=True)
    simulation.step()
    assert simulation.scheduler.stats().num_requests_running == 1
    assert simulation.run_until("b") == 2


def test_requests_start_in_the_order_of_priority_and_then_of_arrival() -> None:
    simulation = Simulation(max_num_seqs=1)
    for name, priority in [("a", 5), ("b", 1), ("c", -3), ("d", 1)]:
        simulation.add(name, [1, 2], priority=priority, max_tokens=1)
    simulation.run_to_the_end()
    assert [*simulation.outputs] == ["c", "b", "d", "a"]


def test_a_higher_priority_goes_first_among_prefills_that_run() -> None:
    simulation = Simulation(num_blocks=100, max_model_len=200)
    simulation.add("low", [1] * 64, priority=1, ignore_eos=True)
    simulation.step()
    simulation.add("high", [2] * 32, priority=0, ignore_eos=True)
    assert simulation.run_until("high") <= 4
    assert not simulation.answer("low")


def test_of_the_prefills_behind_the_first_the_higher_priority_goes_before_the_shorter_one() -> None:
    simulation = Simulation(num_blocks=100, max_model_len=200)
    for name, length, priority in [("first", 64, 0), ("higher", 40, 1), ("shorter", 20, 2)]:
        simulation.add(name, [priority] * length, priority=priority, ignore_eos=True)
    assert [each.slot for each in simulation.plan().work] == [0, 1]
    simulation.run_until("higher")
    assert not simulation.answer("shorter")


def test_nobody_is_preempted_in_vain_if_the_lower_priorities_do_not_suffice() -> None:
    simulation = Simulation(num_blocks=10)
    simulation.add("equal", [1] * 14, priority=1, max_tokens=6, ignore_eos=True)
    simulation.add("low", [2] * 2, priority=2, max_tokens=6, ignore_eos=True)
    simulation.step()
    simulation.add("new", [3] * 27, priority=1, max_tokens=1, ignore_eos=True)
    simulation.run_to_the_end()
    assert simulation.scheduler.stats().preemptions == 0
    assert max(simulation.ended, key=lambda name: simulation.ended[name]) == "new"


def test_a_plan_that_starts_many_long_prompts_from_the_cache_fits_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpdist.engine.scheduler.MAX_STARTED_TOKENS", 100)
    simulation = Simulation(num_blocks=100, max_num_seqs=20, max_num_batched_tokens=100, max_model_len=100)
    simulation.add("first", [1] * 40, max_tokens=30, ignore_eos=True)
    simulation.step()
    for index in range(15):
        simulation.add(str(index), [1] * 40, max_tokens=1, ignore_eos=True)
    assert len(simulation.plan().start) == 3


@pytest.mark.parametrize("sizes", [{"max_num_seqs": 2}, {"num_blocks": 4}])
def test_a_waiting_request_takes_slot_or_blocks_from_one_of_lower_priority(sizes: dict[str, int]) -> None:
    simulation = Simulation(**sizes)
    requests = [
        simulation.add("middle", [1] * 5, priority=1, max_tokens=3, ignore_eos=True),
        simulation.add("low", [2] * 5, priority=2, max_tokens=3, ignore_eos=True),
    ]
    simulation.step()
    requests.append(simulation.add("high", [3] * 5, priority=0, max_tokens=3, ignore_eos=True))
    plan = simulation.plan()
    assert plan.free == (1,)
    assert work(plan) == [(5, 1, True), (0, 5, True)]
    assert simulation.scheduler.stats().preemptions == 1
    simulation.run_to_the_end()
    for done in requests:
        simulation.assert_answered(done)


@pytest.mark.parametrize(("priority", "sizes"), [(1, {"max_num_seqs": 1}), (2, {"max_num_seqs": 1}), (0, {})])
def test_nobody_is_preempted_for_an_equal_or_lower_priority_nor_where_there_is_room(
    priority: int, sizes: dict[str, int]
) -> None:
    simulation = Simulation(**sizes)
    simulation.add("first", [1] * 5, priority=1, max_tokens=3, ignore_eos=True)
    simulation.step()
    simulation.add("second", [2] * 5, priority=priority, max_tokens=3, ignore_eos=True)
    simulation.run_to_the_end()
    assert simulation.scheduler.stats().preemptions == 0


def test_a_decode_takes_the_block_of_a_lower_priority_that_came_before_it() -> None:
    simulation = Simulation(num_blocks=4, block_size=2, max_num_seqs=2, max_num_batched_tokens=8)
    low = simulation.add("low", [1, 2, 3], priority=1, max_tokens=4, ignore_eos=True)
    high = simulation.add("high", [4, 5, 6], priority=0, max_tokens=4, ignore_eos=True)
    simulation.run_to_the_end()
    assert simulation.scheduler.stats().preemptions == 1
    assert simulation.ended["high"] < simulation.ended["low"]
    for done in (low, high):
        simulation.assert_answered(done)


def test_when_blocks_run_out_the_newest_is_preempted_and_keeps_its_tokens() -> None:
    simulation = Simulation(num_blocks=4, block_size=2, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=8)
    old = simulation.add("old", [1, 2, 3], max_tokens=4, ignore_eos=True)
    new = simulation.add("new", [4, 5, 6], max_tokens=4, ignore_eos=True)
    simulation.step()
    simulation.step()
    plan = simulation.plan()
    assert plan.free == (1,)
    assert [each.slot for each in plan.work] == [0]
    assert simulation.scheduler.stats().preemptions == 1
    simulation.run_to_the_end()
    for done in (old, new):
        simulation.assert_answered(done)


def test_a_lone_sequence_that_fills_the_cache_ends_with_length() -> None:
    simulation = Simulation(num_blocks=2, block_size=4, max_num_seqs=1, max_num_batched_tokens=8)
    simulation.add("a", [1, 2, 3], max_tokens=None, ignore_eos=True)
    simulation.run_to_the_end()
    assert simulation.finish_reason("a") == "length"
    assert len(simulation.answer("a")) == 8 - 3


def test_a_stop_token_ends_the_answer_and_is_part_of_it() -> None:
    prompt = [1, 2, 3]
    first = next_token(prompt)
    simulation = Simulation()
    simulation.add("a", prompt, stop_token_ids=(first,))
    simulation.run_to_the_end()
    assert (simulation.answer("a"), simulation.finish_reason("a")) == ([first], "stop")


def test_an_answer_may_end_with_the_end_of_sequence_token() -> None:
    prompt = next([token] for token in range(VOCAB_SIZE) if next_token([token]) == EOS)
    simulation = Simulation()
    simulation.add("a", prompt)
    simulation.run_to_the_end()
    assert (simulation.answer("a"), simulation.finish_reason("a")) == ([EOS], "stop")


def test_blocks_of_an_aborted_request_are_free_at_once_and_its_slot_is_in_the_next_plan() -> None:
    simulation = Simulation(max_num_seqs=1)
    simulation.add("a", [1, 2, 3], ignore_eos=True)
    simulation.add("b", [4], ignore_eos=True)
    simulation.step()
    simulation.abort("a")
    assert simulation.scheduler.stats().kv_cache_usage == 0
    plan = simulation.plan()
    assert plan.free == (0,)
    assert [start.slot for start in plan.start] == [0]


def test_a_request_aborted_while_its_results_are_in_flight_has_no_output() -> None:
    simulation = Simulation(max_num_batched_tokens=2)
    simulation.add("chunk", [1, 2, 3], prompt_logprobs=0)
    simulation.plan()
    simulation.abort("chunk")
    simulation.add("sample", [1, 2], prompt_logprobs=0, logprobs=0)
    simulation.plan()
    simulation.abort("sample")
    simulation.run_to_the_end()
    assert simulation.outputs == {}


def test_log_probabilities_of_a_prompt_come_with_its_chunks() -> None:
    simulation = Simulation(max_num_batched_tokens=4)
    done = simulation.add("a", [*range(10)], prompt_logprobs=0, logprobs=0, max_tokens=2, ignore_eos=True)
    simulation.run_to_the_end()
    simulation.assert_answered(done)
    shapes = [(len(each.token_ids), len(each.prompt_logprobs), len(each.logprobs)) for each in simulation.outputs["a"]]
    assert shapes == [(0, 4, 0), (0, 4, 0), (1, 1, 1), (1, 0, 1)]


def test_log_probabilities_of_a_prompt_are_not_delivered_again_after_a_preemption() -> None:
    simulation = Simulation(max_num_seqs=1, max_num_batched_tokens=4)
    done = simulation.add("a", [*range(10)], priority=1, prompt_logprobs=0, max_tokens=2, ignore_eos=True)
    simulation.step()
    simulation.add("b", [1], max_tokens=1, ignore_eos=True)
    simulation.run_to_the_end()
    assert simulation.scheduler.stats().preemptions == 1
    simulation.assert_answered(done)
    assert [len(output.prompt_logprobs) for output in simulation.outputs["a"]] == [4, 4, 1, 0]


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
    with pytest.raises(RequestError, match="20 tokens, but the longest sequence here has 16"):
        scheduler(max_model_len=16).add(request("a", [1] * 20))


def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused() -> None:
    scheduler().add(request("a", [1], logit_bias={0: 1.0, VOCAB_SIZE - 1: 1.0}))
    with pytest.raises(RequestError, match="logit_bias names token id 50, but the model's ids are 0 to 49") as refused:
        scheduler().add(request("a", [1], logit_bias={VOCAB_SIZE: 1.0}))
    assert refused.value.param == "logit_bias"


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


def test_a_sequence_with_a_sample_in_flight_is_not_preempted() -> None:
    simulation = Simulation(num_blocks=2, block_size=2, max_num_seqs=2, max_num_batched_tokens=8)
    engine = simulation.scheduler
    simulation.add("old", [1, 2], ignore_eos=True)
    simulation.plan()
    simulation.add("new", [3], ignore_eos=True)
    simulation.plan()
    simulation.run_oldest_plan()
    assert engine.schedule() is None
    assert engine.stats().preemptions == 0
    simulation.run_oldest_plan()
    assert engine.schedule() is not None
    assert engine.stats().preemptions == 1


def test_some_blocks_stay_free_when_a_sequence_starts_beside_others() -> None:
    engine = scheduler(num_blocks=200, block_size=1, max_num_batched_tokens=400, max_model_len=300)
    engine.add(request("a", [1] * 100))
    engine.add(request("b", [2] * 99))
    engine.schedule()
    assert engine.stats().num_requests_running == 1
