"""From nodes to assignments: ranks, devices, threads, and by which addresses everybody meets."""

import socket
from dataclasses import replace
from typing import Any

import psutil
import pytest
from clusters import SETTINGS, fingerprint_of, gpus, register_of
from plans import small_config

from tpdist.control.layout import make_layout, node_sizes
from tpdist.control.messages import DeviceInfo, StageAssign
from tpdist.control.placing import OneProcess, max_model_len
from tpdist.control.route import addresses_towards, interface_of, is_link_local, is_loopback, without_zone
from tpdist.control.state import Layout, NodeFacts, name_of
from tpdist.errors import JoinError, PlanError
from tpdist.plan.decoder_weights import decoder_weights

CONFIG = small_config()
HEAD_INTERFACES = {"127.0.0.1": "lo", "::1": "lo", "10.0.0.1": "eth0", "10.1.0.1": "eth1", "fd00::1": "eth0"}


def node(key: int | None = None, *, probe: dict[str, Any] | None = None, **register: Any) -> NodeFacts:
    """A node on a machine of its own, unless `probe` names another; workers come in by 10.0.0.1."""
    machine = {"host_id": f"machine of {name_of(key)}", **(probe or {})}
    if key is not None:
        register = {
            "head_address": "10.0.0.1",
            "address": f"10.0.0.{key + 2}",
            "interface": f"nic{key}",
            **register,
        }
    return NodeFacts(register_of(key, **register), fingerprint_of(name_of(key), **machine))


def layout(
    *nodes: NodeFacts, world_size: int | None = None, one_process: OneProcess | None = None, **settings: Any
) -> Layout:
    return make_layout(
        nodes,
        config=CONFIG,
        weights=decoder_weights(CONFIG),
        settings={**SETTINGS, **settings},
        explicit=set(settings),
        one_process=one_process,
        checkpoint_dtype="float32",
        global_world_size=world_size,
        store_port=7,
        load_timeout_s=8,
        collective_timeout_s=9,
        local_interface=HEAD_INTERFACES.get,
    )


def test_ranks_are_node_major_and_everybody_gets_the_same_plan() -> None:
    assigns = layout(node(), node(0, local_world_size=2), node(1), world_size=4).assigns
    assert [(assign.node_index, assign.first_rank, assign.local_world_size) for assign in assigns] == [
        (0, 0, 1),
        (1, 1, 2),
        (2, 3, 1),
    ]
    own = dict.fromkeys(("node_index", "first_rank", "local_world_size", "interface", "head_host", "threads"), 0)
    common = {name: {str(getattr(assign, name)) for assign in assigns} for name in assigns[0].__struct_fields__}
    assert all(len(values) == 1 for name, values in common.items() if name not in own)
    first = assigns[0]
    assert (first.world_size, first.tp_size) == (4, 4)
    assert first.stages == (StageAssign(start=0, stop=3, shares=(1, 1, 1, 1)),)
    assert (first.store_port, first.load_timeout_s, first.collective_timeout_s, first.max_model_len) == (7, 8, 9, 512)


def test_nothing_is_left_auto() -> None:
    (assign,) = layout(node(), device="auto", dtype="auto").assigns
    assert (assign.settings["device"], assign.settings["dtype"]) == ("cpu", "float32")
    (assign,) = layout(node(probe={"devices": gpus(1)}), device="auto", dtype="bfloat16").assigns
    assert (assign.settings["device"], assign.settings["dtype"]) == ("cuda", "bfloat16")


def test_the_summary_shows_each_ranks_part() -> None:
    plan = layout(node(), node(0), world_size=2).plan
    assert (plan["world_size"], plan["tensor_parallel_size"], plan["dtype"]) == (2, 2, "float32")
    assert [rank["node"] for rank in plan["ranks"]] == [0, 1]
    assert [rank["key_value_heads"] for rank in plan["ranks"]] == [[0, 2], [2, 4]]
    assert [rank["attention_heads"] for rank in plan["ranks"]] == [[0, 4], [4, 8]]


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "device", "world_size", "expected"),
    [
        ([node()], "cpu", None, (1,)),
        ([node(local_world_size=3)], "cpu", None, (3,)),
        ([node(probe={"devices": gpus(4)})], "cuda", None, (4,)),
        ([node(probe={"devices": gpus(4)})], "cpu", None, (1,)),
        ([node(probe={"devices": gpus(4)}, local_world_size=2)], "cuda", None, (2,)),
        ([node(), node(0), node(1)], "cpu", 8, (3, 3, 2)),
        ([node(local_world_size=1), node(0), node(1)], "cpu", 6, (1, 3, 2)),
        ([node(probe={"devices": gpus(2)}), node(0, probe={"devices": gpus(1)})], "cuda", 3, (2, 1)),
    ],
)
def test_a_node_has_the_ranks_that_its_user_set_or_its_devices_or_its_share(
    nodes: list[NodeFacts], device: str, world_size: int | None, expected: tuple[int, ...]
) -> None:
    assert node_sizes(nodes, device=device, global_world_size=world_size) == expected


def test_sizes_that_do_not_add_up_name_every_node() -> None:
    with pytest.raises(JoinError, match=r"GLOBAL_WORLD_SIZE is 5.*head 2, worker 0 2"):
        layout(node(local_world_size=2), node(0, local_world_size=2), world_size=5)


def test_too_few_ranks_for_the_tensor_parallel_size_are_refused_with_the_numbers() -> None:
    with pytest.raises(JoinError, match=r"tensor_parallel_size=3 times 1 stages needs 3 ranks, but the nodes have 2"):
        layout(node(local_world_size=2), tensor_parallel_size=3)


def test_stages_get_their_layers_and_shares() -> None:
    two = layout(node(local_world_size=2), pipeline_parallel_size=2).assigns[0]
    assert [(stage.start, stage.stop, stage.shares) for stage in two.stages] == [(0, 1, (1,)), (1, 3, (1,))]
    given = layout(node(local_world_size=4), pipeline_layers=[1, 2], tensor_shares=[3, 1]).assigns[0]
    assert [(stage.start, stage.stop, stage.shares) for stage in given.stages] == [(0, 1, (3, 1)), (1, 3, (3, 1))]


def test_stages_alone_make_as_many_ranks_on_a_node_without_a_gpu() -> None:
    assert layout(node(), pipeline_parallel_size=3).assigns[0].world_size == 3
    assert layout(node(), pipeline_parallel_size=2, pipeline_layers=[2, 1]).assigns[0].world_size == 2
    assert layout(node(probe={"devices": gpus(4)}), device="cuda", pipeline_parallel_size=2).assigns[0].tp_size == 2


def test_more_ranks_than_heads_become_the_fewest_stages_that_work_and_the_plan_says_so() -> None:
    made = layout(node(local_world_size=9))
    assert (made.assigns[0].tp_size, len(made.assigns[0].stages)) == (3, 3)
    assert any("9" in note and "8" in note for note in made.plan["notes"])


def test_a_model_that_cannot_be_shared_so_is_refused() -> None:
    with pytest.raises(PlanError, match=r"\b11\b.*\b8\b|\b8\b.*\b11\b"):
        layout(node(local_world_size=11))


def test_what_is_not_explicit_shrinks_and_the_ranks_hear_of_it() -> None:
    tight = node(probe={"available_bytes": 276_000_000})
    made = layout(tight)
    assert made.plan["notes"]
    shrunk = made.assigns[0].settings
    assert shrunk["max_num_batched_tokens"] < SETTINGS["max_num_batched_tokens"]
    with pytest.raises(PlanError, match="lacks"):
        layout(tight, max_num_batched_tokens=2048, max_num_seqs=256, max_seq_len=4096, max_model_len=512)


def test_a_single_rank_whose_gpu_is_too_small_has_layers_on_the_cpu_too() -> None:
    small = DeviceInfo(kind="cuda", index=0, name="H", total_bytes=739_000_000, free_bytes=739_000_000)
    asked = {"max_model_len": 64, "max_num_seqs": 1, "max_num_batched_tokens": 16, "gpu_memory_utilization": 1.0}
    made = layout(node(probe={"devices": (small,)}), device="auto", **asked)
    assert made.plan["method"] == "exact"
    (assign,) = made.assigns
    assert (assign.world_size, assign.stages) == (1, (StageAssign(start=0, stop=3, shares=(1,)),))
    assert len(assign.item_devices) == 5
    assert "cpu" in assign.item_devices
    assert any("on cpu, which is slower" in note for note in made.plan["notes"])
    assert layout(node(probe={"devices": (small,)}), optimize="throughput", **asked).plan["objective"] == "throughput"
    for mistake in ({"pipeline_layers": [4]}, {"tensor_shares": [1, 2, 3]}):
        with pytest.raises(PlanError, match=r"layers|shares"):
            layout(node(probe={"devices": (small,)}), **asked, **mistake)
    with pytest.raises(PlanError, match="does not fit: cuda:"):
        layout(node(probe={"devices": (small, small)}), device="auto", **{**asked, "kv_cache_memory_bytes": 1 << 40})


def test_no_longer_sequence_is_taken_than_the_plan_of_a_gpu_has_room_for() -> None:
    small = DeviceInfo(kind="cuda", index=0, name="H", total_bytes=740_350_000, free_bytes=740_350_000)
    asked = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_seq_len": 16, "gpu_memory_utilization": 1.0}
    made = layout(node(probe={"devices": (small,)}), device="cuda", **asked)
    assert made.placement is not None
    (assign,) = made.assigns
    assert assign.max_model_len == made.placement.longest_context < min(512, 16 * assign.most_blocks)
    assert layout(node(), **asked).assigns[0].max_model_len == 512


def test_the_batch_that_there_must_be_room_for_does_not_limit_one_sequence() -> None:
    gpu = DeviceInfo(kind="cuda", index=0, name="H", total_bytes=740_900_000, free_bytes=740_900_000)
    asked = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_seq_len": 16, "gpu_memory_utilization": 1.0}
    made = layout(node(probe={"devices": (gpu,)}), device="cuda", max_batch_size=4, **asked)
    assert made.placement is not None
    assert made.placement.longest_context < made.assigns[0].max_model_len == 512


def test_the_cache_of_first_fit_is_what_its_own_reserves_leave() -> None:
    one = OneProcess(placement="first-fit", device_layers=None, device_map=None, max_memory=None, disk=False)
    for one_process, own in ((one, True), (replace(one, placement="exact"), False)):
        (assign,) = layout(node(), one_process=one_process).assigns
        assert assign.own_reserves is own


def test_a_longer_sequence_than_the_model_supports_is_refused_with_both_numbers() -> None:
    assert max_model_len(CONFIG, None) == 512
    assert max_model_len(CONFIG, 100) == 100
    with pytest.raises(PlanError, match=r"--max-model-len 513 is more than the 512 tokens"):
        layout(node(), max_model_len=513)


# -- devices, backend, threads ----------------------------------------------------------------------------------------


def test_cuda_on_a_node_without_it_is_refused_with_what_the_nodes_have() -> None:
    with pytest.raises(PlanError, match="the nodes have cpu, cuda"):
        layout(node(probe={"devices": gpus(1)}), node(0), world_size=2, device="cuda")


SAME = {"host_id": "one machine"}


@pytest.mark.parametrize(
    ("nodes", "device", "backend"),
    [
        ([node()], "auto", "gloo"),
        ([node(probe={"devices": gpus(2)})], "auto", "nccl"),
        ([node(probe={"devices": gpus(2)})], "cpu", "gloo"),
        ([node(probe={"devices": gpus(2)}, local_world_size=3)], "cuda", "gloo"),
        ([node(probe={"devices": gpus(1)}), node(0, probe={"devices": gpus(1)})], "cuda", "nccl"),
        ([node(probe={"devices": gpus(1), **SAME}), node(0, probe={"devices": gpus(1), **SAME})], "cuda", "gloo"),
    ],
)
def test_nccl_is_used_where_each_rank_has_a_gpu_to_itself(nodes: list[NodeFacts], device: str, backend: str) -> None:
    assert {assign.backend for assign in layout(*nodes, device=device).assigns} == {backend}


def test_nodes_on_one_machine_share_its_cpus() -> None:
    nodes = [
        node(local_world_size=1, probe=SAME),
        node(0, local_world_size=2, probe=SAME),
        node(1, local_world_size=1, probe={"num_cpus": 6}),
    ]
    assert [assign.threads for assign in layout(*nodes, world_size=4).assigns] == [2, 2, 6]


def test_a_rank_has_at_least_one_thread() -> None:
    (assign,) = layout(node(local_world_size=4, probe={"num_cpus": 2})).assigns
    assert assign.threads == 1


# -- addresses --------------------------------------------------------------------------------------------------------


def addresses(*workers: NodeFacts) -> tuple[str, list[tuple[str, str | None]]]:
    """Where rank 0 listens, and for each node how it reaches it and by which interface."""
    assigns = layout(node(), *workers, world_size=1 + len(workers)).assigns
    return assigns[0].bind_host, [(assign.head_host, assign.interface) for assign in assigns]


def test_one_node_meets_on_loopback() -> None:
    assert addresses() == ("127.0.0.1", [("127.0.0.1", "lo")])


def test_workers_on_this_machine_meet_on_loopback() -> None:
    workers = [node(key, head_address="127.0.0.1", interface="lo") for key in (0, 1)]
    assert addresses(*workers) == ("127.0.0.1", [("127.0.0.1", "lo")] * 3)


@pytest.mark.parametrize(("first", "second"), [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
def test_workers_that_use_different_loopback_addresses_meet_on_one(first: str, second: str) -> None:
    workers = [node(key, head_address=address) for key, address in enumerate((first, second))]
    assert addresses(*workers) == (first, [(first, "lo")] * 3)


def test_remote_workers_meet_on_the_address_that_they_reach_the_head_by() -> None:
    expected = [("10.0.0.1", "eth0"), ("10.0.0.1", "nic0"), ("10.0.0.1", "nic1")]
    assert addresses(node(0), node(1)) == ("10.0.0.1", expected)


def test_a_worker_on_the_heads_machine_uses_the_heads_way_to_the_others() -> None:
    local = node(1, head_address="127.0.0.1", address="127.0.0.1", interface="lo")
    assert addresses(node(0), local) == ("10.0.0.1", [("10.0.0.1", "eth0"), ("10.0.0.1", "nic0"), ("10.0.0.1", "eth0")])


def test_with_several_head_addresses_rank_0_listens_on_all_and_no_rank_advertises_loopback() -> None:
    local = node(2, head_address="127.0.0.1", interface="lo")
    assert addresses(node(0), node(1, head_address="10.1.0.1"), local) == (
        "0.0.0.0",
        [("127.0.0.1", "eth0"), ("10.0.0.1", "nic0"), ("10.1.0.1", "nic1"), ("127.0.0.1", "eth0")],
    )


def test_with_head_addresses_of_both_families_rank_0_listens_on_both() -> None:
    bind_host, reached = addresses(node(0), node(1, head_address="fd00::1"))
    assert bind_host == "::"
    assert reached == [("127.0.0.1", "eth0"), ("10.0.0.1", "nic0"), ("fd00::1", "nic1")]


def test_an_address_that_the_head_does_not_have_is_listened_for_on_all() -> None:
    assert addresses(node(0, head_address="203.0.113.9")) == (
        "0.0.0.0",
        [("127.0.0.1", None), ("203.0.113.9", "nic0")],
    )


def test_a_link_local_address_keeps_its_zone_on_the_node_that_it_means_something_to() -> None:
    assert addresses(node(0, head_address="fe80::1%nic0"))[0] == "::"
    assert addresses(node(0, head_address="fe80::1%nic0"))[1][1] == ("fe80::1%nic0", "nic0")


# -- route ------------------------------------------------------------------------------------------------------------


def test_the_route_to_this_machine_is_loopback() -> None:
    assert addresses_towards("127.0.0.1", 9) == ("127.0.0.1", "127.0.0.1")
    assert addresses_towards("localhost", 9)[1] == "127.0.0.1"


def test_a_name_without_an_address_is_no_route() -> None:
    with pytest.raises(JoinError, match=r"no route to the head no-such-host\.invalid:9"):
        addresses_towards("no-such-host.invalid", 9)


def test_of_several_addresses_the_ipv4_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::1", 9, 0, 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 9)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    assert addresses_towards("both", 9) == ("127.0.0.1", "127.0.0.1")


def test_the_interface_of_an_address_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = psutil.net_if_addrs()["lo"][0]
    listed = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1", "fe80::1%eth0"]}
    entries = {name: [entry._replace(address=each) for each in every] for name, every in listed.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: entries)
    asked = ("127.0.0.1", "127.0.1.1", "::1", "10.0.0.1", "fe80::1", "fe80::1%eth9", "10.0.0.2")
    assert [interface_of(address) for address in asked] == ["lo", "lo", "lo", "eth0", "eth0", "eth0", None]


def test_addresses_are_told_apart() -> None:
    assert [is_loopback(address) for address in ("127.9.9.9", "::1", "10.0.0.1", "fe80::1%lo")] == [
        True,
        True,
        False,
        False,
    ]
    assert is_link_local("fe80::1%eth0")
    assert without_zone("fe80::1%eth0") == "fe80::1"


def test_facts_are_not_changed() -> None:
    facts = node()
    layout(facts)
    assert facts == replace(facts)
