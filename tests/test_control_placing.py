"""From nodes and settings to the planner and back: what is asked, which devices there are, which part lies where."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from clusters import SETTINGS, fingerprint_of, gpus, register_of
from inventories import cpu, disk, gpu, inventory
from plans import small_config

from tpdist.control.placing import (
    OneProcess,
    demand_of,
    item_devices,
    place_layers,
    place_ranks,
    process_inventory,
    ranks_inventory,
)
from tpdist.control.state import Key, NodeFacts, name_of, node_id
from tpdist.errors import JoinError, PlanError, SettingsError
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.placement import Demand, Device, Placement
from tpdist.plan.places import usable_bytes
from tpdist.plan.shards import Interval

CONFIG = small_config(num_hidden_layers=5)
WEIGHTS = decoder_weights(CONFIG)
GIB = 1 << 30
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128}


def node(key: Key = None, **probe: Any) -> NodeFacts:
    machine = {"host_id": f"machine of {name_of(key)}", **probe}
    return NodeFacts(register_of(key), fingerprint_of(name_of(key), **machine))


def over_the_wire(settings: dict[str, Any]) -> dict[str, Any]:
    """As a worker gets them: without tuples."""
    received: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(settings))
    return received


def ranks(count: int, **changes: Any) -> Placement:
    settings = over_the_wire({**SETTINGS, **SMALL, **changes})
    demand = demand_of(CONFIG, settings, dtype="float32", explicit=SMALL)
    made = ranks_inventory([node()], [count], device="cpu")
    return place_ranks(CONFIG, WEIGHTS, made, demand, settings)


def one_process(**changes: Any) -> OneProcess:
    fields: dict[str, Any] = {
        "placement": "exact",
        "device_layers": None,
        "device_map": None,
        "max_memory": None,
        "disk": False,
    }
    return OneProcess(**{**fields, **changes})


def layers(devices: Sequence[Device], **changes: Any) -> tuple[str, ...]:
    """Where the embedding, each of the five layers and the output lie."""
    demand = demand_of(CONFIG, {**SETTINGS, **SMALL}, dtype="float32", explicit=SMALL)
    return item_devices(place_layers(CONFIG, WEIGHTS, inventory(devices), demand, one_process(**changes)))


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_a_demand_is_what_the_settings_say_and_only_what_was_set_is_fixed() -> None:
    settings = {**SETTINGS, "max_num_seqs": 7, "max_seq_len": 99}
    demand = demand_of(CONFIG, settings, dtype="bfloat16", explicit={"max_num_seqs", "seed", "dtype"})
    assert (demand.max_num_seqs, demand.max_seq_len, demand.max_model_len) == (7, 99, 512)
    assert demand.dtype == "bfloat16"
    assert "max_num_seqs" in demand.fixed
    assert not {"seed", "max_seq_len", "max_model_len", "fixed"} & demand.fixed


@pytest.mark.parametrize(("shares", "expected"), [([1, 2], ((1, 2), (1, 2))), ([3, 1, 1, 2], ((3, 1), (1, 2)))])
def test_shares_and_layers_are_taken_as_lists(shares: list[int], expected: tuple[tuple[int, ...], ...]) -> None:
    placed = ranks(4, pipeline_layers=[1, 4], tensor_shares=shares)
    assert placed.shares == expected
    assert placed.stage_layers == (Interval(0, 1), Interval(1, 5))
    assert (placed.tp_size, placed.pp_size) == (2, 2)


def test_auto_is_the_same_for_ranks_with_the_same_memory() -> None:
    assert ranks(4, pipeline_parallel_size=2, tensor_shares="auto").shares == ((1, 1), (1, 1))


def test_auto_shares_follow_what_the_machines_have() -> None:
    nodes = [node(available_bytes=3 * GIB), node(0, available_bytes=9 * GIB)]
    settings = over_the_wire({**SETTINGS, **SMALL, "tensor_shares": "auto"})
    demand = demand_of(CONFIG, settings, dtype="float32", explicit=SMALL)
    placed = place_ranks(CONFIG, WEIGHTS, ranks_inventory(nodes, [1, 1], device="cpu"), demand, settings)
    ((small, large),) = placed.shares
    assert 2.5 < large / small < 3.5


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"pipeline_layers": [2, 2]}, PlanError, ["2, 2", "5 layers"]),
        ({"pipeline_layers": [2, 3], "tensor_shares": [1, 2, 1]}, PlanError, ["1, 2, 1", "2", "4"]),
        ({"pipeline_layers": [2, 2, 1]}, JoinError, ["3 stages", "4"]),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 1}, JoinError, ["2 ranks", "4"]),
    ],
)
def test_what_does_not_add_up_is_refused_with_the_numbers(
    settings: dict[str, Any], error: type[Exception], named: list[str]
) -> None:
    with pytest.raises(error) as refused:
        ranks(4, **settings)
    assert not [text for text in named if text not in str(refused.value)], refused.value


def test_more_stages_than_ranks_are_refused_with_the_ranks_that_they_need() -> None:
    with pytest.raises(JoinError, match="2 pipeline stages need at least as many ranks, but the nodes have 1"):
        ranks(1, pipeline_parallel_size=2)


def test_five_ranks_of_a_model_with_four_heads_are_five_stages_and_the_note_says_why() -> None:
    config = small_config(num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2)
    demand = demand_of(config, {**SETTINGS, **SMALL}, dtype="float32", explicit=SMALL)
    made = ranks_inventory([node()], [5], device="cpu")
    placed = place_ranks(config, decoder_weights(config), made, demand, SETTINGS)
    assert (placed.tp_size, placed.pp_size) == (1, 5)
    assert any("5 ranks" in note and "4 query heads" in note for note in placed.notes)


# -- devices ----------------------------------------------------------------------------------------------------------


def test_nodes_are_called_as_in_the_cluster_state() -> None:
    assert [node_id(key) for key in (None, 0, 12)] == ["head", "worker-0", "worker-12"]


def test_ranks_are_in_the_order_of_nodes() -> None:
    made = ranks_inventory([node(), node(0), node(1)], [2, 1, 3], device="cpu")
    assert [device.node for device in made.devices] == ["head"] * 2 + ["worker-0"] + ["worker-1"] * 3
    assert [device.name for device in made.devices] == ["cpu:0", "cpu:1", "cpu:0", "cpu:0", "cpu:1", "cpu:2"]


def test_nodes_on_one_machine_share_its_memory() -> None:
    apart = ranks_inventory([node(), node(0)], [1, 1], device="cpu")
    together = ranks_inventory([node(host_id="one"), node(0, host_id="one")], [1, 1], device="cpu")
    for alone, shared in zip(apart.devices, together.devices, strict=True):
        assert (alone.free_bytes, alone.bandwidth) == (2 * shared.free_bytes, 2 * shared.bandwidth)


def test_ranks_on_gpus_do_not_count_the_memory_of_the_machine() -> None:
    made = ranks_inventory([node(devices=gpus(2))], [2], device="cuda")
    assert [device.name for device in made.devices] == ["cuda:0", "cuda:1"]
    shared = ranks_inventory([node(devices=gpus(1))], [2], device="cuda")
    assert [device.name for device in shared.devices] == ["cuda:0.0", "cuda:0.1"]


def test_a_process_has_all_devices_of_its_node() -> None:
    facts = node(devices=gpus(2))
    names = [device.name for device in process_inventory(facts, device="cuda", asked=one_process()).devices]
    assert names == ["cuda:0", "cuda:1", "cpu"]
    with_disk = process_inventory(facts, device="cuda", asked=one_process(disk=True))
    assert [device.name for device in with_disk.devices] == ["cuda:0", "cuda:1", "cpu", "disk"]
    on_cpu = process_inventory(facts, device="cpu", asked=one_process(disk=True))
    assert [device.name for device in on_cpu.devices] == ["cpu", "disk"]


def test_max_memory_limits_what_it_names_and_leaves_out_the_rest() -> None:
    asked = one_process(max_memory={"1": GIB, "cpu": 1 << 60})
    made = process_inventory(node(devices=gpus(2)), device="cuda", asked=asked)
    usable = [usable_bytes(device, Demand(dtype="float32", max_model_len=1)) for device in made.devices]
    assert [device.name for device in made.devices] == ["cuda:1", "cpu"]
    assert usable == pytest.approx([GIB, 1 << 37], rel=1e-6)


def test_max_memory_may_name_a_device_and_leave_it_what_is_free() -> None:
    asked = one_process(max_memory={"0": None, "1": GIB})
    free = process_inventory(node(devices=gpus(2)), device="cuda", asked=one_process()).devices
    limited = process_inventory(node(devices=gpus(2)), device="cuda", asked=asked).devices
    assert [device.name for device in limited] == ["cuda:0", "cuda:1"]
    assert limited[0] == free[0]
    assert limited[1].limit_bytes == GIB
    asked = one_process(max_memory={"0": None, "cuda:0": GIB})
    with pytest.raises(PlanError, match="--max-memory has a device twice, by its number and by its name: 0, cuda:0"):
        process_inventory(node(devices=gpus(2)), device="cuda", asked=asked)


def test_max_memory_does_not_take_the_disk_away_that_an_offload_folder_allows() -> None:
    facts = node(devices=gpus(1))
    for limits, expected in (({"cpu": GIB}, ["cpu", "disk"]), ({"0": GIB, "disk": 7}, ["cuda:0", "disk"])):
        made = process_inventory(facts, device="cuda", asked=one_process(max_memory=limits, disk=True))
        assert [device.name for device in made.devices] == expected
        assert made.devices[-1].free_bytes == limits.get("disk", made.devices[-1].total_bytes)


@pytest.mark.parametrize(("name", "device"), [("2", "cuda"), ("cuda:7", "cuda"), ("disk", "cuda"), ("0", "cpu")])
def test_max_memory_of_a_device_that_is_not_there_is_refused(name: str, device: str) -> None:
    with pytest.raises(PlanError, match="max-memory names"):
        process_inventory(node(devices=gpus(2)), device=device, asked=one_process(max_memory={name: GIB}))


# -- one process ------------------------------------------------------------------------------------------------------

ROOM = [gpu(0, GIB), gpu(1, GIB), cpu(GIB), disk(GIB)]


def test_what_fits_one_gpu_is_on_it() -> None:
    assert set(layers(ROOM)) == {"cuda:0"}
    assert set(layers(ROOM, placement="first-fit")) == {"cuda:0"}


def test_device_layers_put_the_output_with_the_first_layers() -> None:
    assert layers(ROOM, device_layers="1:2;0:1") == ("cuda:1", "cuda:1", "cuda:1", "cuda:0", "cpu", "cpu", "cuda:1")


def test_a_map_puts_every_part_where_it_says() -> None:
    names = {"": "cpu", "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0}
    assert layers(ROOM, device_map=names) == ("cuda:0", "cuda:0", "cuda:0", "cpu", "cpu", "cpu", "cpu")


def test_a_map_may_put_layers_in_the_middle_on_the_disk() -> None:
    names = {
        "": "cpu",
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    }
    expected = ("cuda:0", "cuda:0", "disk", "disk", "cpu", "cpu", "cpu")
    assert layers(ROOM, device_map=names, disk=True) == expected


def test_layers_on_the_disk_have_to_be_allowed() -> None:
    with pytest.raises(PlanError, match="disk"):
        layers(ROOM, device_map={"": "disk"})


def test_all_may_lie_on_the_disk() -> None:
    assert layers(ROOM, device_map={"": "disk"}, disk=True) == ("disk",) * 7


@pytest.mark.parametrize("name", ["balanced", "balanced_low_0", "auto", "sequential"])
def test_without_a_gpu_the_named_maps_use_the_cpu(name: str) -> None:
    assert layers(ROOM[2:], device_map=name, disk=True) == ("cpu",) * 7


def test_balanced_maps_use_the_gpus() -> None:
    assert layers(ROOM, device_map="balanced") == ("cuda:0",) * 4 + ("cuda:1",) * 3
    assert layers(ROOM, device_map="balanced_low_0") == ("cuda:1",) * 7


@pytest.mark.parametrize(
    ("asked", "error", "named"),
    [
        ({"device_layers": "0:6"}, PlanError, "6 layers"),
        ({"device_layers": "2:1"}, PlanError, "GPU 2"),
        ({"device_layers": "0:x"}, SettingsError, "0:x"),
        ({"device_map": {"": 2}}, PlanError, "cuda:1"),
        ({"device_map": "evenly"}, PlanError, "evenly"),
    ],
)
def test_a_placement_by_hand_that_cannot_be_is_refused(
    asked: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        layers(ROOM, **asked)


def test_the_objective_of_one_process_is_latency_unless_it_was_asked_for() -> None:
    inventory_of_one = process_inventory(node(devices=gpus(2)), device="cuda", asked=one_process())
    demand = demand_of(CONFIG, {**SETTINGS, **SMALL}, dtype="float32", explicit=SMALL)
    for optimize, expected in ((None, "latency"), ("throughput", "throughput")):
        asked = one_process(optimize=optimize)
        assert place_layers(CONFIG, WEIGHTS, inventory_of_one, demand, asked).objective == expected


def test_layers_by_hand_are_deprecated_and_the_plan_says_so() -> None:
    inventory_of_one = process_inventory(node(devices=gpus(2)), device="cuda", asked=one_process())
    demand = demand_of(CONFIG, {**SETTINGS, **SMALL}, dtype="float32", explicit=SMALL)
    by_hand = place_layers(CONFIG, WEIGHTS, inventory_of_one, demand, one_process(device_layers="0:1;1:1"))
    assert "deprecated" in by_hand.notes[0]
    assert not any(
        "deprecated" in note for note in place_layers(CONFIG, WEIGHTS, inventory_of_one, demand, one_process()).notes
    )
