"""Which devices `tpdist plan` plans for, and which of them become ranks."""

from pathlib import Path
from typing import Any

import pytest

from tpdist.cli import plan_devices
from tpdist.cli.plan_devices import Found, find_devices
from tpdist.control.messages import DeviceInfo, ProbeReport
from tpdist.errors import JoinError, PlanError, SettingsError
from tpdist.plan.placement import Device
from tpdist.settings import Settings

GIB = 1024**3
HEAD = {"head_num_workers": 2, "head_port": 5555}


def settings(**flags: Any) -> Settings:
    return Settings.load(flags, environ={})


def found(text: str | None = None, path: Path | None = None, **flags: Any) -> Found:
    return find_devices(settings(**flags), text=text, path=path)


def names(devices: tuple[Device, ...]) -> list[str]:
    return [device.name for device in devices]


def report(*gpus: tuple[int, int]) -> ProbeReport:
    """A machine with 32 GiB, of which 20 are free, and GPUs of (total, free) GiB."""
    cuda = tuple(
        DeviceInfo(kind="cuda", index=index, name="NVIDIA L4", total_bytes=total * GIB, free_bytes=free * GIB)
        for index, (total, free) in enumerate(gpus)
    )
    cpu = DeviceInfo(kind="cpu", index=0, name="some CPU", total_bytes=32 * GIB, free_bytes=20 * GIB)
    return ProbeReport(
        hostname="here",
        host_id="",
        num_cpus=4,
        memory_bytes=32 * GIB,
        available_bytes=20 * GIB,
        python="3",
        tpdist="0",
        torch=None,
        cuda=None,
        nccl=None,
        driver=None,
        devices=cuda or (cpu,),
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let this machine be another one."""

    def become(*gpus: tuple[int, int]) -> None:
        async def probe() -> ProbeReport:
            return report(*gpus)

        monkeypatch.setattr(plan_devices, "probe_in_child", probe)

    return become


def two_nodes(tmp_path: Path, first: str = 'devices = [{ memory = "24GiB", count = 2 }]', second: str = "") -> Path:
    file = tmp_path / "nodes.toml"
    second = second or 'devices = [{ memory = "24GiB" }]'
    file.write_text(f'[[node]]\nname = "a"\n{first}\n[[node]]\nname = "b"\n{second}\n')
    return file


# -- this machine -----------------------------------------------------------------------------------------------------


def test_without_devices_named_it_is_this_machine_with_what_is_free(machine: Any) -> None:
    machine((24, 23), (24, 10))
    devices = found().inventory.devices
    assert [(each.node, each.name, each.free_bytes // GIB) for each in devices] == [
        ("here", "cuda:0", 23),
        ("here", "cuda:1", 10),
    ]
    assert devices[0].bandwidth == 0.3e12


def test_a_machine_without_gpus_is_one_rank_with_all_its_memory(machine: Any) -> None:
    machine()
    (device,) = found().inventory.devices
    assert (device.name, device.kind, device.total_bytes, device.free_bytes) == ("cpu:0", "cpu", 32 * GIB, 20 * GIB)


@pytest.mark.parametrize("flags", [{"local_world_size": "4"}, {"tensor_parallel_size": "4"}])
def test_ranks_on_the_cpu_share_its_memory_evenly(machine: Any, flags: dict[str, Any]) -> None:
    machine()
    devices = found(**flags).inventory.devices
    assert names(devices) == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
    assert {(each.total_bytes, each.free_bytes) for each in devices} == {(8 * GIB, 5 * GIB)}
    assert sum(each.bandwidth for each in devices) == pytest.approx(35e9)


def test_a_head_takes_its_workers_to_be_alike(machine: Any) -> None:
    machine((24, 24), (24, 24))
    made = found(global_world_size=6, local_world_size=2, **HEAD)
    assert [(each.node, each.name) for each in made.inventory.devices] == [
        (node, f"cuda:{index}") for node in ("here", "worker0", "worker1") for index in range(2)
    ]
    assert "2 worker nodes are taken to be like this one" in made.notes[0]


def test_nodes_of_a_cluster_on_cpus_share_its_ranks(machine: Any) -> None:
    machine()
    made = found(global_world_size=5, **HEAD)
    assert names(made.inventory.devices) == ["cpu:0", "cpu:1", "cpu:0", "cpu:1", "cpu:0"]


def test_ranks_that_do_not_add_up_are_told(machine: Any) -> None:
    machine((24, 24), (24, 24))
    with pytest.raises(JoinError, match="MISTRALRS_MN_GLOBAL_WORLD_SIZE is 7"):
        found(global_world_size=7, **HEAD)


def test_a_worker_cannot_tell(machine: Any) -> None:
    machine()
    with pytest.raises(SettingsError, match=r"MISTRALRS_MN_WORKER_ID=0.*--inventory FILE"):
        found(global_world_size=2, worker_id=0, worker_server_addr="head:1")


# -- written down -----------------------------------------------------------------------------------------------------


def test_every_gpu_that_is_written_is_a_rank() -> None:
    assert names(found("2x80GiB,24GiB,cpu=64GiB").inventory.devices) == ["cuda:0", "cuda:1", "cuda:2"]


def test_fewer_ranks_use_the_first_gpus() -> None:
    assert names(found("4x80GiB", tensor_parallel_size=2).inventory.devices) == ["cuda:0", "cuda:1"]


def test_more_ranks_than_gpus_share_them_and_it_is_told() -> None:
    made = found("2x24GiB", local_world_size=3)
    assert [(each.name, each.total_bytes // GIB) for each in made.inventory.devices] == [
        ("cuda:0.0", 12),
        ("cuda:1", 24),
        ("cuda:0.1", 12),
    ]
    assert "3 ranks share 2 GPUs on node0" in made.notes[0]


def test_a_memory_that_is_written_runs_as_many_ranks_as_asked_for() -> None:
    devices = found("cpu=64GiB", local_world_size=2).inventory.devices
    assert [(each.name, each.total_bytes // GIB) for each in devices] == [("cpu:0", 32), ("cpu:1", 32)]


def test_the_cpu_is_used_instead_of_gpus_if_asked_for() -> None:
    assert names(found("24GiB,cpu=64GiB", device="cpu").inventory.devices) == ["cpu:0"]
    with pytest.raises(SettingsError, match="memory of node0 is not named; add cpu=64GiB"):
        found("24GiB", device="cpu")


def test_gpus_are_required_if_asked_for() -> None:
    with pytest.raises(PlanError, match="--device cuda was asked for, but node0 has no GPU"):
        found("cpu=64GiB", device="cuda")


def test_nodes_of_a_file_keep_their_order_and_links(tmp_path: Path) -> None:
    inventory = found(path=two_nodes(tmp_path)).inventory
    assert [(each.node, each.name) for each in inventory.devices] == [("a", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:0")]
    assert set(inventory.inside) == {"a", "b"}


def test_a_cluster_with_one_node_without_gpus_runs_on_cpus(tmp_path: Path) -> None:
    first = 'memory = "64GiB"\ndevices = [{ memory = "24GiB" }]'
    inventory = found(path=two_nodes(tmp_path, first, 'memory = "32GiB"'), local_world_size=2).inventory
    assert [(each.node, each.name) for each in inventory.devices] == [
        (node, f"cpu:{index}") for node in ("a", "b") for index in range(2)
    ]


def test_both_ways_to_write_devices_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--devices and --inventory"):
        found("24GiB", two_nodes(tmp_path))


# -- one process ------------------------------------------------------------------------------------------------------


def test_one_process_has_the_gpus_then_the_memory() -> None:
    assert names(found("cpu=64GiB,2x24GiB", no_nccl=True).inventory.devices) == ["cuda:0", "cuda:1", "cpu"]


def test_one_process_of_this_machine_may_use_its_memory(machine: Any) -> None:
    machine((24, 23))
    devices = found(no_nccl=True).inventory.devices
    assert [(each.name, each.free_bytes // GIB) for each in devices] == [("cuda:0", 23), ("cpu", 20)]


def test_a_folder_allows_the_disk(tmp_path: Path) -> None:
    devices = found("24GiB,cpu=8GiB", no_nccl=True, offload_folder=tmp_path).inventory.devices
    assert names(devices) == ["cuda:0", "cpu", "disk"]


def test_the_cpu_alone_may_be_asked_for() -> None:
    assert names(found("24GiB,cpu=8GiB", no_nccl=True, device="cpu").inventory.devices) == ["cpu"]


def test_limits_leave_out_what_they_do_not_name() -> None:
    devices = found("2x24GiB,cpu=64GiB", max_memory="0=20GiB,cpu=100GiB", gpu_memory_utilization="1").inventory.devices
    assert [(each.name, each.free_bytes // GIB) for each in devices] == [("cuda:0", 24), ("cpu", 64)]
    assert devices[0].limit_bytes == 20 * GIB
    with pytest.raises(PlanError, match="names cuda:7, but the devices are cuda:0, cpu"):
        found("24GiB,cpu=64GiB", max_memory="7=20GiB")


def test_an_inventory_has_as_many_nodes_as_the_head_waits_for(tmp_path: Path) -> None:
    path = two_nodes(tmp_path)
    variables = {"global_world_size": 4, "head_port": 5555}
    with pytest.raises(SettingsError, match="HEAD_NUM_WORKERS=3 means 4 nodes, but --inventory has 2: a, b"):
        found(path=path, head_num_workers=3, **variables)
    variables["global_world_size"] = 3
    assert found(path=path, head_num_workers=1, **variables).inventory.devices


def test_one_process_is_on_one_node(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"MISTRALRS_NO_NCCL=1 places .* but --inventory has 2 nodes"):
        found(path=two_nodes(tmp_path), no_nccl=True)
