"""Placements over the devices of one process."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, permutations
from typing import Any

import numpy as np
import pytest
from inventories import GIB, MIB, cpu, demand, disk, gpu, inventory
from plans import small_config

from tpdist.errors import PlanError
from tpdist.plan import costs
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.fitting import Problem
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.placement import Demand, Device, Objective, Placement
from tpdist.plan.places import Layout, Place
from tpdist.plan.planner import plan_mapping
from tpdist.plan.search import Found
from tpdist.plan.shards import Interval, Partition
from tpdist.plan.shrinking import smallest
from tpdist.plan.sizes import Extra, Model

LAYERS = small_config(num_hidden_layers=8, hidden_size=512, intermediate_size=2048, head_dim=64)
"""Of about 15 MiB each."""

SMALL = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_seq_len": 16}


def place(config: ModelConfig, devices: Sequence[Device], asked: Demand | None = None, **options: Any) -> Placement:
    weights = decoder_weights(config)
    return plan_mapping(config, weights, inventory(devices), asked or demand(**SMALL), **{"method": "exact", **options})


def where(placement: Placement) -> list[tuple[str, int]]:
    """Device and number of layers, in the order of the layers."""
    return [(plan.device.name, plan.layers.size) for plan in placement.devices if plan.layers.size]


def assert_consistent(placement: Placement, config: ModelConfig) -> None:
    """What holds of every exact placement that is not refused."""
    used = [plan for plan in placement.devices if plan.layers.size]
    assert [plan.layers for plan in used] == list(placement.stage_layers)
    assert used[0].layers.start == 0
    assert used[-1].layers.stop == config.num_hidden_layers
    assert all(before.layers.stop == after.layers.start for before, after in pairwise(used))
    assert [plan.holds_embedding for plan in used] == [True] + [False] * (len(used) - 1)
    heads = [plan.holds_head for plan in used]
    assert sum(heads) == 1
    assert heads[0] or heads[-1]
    for plan in placement.devices:
        assert plan.rank is None
        assert plan.used_bytes <= plan.usable_bytes
        assert plan.layers.size or plan.used_bytes == 0
    assert used[0].tokens >= costs.demanded_tokens(placement.demand)
    json.dumps(placement.as_dict(), allow_nan=False)


def layout_of(config: ModelConfig, devices: Sequence[Device], *, head_first: bool = False) -> Layout:
    places = tuple(Place((device,), Partition((1,))) for device in devices)
    model = Model(config, decoder_weights(config), Extra())
    return Layout(model=model, inventory=inventory(devices), places=places, mode="devices", head_first=head_first)


def fitting_runs(layout: Layout, asked: Demand) -> np.ndarray:
    """Whether each run of layers fits each device, one by one."""
    size = layout.model.num_layers + 1
    fits = np.zeros((len(layout.places), size, size), dtype=bool)
    for index in range(len(layout.places)):
        for start, stop in combinations(range(size), 2):
            need = layout.need(index, 0, Interval(start, stop), stage=0, demand=asked)
            fits[index, start, stop] = costs.demanded_tokens(asked) * need.token_bytes <= need.room_bytes
    return fits


def all_cuts(num_layers: int, num_places: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every order of some of the places, with the bounds of every cut."""
    for size in range(1, min(num_places, num_layers) + 1):
        for inner in combinations(range(1, num_layers), size - 1):
            for order in permutations(range(num_places), size):
                yield order, (0, *inner, num_layers)


# -- exact ------------------------------------------------------------------------------------------------------------


def test_one_gpu_that_suffices_takes_all() -> None:
    placement = place(LAYERS, [gpu(0, GIB), gpu(1, GIB), cpu(GIB)])
    assert where(placement) == [("cuda:0", 8)]
    assert [plan.device.name for plan in placement.devices] == ["cuda:0", "cuda:1", "cpu"]
    assert (placement.tp_size, placement.pp_size, placement.notes) == (1, 1, ())
    assert_consistent(placement, LAYERS)


def test_the_fastest_gpu_takes_as_much_as_it_can_wherever_it_stands() -> None:
    placement = place(LAYERS, [gpu(0, GIB, bandwidth=1e12), gpu(1, 80 * MIB, bandwidth=3e12), cpu(GIB)])
    counts = dict(where(placement))
    assert counts.keys() == {"cuda:0", "cuda:1"}
    assert_consistent(placement, LAYERS)


def test_throughput_spreads_layers_over_the_gpus() -> None:
    placement = place(LAYERS, [gpu(0, GIB, bandwidth=1e10), gpu(1, GIB, bandwidth=1e10)], objective="throughput")
    assert sorted(count for _, count in where(placement)) == [4, 4]


@pytest.mark.slow
def test_no_layer_is_on_the_cpu_if_the_gpus_suffice() -> None:
    """Whether they do is found by trying every order and cut, with everything shrunk that may."""
    rng = random.Random(6)
    spilled, on_gpus, refused = 0, 0, 0
    for _ in range(2000):
        config = small_config(
            num_hidden_layers=rng.randint(1, 4),
            vocab_size=rng.choice((300, 3000)),
            tie_word_embeddings=rng.random() < 0.5,
        )
        devices = [
            gpu(index, rng.randint(200, 1500) * 1024, bandwidth=rng.choice((1e12, 2e12)))
            for index in range(rng.randint(1, 3))
        ]
        with_cpu = [*devices, cpu(rng.choice((MIB, 64 * MIB)))]
        asked = demand(
            max_seq_len=rng.choice((16, 64)),
            max_model_len=64,
            max_num_seqs=rng.choice((1, 4)),
            max_num_batched_tokens=rng.choice((16, 64)),
            fixed=frozenset(rng.sample(["max_seq_len", "max_num_seqs"], rng.randint(0, 2))),
        )
        least = smallest(asked)
        suffice = any(
            all(fits[index, bounds[i], bounds[i + 1]] for i, index in enumerate(order))
            for fits in (fitting_runs(layout_of(config, devices, head_first=each), least) for each in (False, True))
            for order, bounds in all_cuts(config.num_hidden_layers, len(devices))
        )
        objective: Objective = rng.choice(("latency", "throughput"))
        try:
            placement = place(config, with_cpu, asked, objective=objective)
        except PlanError:
            assert not suffice
            refused += 1
            continue
        assert_consistent(placement, config)
        uses_cpu = "cpu" in dict(where(placement))
        assert uses_cpu != suffice
        assert uses_cpu == any("on cpu, which is slower" in note for note in placement.notes)
        spilled += uses_cpu
        on_gpus += suffice
    assert min(spilled, on_gpus, refused) > 100


def best_of_all(layout: Layout, asked: Demand, objective: Objective) -> float:
    """The least seconds of any order and cut that fits."""
    fits, seconds, transfers = fitting_runs(layout, asked), layout.seconds(asked), layout.transfers(asked)
    best = np.inf
    for order, bounds in all_cuts(layout.model.num_layers, len(layout.places)):
        runs = list(zip(order, bounds, bounds[1:], strict=False))
        if all(fits[run] for run in runs):
            hops = [transfers[a, b] for a, b in pairwise(order)]
            values = [seconds[run] + hop for run, hop in zip(runs, [*hops, 0.0], strict=True)]
            total = sum(values) + layout.return_s(order, asked)
            best = min(best, total if objective == "latency" else max(values))
    return best


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_an_exact_placement_is_the_best_of_all_orders_and_cuts(objective: Objective) -> None:
    rng = random.Random(7)
    compared = 0
    for _ in range(200):
        config = small_config(num_hidden_layers=rng.randint(2, 5), vocab_size=rng.choice((300, 2000)))
        devices = [
            gpu(index, rng.randint(500, 2500) * 1024, bandwidth=rng.choice((1e9, 2e9, 5e10))) for index in range(3)
        ]
        asked = demand(**SMALL, fixed=frozenset(SMALL))
        best = min(best_of_all(layout_of(config, devices, head_first=each), asked, objective) for each in (False, True))
        try:
            placement = place(config, devices, asked, objective=objective)
        except PlanError:
            assert best == np.inf
            continue
        compared += 1
        found = placement.latency_s if objective == "latency" else placement.slowest_stage_s
        assert found == pytest.approx(best, rel=1e-9)
    assert compared > 80


def test_what_does_not_fit_the_gpus_is_on_the_cpu_and_a_note_says_what_they_lack() -> None:
    placement = place(LAYERS, [gpu(0, 50 * MIB), gpu(1, 50 * MIB), cpu(GIB)])
    counts = dict(where(placement))
    assert set(counts) == {"cuda:0", "cuda:1", "cpu"}
    assert [plan.device.name for plan in placement.devices][-1] == "cpu"
    (note,) = placement.notes
    assert note.startswith(f"{counts['cpu']} of 8 layers are on cpu, which is slower: on the GPUs alone cuda:")
    assert_consistent(placement, LAYERS)


def test_the_demand_shrinks_before_layers_go_to_the_cpu() -> None:
    devices = [gpu(0, 150 * MIB), cpu(8 * GIB)]
    asked = demand(max_model_len=65536, max_seq_len=65536, max_num_seqs=1, max_num_batched_tokens=16)
    placement = place(LAYERS, devices, asked)
    assert where(placement) == [("cuda:0", 8)]
    assert placement.demand.max_seq_len < 65536
    assert placement.notes[0].startswith("max_seq_len shrank from 65536 to ")
    (advice,) = placement.advice
    assert advice.startswith("setting --max-seq-len 65536 would keep it, with ")
    fixed = Demand(**{**vars(asked), "fixed": frozenset({"max_seq_len"})})
    assert "cpu" in dict(where(place(LAYERS, devices, fixed)))


def test_the_disk_is_used_last_and_only_if_allowed() -> None:
    devices = [gpu(0, 50 * MIB), cpu(50 * MIB), disk(GIB)]
    placement = place(LAYERS, devices, allow_disk=True)
    assert [name for name, _ in where(placement)][-1] == "disk"
    assert set(dict(where(placement))) == {"cuda:0", "cpu", "disk"}
    with pytest.raises(PlanError, match="does not fit"):
        place(LAYERS, devices)
    assert "disk" not in dict(where(place(LAYERS, [gpu(0, GIB), cpu(GIB), disk(GIB)], allow_disk=True)))


def test_caches_of_layers_on_the_disk_are_in_memory_beside_those_of_the_cpu() -> None:
    """By trying every cut of small models over a GPU, the CPU and the disk."""
    rng = random.Random(9)
    outcomes = []
    for _ in range(400):
        config = small_config(num_hidden_layers=rng.randint(2, 6))
        devices = [
            gpu(0, rng.randint(200, 900) * 1024),
            cpu(rng.randint(200, 3000) * 1024),
            disk(rng.choice((GIB, 500 * 1024))),
        ]
        asked = demand(**{**SMALL, "max_seq_len": rng.choice((16, 256))}, fixed=frozenset(SMALL))
        layout = layout_of(config, devices)
        problem = Problem(layout=layout, objective="latency", classes=(0, 1, 2), num_last=2)
        possible = []
        for order, bounds in all_cuts(config.num_hidden_layers, 3):
            if order == tuple(sorted(order)):
                counts = tuple(stop - start for start, stop in pairwise(bounds))
                possible.append(problem.settle(Found(order, counts, 0.0, 0.0), asked).shortfall_bytes == 0)
        fit = problem.fit(asked)
        assert problem.may_fit(asked) == any(possible) == (fit is not None)
        outcomes.append(tuple(need.device.kind for need in fit.needs) if fit else ())
    assert {(), ("disk",), ("cpu", "disk"), ("cuda", "cpu"), ("cuda", "cpu", "disk")} <= set(outcomes)


def test_a_cpu_alone_follows_the_rule_for_its_cache() -> None:
    placement = place(LAYERS, [cpu(GIB)], demand(**{**SMALL, "max_num_seqs": 10**6}))
    (plan,) = placement.devices
    available = plan.device.free_bytes - plan.weight_bytes - plan.overhead_bytes
    block_bytes = 16 * 2 * 4 * 64 * 4 * 8
    assert placement.extra["num_blocks"] == available // 4 // block_bytes


def test_a_cache_that_was_asked_for_is_that_of_all_devices_together() -> None:
    asked = demand(**{**SMALL, "max_num_seqs": 10**6}, kv_cache_memory_bytes=8 * MIB, fixed=frozenset({"max_num_seqs"}))
    placement = place(LAYERS, [gpu(0, 80 * MIB), gpu(1, 80 * MIB)], asked)
    block_bytes = 16 * 2 * 4 * 64 * 4
    assert placement.extra["num_blocks"] == 8 * MIB // (8 * block_bytes)
    assert sum(plan.kv_cache_bytes for plan in placement.devices) <= 8 * MIB
    with pytest.raises(PlanError, match="may take"):
        place(LAYERS, [gpu(0, GIB)], demand(**SMALL, kv_cache_memory_bytes=1000))


def test_a_refusal_has_the_shortfall_and_what_would_help() -> None:
    with pytest.raises(PlanError) as caught:
        place(LAYERS, [gpu(0, 50 * MIB), gpu(1, 40 * MIB)])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("the model does not fit: cuda:")
    assert "  - --dtype bfloat16 would fit" in lines
    assert "  - a CPU with 1GiB among the devices would take the layers that do not fit" in lines
    with pytest.raises(PlanError, match="there is no device"):
        place(LAYERS, [])


def test_a_refusal_lacks_what_the_closest_of_all_orders_and_cuts_lacks() -> None:
    """With the output beside the last layer or the first: so much more on every GPU, and the model fits."""
    rng, compared, first_is_closer = random.Random(10), 0, 0
    for _ in range(150):
        config = small_config(
            num_hidden_layers=rng.randint(1, 4),
            vocab_size=rng.choice((300, 3000)),
            tie_word_embeddings=rng.random() < 0.8,
        )
        sizes = [rng.randint(200, 1500) * 1024 for _ in range(rng.randint(1, 3))]
        asked = demand(**SMALL, fixed=frozenset(SMALL))
        try:
            place(config, [gpu(index, size) for index, size in enumerate(sizes)], asked)
            continue
        except PlanError as refused:
            line = str(refused).splitlines()[0]
        lacks = int(line.split("(")[1].split(" ")[0].replace(",", ""))
        place(config, [gpu(index, size + lacks) for index, size in enumerate(sizes)], asked)
        with pytest.raises(PlanError, match="does not fit"):
            place(config, [gpu(index, size + lacks - 1) for index, size in enumerate(sizes)], asked)
        devices = [gpu(index, size) for index, size in enumerate(sizes)]
        least = [
            Problem(
                layout=layout_of(config, devices, head_first=each),
                objective="latency",
                classes=tuple(range(len(sizes))),
            )
            .closest(asked)
            .shortfall_bytes
            for each in (False, True)
        ]
        assert lacks == min(least)
        compared += 1
        first_is_closer += least[1] < least[0]
    assert compared > 30
    assert first_is_closer > 5


@pytest.mark.parametrize("name", ["max_batch_size", "max_seq_len", "max_num_batched_tokens"])
@pytest.mark.parametrize("method", ["exact", "first-fit", "manual"])
def test_a_demand_beyond_all_machines_is_refused(method: str, name: str) -> None:
    devices = [gpu(0, GIB), cpu(GIB), disk(GIB)]
    for value in (10**14, 10**30):
        asked = demand(**{"max_model_len": 10**30, name: value}, fixed=frozenset({name}))
        for cache in (None, 10**40):
            changed = Demand(**{**vars(asked), "kv_cache_memory_bytes": cache})
            with pytest.raises(PlanError):
                place(LAYERS, devices, changed, method=method, allow_disk=True)


def test_too_many_different_gpus_keep_their_order_and_a_note_says_so() -> None:
    devices = [gpu(index, (40 + index) * MIB, bandwidth=1e12 + index) for index in range(12)]
    placement = place(LAYERS, devices)
    assert placement.notes[0] == "12 devices are too different to try all their orders: theirs was kept"
    names = [int(name.split(":")[1]) for name, _ in where(placement)]
    assert names == sorted(names)


def test_what_else_stays_on_the_first_device_is_there_alone() -> None:
    devices = [gpu(0, 100 * MIB), gpu(1, 100 * MIB)]
    extra = Extra(bytes=20 * MIB, activation_bytes=10 * MIB)
    plain, more = place(LAYERS, devices), place(LAYERS, devices, extra=extra)
    assert (
        sum(plan.weight_bytes for plan in more.devices) - sum(plan.weight_bytes for plan in plain.devices) == 20 * MIB
    )
    assert [plan.activation_bytes == 10 * MIB for plan in more.devices] == [True, False]


# -- first-fit and manual ---------------------------------------------------------------------------------------------


def test_first_fit_fills_the_gpus_in_turn_and_keeps_the_output_with_the_embedding() -> None:
    placement = place(LAYERS, [gpu(0, 60 * MIB), gpu(1, 60 * MIB), cpu(GIB)], method="first-fit")
    assert where(placement) == [("cuda:0", 3), ("cuda:1", 3), ("cpu", 2)]
    first = placement.devices[0]
    assert (first.holds_embedding, first.holds_head) == (True, True)
    assert not any(plan.holds_head for plan in placement.devices[1:])
    assert all(plan.used_bytes <= plan.usable_bytes for plan in placement.devices)


def test_first_fit_never_overflows_by_the_exact_count() -> None:
    rng = random.Random(8)
    for _ in range(200):
        config = small_config(num_hidden_layers=rng.randint(1, 6), vocab_size=rng.choice((300, 3000)))
        devices = [gpu(index, rng.randint(300, 3000) * 1024) for index in range(rng.randint(1, 3))]
        asked = demand(max_seq_len=rng.choice((16, 256)), max_num_batched_tokens=64, max_num_seqs=4)
        placement = place(config, [*devices, cpu(GIB)], asked, method="first-fit")
        assert placement.demand == asked
        assert all(plan.used_bytes <= plan.usable_bytes for plan in placement.devices)


def test_first_fit_without_a_cpu_is_refused_by_it() -> None:
    with pytest.raises(PlanError):
        place(LAYERS, [gpu(0, 60 * MIB)], method="first-fit")


def test_layers_that_are_left_for_a_cpu_that_is_not_there_say_how_to_name_it() -> None:
    with pytest.raises(PlanError, match="5 of 8 layers are to be on cpu, but the devices are cuda:0: name its memory"):
        place(LAYERS, [gpu(0, GIB)], method="manual", device_layers=(("cuda:0", 3), ("cpu", 5)))


def test_first_fit_sets_the_cpu_no_limit_and_says_what_will_be_swapped() -> None:
    small = place(LAYERS, [gpu(0, 60 * MIB), cpu(4 * MIB)], method="first-fit")
    large = place(LAYERS, [gpu(0, 60 * MIB), cpu(GIB)], method="first-fit")
    assert where(small) == where(large) == [("cuda:0", 3), ("cpu", 5)]
    (_, on_cpu) = small.devices
    assert (on_cpu.device, on_cpu.usable_bytes) == (cpu(4 * MIB), cpu(4 * MIB).free_bytes)
    assert on_cpu.used_bytes > on_cpu.usable_bytes
    (note,) = small.notes
    assert note.startswith("cpu is to hold ")
    assert "are free: first-fit sets it no limit" in note
    assert large.notes == ()
    limited = replace(cpu(4 * MIB), limit_bytes=cpu(4 * MIB).free_bytes)
    with pytest.raises(PlanError, match="cpu on a lacks"):
        place(LAYERS, [gpu(0, 60 * MIB), limited], method="first-fit")


def test_first_fit_fills_nine_tenths_of_what_is_free_however_large_the_gpu_is() -> None:
    asked = demand(**SMALL, gpu_memory_utilization=0.9)
    idle = replace(gpu(0, 0), total_bytes=850 * MIB, free_bytes=850 * MIB)
    busy = replace(idle, total_bytes=GIB)
    placement = place(LAYERS, [busy, cpu(GIB)], asked, method="first-fit")
    assert where(placement) == where(place(LAYERS, [idle, cpu(GIB)], asked, method="first-fit"))
    assert where(placement)[0][0] == "cuda:0"
    assert placement.devices[0].device == busy
    assert placement.devices[0].usable_bytes == 765 * MIB


def test_a_limit_of_the_user_is_what_may_be_used_of_a_gpu() -> None:
    asked = demand(**SMALL, gpu_memory_utilization=0.9)
    limited = replace(gpu(0, GIB), limit_bytes=800 * MIB)
    for method in ("exact", "first-fit"):
        placement = place(LAYERS, [limited, cpu(GIB)], asked, method=method)
        assert next(plan for plan in placement.devices if plan.device == limited).usable_bytes == 800 * MIB


def test_layers_placed_by_hand_stay_where_they_are_put_and_the_rest_is_on_the_cpu() -> None:
    devices = [gpu(0, GIB), gpu(1, GIB), cpu(GIB)]
    placement = place(LAYERS, devices, method="manual", device_layers=(("cuda:1", 3), ("cuda:0", 2)))
    assert where(placement) == [("cuda:1", 3), ("cuda:0", 2), ("cpu", 3)]
    assert (placement.devices[0].holds_embedding, placement.devices[0].holds_head) == (True, True)
    (advice,) = placement.advice
    assert advice.startswith("the exact placement would be ")
    assert advice.endswith("8 layers on cuda:0")
    assert where(place(LAYERS, devices, method="manual")) == [("cpu", 8)]
    options = {"method": "manual", "device_layers": (("cpu", 2), ("cuda:1", 6)), "head_first": False}
    placement = place(LAYERS, devices, **options)
    assert where(placement) == [("cpu", 2), ("cuda:1", 6)]
    assert [plan.holds_head for plan in placement.devices] == [False, True, False]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((("cuda:7", 3),), "3 of 8 layers are to be on cuda:7, but the devices are cuda:0, cpu: name one of them"),
        ((("disk", 3),), "3 of 8 layers are to be on disk, but .*: --offload-folder FOLDER allows it"),
        ((("cuda:0", 9),), "cannot be placed as cuda:0: 9: the model has 8 layers"),
        ((("cuda:0", 3), ("cuda:0", 5)), "a device stands in it twice"),
        ((("cpu", 3),), "5 of 8 layers have no device"),
    ],
)
def test_layers_that_cannot_be_placed_by_hand_are_refused(layers: tuple[tuple[str, int], ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        place(LAYERS, [gpu(0, GIB), cpu(GIB)], method="manual", device_layers=layers)


def test_layers_placed_by_hand_that_do_not_fit_are_refused_with_a_placement_that_does() -> None:
    with pytest.raises(PlanError) as caught:
        place(LAYERS, [gpu(0, 60 * MIB), cpu(GIB)], method="manual", device_layers=(("cuda:0", 8),))
    lines = str(caught.value).splitlines()
    assert "cuda:0 on a lacks" in lines[0]
    assert lines[-1] == (
        "  - without --device-layers (-n), --device-map or --placement first-fit it would fit: 3 layers on cuda:0, "
        "5 layers on cpu"
    )


# -- large models ------------------------------------------------------------------------------------------------------


def test_a_large_model_over_eight_different_gpus_is_placed() -> None:
    config = small_config(num_hidden_layers=126, hidden_size=1024, intermediate_size=4096, head_dim=128)
    devices = [gpu(index, (700 + 10 * index) * MIB, bandwidth=1e12 + 1e11 * index) for index in range(8)]
    placement = place(config, [*devices, cpu(64 * GIB)], demand(max_model_len=4096))
    assert not any("too different" in note for note in placement.notes)
    assert_consistent(placement, config)
