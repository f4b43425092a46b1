"""The best cut of ranks whose caches follow a rule that depends on the cut, against every cut of small models."""

import random
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any, Literal

import pytest
from inventories import GIB, MIB, cpu, demand, gpu, inventory
from plans import small_config

from tpdist.errors import PlanError
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.fitting import Fit, Problem
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.placement import Demand, Device, Objective, Placement
from tpdist.plan.places import Layout, Place
from tpdist.plan.planner import plan_ranks
from tpdist.plan.search import Found
from tpdist.plan.shards import Partition
from tpdist.plan.sizes import Extra, Model


def problem_of(config: ModelConfig, devices: list[Device], *, tp_size: int, objective: Objective) -> Problem:
    places = tuple(
        Place(tuple(devices[start : start + tp_size]), Partition((1,) * tp_size))
        for start in range(0, len(devices), tp_size)
    )
    model = Model(config, decoder_weights(config), Extra())
    layout = Layout(model=model, inventory=inventory(devices), places=places, mode="ranks")
    return Problem(layout=layout, objective=objective)


def all_fits(problem: Problem, asked: Demand) -> Iterator[Fit]:
    """Every cut with all its bytes."""
    num_layers, num_places = problem.layout.model.num_layers, len(problem.layout.places)
    for inner in combinations(range(1, num_layers), num_places - 1):
        counts = tuple(stop - start for start, stop in pairwise((0, *inner, num_layers)))
        yield problem.settle(Found(tuple(range(num_places)), counts, 0.0, 0.0), asked)


def assert_best_of_all(problem: Problem, asked: Demand) -> str:
    """Whether some cut fits: all, some, or none."""
    every = list(all_fits(problem, asked))
    fitting = [fit for fit in every if fit.shortfall_bytes == 0]
    fit, closest = problem.fit(asked), problem.closest(asked)
    assert closest.shortfall_bytes == min(each.shortfall_bytes for each in every)
    assert (fit is not None) == bool(fitting)
    if fit is not None:
        least = min(each.seconds(problem.objective) for each in fitting)
        assert fit.seconds(problem.objective) == pytest.approx(least, rel=1e-9)
    return "all" if len(fitting) == len(every) else "some" if fitting else "none"


def asked_of(rng: random.Random, **changes: Any) -> Demand:
    values = {
        "max_model_len": 4096,
        "max_seq_len": rng.choice((64, 1024, 4096)),
        "max_num_seqs": rng.choice((1, 4, 10**4)),
        "max_num_batched_tokens": 64,
    }
    return demand(**{**values, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_with_a_cache_that_was_asked_for_the_cut_is_the_best_of_all(objective: Objective) -> None:
    rng = random.Random(11)
    outcomes = {"all": 0, "some": 0, "none": 0}
    for _ in range(1000):
        num_layers, num_places, tp_size = rng.randint(2, 8), rng.randint(2, 4), rng.choice((1, 1, 2))
        config = small_config(
            num_hidden_layers=max(num_layers, num_places),
            vocab_size=rng.choice((300, 20_000)),
            tie_word_embeddings=rng.random() < 0.5,
        )
        asked = asked_of(rng, kv_cache_memory_bytes=rng.randint(1, 300) * MIB)
        devices = [
            gpu(index, rng.randint(262, 480) * MIB, bandwidth=rng.choice((1e9, 2e9, 4e9)))
            for index in range(num_places * tp_size)
        ]
        problem = problem_of(config, devices, tp_size=tp_size, objective=objective)
        outcomes[assert_best_of_all(problem, asked)] += 1
    assert min(outcomes.values()) > 50, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_with_the_rule_for_cpus_the_cut_is_the_best_of_all(objective: Objective) -> None:
    """With ranks of one stage or of several on a machine, and stages on several machines."""
    rng = random.Random(12)
    outcomes = {"all": 0, "some": 0, "none": 0}
    for _ in range(1000):
        num_layers, num_places, tp_size = rng.randint(2, 8), rng.randint(2, 4), rng.choice((1, 1, 2))
        config = small_config(
            num_hidden_layers=max(num_layers, num_places),
            num_key_value_heads=rng.choice((2, 8)),
            vocab_size=rng.choice((300, 20_000)),
            tie_word_embeddings=rng.random() < 0.5,
        )
        nodes = sorted(rng.choices("abcd", k=num_places * tp_size))
        devices = [cpu(rng.randint(10, 120) * MIB, node=node, bandwidth=rng.choice((1e9, 2e9))) for node in nodes]
        problem = problem_of(config, devices, tp_size=tp_size, objective=objective)
        outcomes[assert_best_of_all(problem, asked_of(rng))] += 1
    assert min(outcomes.values()) > 50, outcomes


def place(config: ModelConfig, devices: list[Device], asked: Demand, **options: Any) -> Placement:
    defaults = {"tp_size": None, "pp_size": None, "shares": None, "stage_layers": None}
    return plan_ranks(config, decoder_weights(config), inventory(devices), asked, **{**defaults, **options})


def layers_of(placement: Placement) -> list[int]:
    return [layers.size for layers in placement.stage_layers]


def machine(kind: Literal["cuda", "cpu"], size: int, *, node: str, bandwidth: float) -> Device:
    return Device(name=kind, kind=kind, node=node, total_bytes=size * MIB, free_bytes=size * MIB, bandwidth=bandwidth)


def test_nothing_shrinks_if_a_cut_with_fewer_blocks_has_room() -> None:
    """Faster cuts have more blocks than there is room for, and one of these more than the other."""
    config = small_config(num_hidden_layers=4, vocab_size=20_000, tie_word_embeddings=True)
    devices = [machine("cuda", 1353, node="a", bandwidth=2e9), machine("cuda", 1205, node="b", bandwidth=4e9)]
    asked = demand(max_model_len=4096, max_num_batched_tokens=64, kv_cache_memory_bytes=204_472_320)
    placement = place(config, devices, asked, pp_size=2, objective="latency")
    assert (placement.demand, layers_of(placement)) == (asked, [3, 1])


def test_the_context_stays_if_a_cut_leaves_each_cpu_enough_for_its_cache() -> None:
    config = small_config(num_hidden_layers=6, num_key_value_heads=4, vocab_size=20_000)
    devices = [machine("cpu", 372, node="a", bandwidth=2e9), machine("cpu", 290, node="b", bandwidth=4e9)]
    asked = demand(max_model_len=4096, max_num_seqs=1, max_num_batched_tokens=64)
    placement = place(config, devices, asked, pp_size=2, objective="latency")
    assert (placement.demand, layers_of(placement)) == (asked, [3, 3])


def test_the_best_of_many_stages_is_found() -> None:
    """Where the cache that was asked for has just not enough room, so that all that may shrink does."""
    config = small_config(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
    )
    for size in (40, 52, 60, 72):
        devices = [gpu(index, (size + index % 3) * GIB, bandwidth=1e12 * (1 + index % 2)) for index in range(16)]
        asked = demand(dtype="bfloat16", max_model_len=131072, kv_cache_memory_bytes=20 * GIB)
        try:
            place(config, devices, asked, pp_size=16)
        except PlanError:
            assert size == 40
