"""Which blocks sequences share, through the scheduler and simulated ranks that see every clobbered block."""

import pytest
from simulated_ranks import Simulation

PROMPT = list(range(20))


def blocks_of(simulation: Simulation, slot: int) -> list[int]:
    return simulation.ranks.slots[slot].blocks


def test_a_second_request_with_the_same_beginning_computes_only_what_follows() -> None:
    simulation = Simulation(num_blocks=20, max_num_batched_tokens=64)
    first = simulation.add("first", PROMPT, max_tokens=1)
    simulation.run_to_the_end()
    second = simulation.add("second", [*PROMPT[:13], 40, 41], max_tokens=1)
    plan = simulation.plan()
    assert [(work.start, work.num_tokens) for work in plan.work] == [(12, 3)]
    simulation.run_to_the_end()
    assert (simulation.num_cached("first"), simulation.num_cached("second")) == (0, 12)
    stats = simulation.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (20 + 15, 12)
    for done in (first, second):
        simulation.assert_answered(done)


def test_the_last_token_is_computed_even_if_its_block_is_cached() -> None:
    simulation = Simulation(num_blocks=20, max_num_batched_tokens=64)
    for name in ("first", "second"):
        simulation.add(name, PROMPT, max_tokens=1)
        simulation.run_to_the_end()
    assert simulation.num_cached("second") == 16


@pytest.mark.parametrize("budget", [5, 16, 64, 200])
def test_sequences_with_the_same_prompt_compute_it_once_between_them(budget: int) -> None:
    prompt = [7 * i % 50 for i in range(81)]
    simulation = Simulation(num_blocks=100, max_num_batched_tokens=budget, max_model_len=100)
    same = [simulation.add(str(number), prompt, max_tokens=1) for number in range(4)]
    simulation.run_to_the_end()
    for done in same:
        simulation.assert_answered(done)
    assert simulation.ranks.num_computed == 80 + 4
    assert sum(simulation.num_cached(str(number)) for number in range(4)) == 3 * 80


def test_sequences_that_start_in_one_plan_share_the_blocks_of_the_first() -> None:
    simulation = Simulation(num_blocks=40, max_num_batched_tokens=64)
    for number in range(3):
        simulation.add(str(number), PROMPT, ignore_eos=True)
    plan = simulation.plan()
    simulation.step()
    assert [(work.start, work.num_tokens) for work in plan.work] == [(0, 20), (16, 4), (16, 4)]
    assert blocks_of(simulation, 0)[:4] == blocks_of(simulation, 1)[:4] == blocks_of(simulation, 2)[:4]
    assert len({blocks_of(simulation, slot)[4] for slot in range(3)}) == 3
    assert simulation.scheduler.stats().kv_cache_usage == (4 + 3) / 40


def test_a_prefill_goes_on_behind_what_another_one_has_computed_meanwhile() -> None:
    simulation = Simulation(num_blocks=40, max_num_batched_tokens=8)
    simulation.add("first", PROMPT, ignore_eos=True)
    simulation.step()
    simulation.add("second", PROMPT, ignore_eos=True)
    assert [(work.start, work.num_tokens) for work in simulation.plan().work] == [(8, 4), (12, 4)]
    simulation.step()
    assert [(work.start, work.num_tokens) for work in simulation.plan().work] == [(16, 4), (16, 4)]


def test_a_prefill_that_stopped_inside_a_block_goes_on_there() -> None:
    prompt = [3 * i % 50 for i in range(60)]
    simulation = Simulation(num_blocks=40, max_num_batched_tokens=18)
    low = simulation.add("low", prompt, priority=1, max_tokens=1)
    simulation.step()
    high = simulation.add("high", prompt, max_tokens=1)
    assert [(work.start, work.num_tokens) for work in simulation.plan().work] == [(16, 8), (18, 10)]
    simulation.run_to_the_end()
    for done in (low, high):
        simulation.assert_answered(done)


def test_a_block_that_two_sequences_computed_stays_known_as_the_first_ones() -> None:
    simulation = Simulation(num_blocks=40, max_num_batched_tokens=64)
    simulation.add("first", PROMPT, ignore_eos=True)
    simulation.add("second", PROMPT, ignore_eos=True, prompt_logprobs=0)
    simulation.add("third", PROMPT, ignore_eos=True)
    simulation.step()
    assert not {*blocks_of(simulation, 0)} & {*blocks_of(simulation, 1)}
    assert blocks_of(simulation, 2)[:4] == blocks_of(simulation, 0)[:4]


def test_a_request_for_the_prompts_log_probabilities_computes_its_prompt_and_leaves_it_for_others() -> None:
    simulation = Simulation(num_blocks=40, max_num_batched_tokens=64)
    for name, prompt_logprobs in [("first", 0), ("second", 0), ("third", None)]:
        done = simulation.add(name, PROMPT, max_tokens=1, prompt_logprobs=prompt_logprobs)
        simulation.run_to_the_end()
        simulation.assert_answered(done)
    assert [simulation.num_cached(name) for name in ("first", "second", "third")] == [0, 0, 16]
    stats = simulation.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (20, 16)


def preempt_low(simulation: Simulation) -> None:
    """Let one request of high priority take the only slot for one token."""
    simulation.add("high", [49], max_tokens=1, ignore_eos=True)
    simulation.step()
    assert simulation.scheduler.stats().preemptions == 1


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_a_preempted_sequence_finds_its_own_blocks_which_count_as_no_hits(prompt_logprobs: int | None) -> None:
    simulation = Simulation(num_blocks=20, max_num_seqs=1, max_num_batched_tokens=64)
    low = simulation.add("low", PROMPT, priority=1, max_tokens=9, ignore_eos=True, prompt_logprobs=prompt_logprobs)
    for _ in range(6):
        simulation.step()
    preempt_low(simulation)
    assert [(work.start, work.num_tokens) for work in simulation.plan().work] == [(24, 2)]
    simulation.run_to_the_end()
    simulation.assert_answered(low)
    assert simulation.scheduler.stats().prefix_cache_hits == 0


def test_a_sequence_preempted_before_its_prompts_log_probabilities_are_complete_computes_it_again() -> None:
    simulation = Simulation(num_blocks=20, max_num_seqs=1, max_num_batched_tokens=8)
    low = simulation.add("low", PROMPT, priority=1, max_tokens=2, ignore_eos=True, prompt_logprobs=0)
    simulation.step()
    preempt_low(simulation)
    assert [(work.start, work.num_tokens) for work in simulation.plan().work] == [(0, 8)]
    simulation.run_to_the_end()
    simulation.assert_answered(low)


def test_preempting_a_sequence_whose_blocks_are_all_shared_makes_no_room_so_another_goes_too() -> None:
    simulation = Simulation(2, num_blocks=4)
    requests = [
        simulation.add("growing", [1] * 4, max_tokens=3, ignore_eos=True),
        simulation.add("sharing", [2] * 8, priority=1, max_tokens=3, ignore_eos=True),
    ]
    simulation.plan()
    requests.append(simulation.add("sharer", [2] * 9, max_tokens=3, ignore_eos=True))
    simulation.plan()
    simulation.run_oldest_plan()
    simulation.run_oldest_plan()
    assert blocks_of(simulation, 1) == blocks_of(simulation, 2)[:2]
    assert [each.slot for each in simulation.plan().work] == [0]
    simulation.run_to_the_end()
    assert simulation.scheduler.stats().preemptions == 2
    for done in requests:
        simulation.assert_answered(done)


def test_completions_are_cached_too() -> None:
    simulation = Simulation(num_blocks=20, max_num_batched_tokens=64)
    simulation.add("question", PROMPT, max_tokens=9, ignore_eos=True)
    simulation.run_to_the_end()
    simulation.add("next", [*PROMPT, *simulation.answer("question"), 1], max_tokens=1)
    simulation.run_to_the_end()
    assert simulation.num_cached("next") == 28


def test_blocks_of_an_aborted_request_are_found_while_its_step_is_in_flight() -> None:
    simulation = Simulation(2, num_blocks=20, max_num_batched_tokens=64)
    simulation.add("gone", PROMPT)
    simulation.plan()
    simulation.abort("gone")
    done = simulation.add("next", PROMPT, max_tokens=3, ignore_eos=True)
    assert [(work.start, work.num_tokens) for work in simulation.plan().work] == [(16, 4)]
    simulation.run_to_the_end()
    simulation.assert_answered(done)


def test_the_prompt_that_was_used_least_recently_is_dropped_first_and_its_end_before_its_beginning() -> None:
    prompts = {name: [number] * 17 for number, name in enumerate(("a", "b", "c"))}
    simulation = Simulation(num_blocks=12, max_num_batched_tokens=64)

    def num_cached(name: str, again: str) -> int:
        simulation.add(again, prompts[name], max_tokens=1, ignore_eos=True)
        simulation.run_to_the_end()
        return simulation.num_cached(again)

    assert [num_cached("a", "a1"), num_cached("b", "b1"), num_cached("a", "a2")] == [0, 0, 16]
    assert num_cached("c", "c1") == 0
    assert num_cached("a", "a3") == 16
    assert num_cached("b", "b2") == 12


def test_cached_blocks_do_not_count_as_used_and_make_room_for_anybody() -> None:
    simulation = Simulation(num_blocks=8, max_num_batched_tokens=64)
    for number in range(5):
        done = simulation.add(str(number), [number] * 31, max_tokens=1, ignore_eos=True)
        simulation.run_to_the_end()
        simulation.assert_answered(done)
        assert simulation.scheduler.stats().kv_cache_usage == 0
    assert simulation.scheduler.stats().preemptions == 0


def test_nothing_is_shared_where_prefix_caching_is_disabled() -> None:
    simulation = Simulation(num_blocks=20, max_num_batched_tokens=64, enable_prefix_caching=0)
    for name in ("first", "second"):
        simulation.add(name, PROMPT, max_tokens=1)
        simulation.run_to_the_end()
    assert simulation.num_cached("second") == 0
    stats = simulation.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (0, 0)


def test_a_block_is_known_by_all_tokens_before_it() -> None:
    simulation = Simulation(num_blocks=20, max_num_batched_tokens=64)
    for name, prompt in [("first", [1] * 9), ("second", [2] * 4 + [1] * 5), ("third", [1] * 4 + [2] * 5)]:
        simulation.add(name, prompt, max_tokens=1)
        simulation.run_to_the_end()
    assert [simulation.num_cached(name) for name in ("first", "second", "third")] == [0, 0, 4]
