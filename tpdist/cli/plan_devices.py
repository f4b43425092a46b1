"""The devices that `tpdist plan` plans for: this machine's, or those that were written down, and which become ranks.

Counts ranks as `tpdist serve` does: a rank for each GPU, on nodes without one as many as were asked for, which share
the machine's memory evenly.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tpdist.control.devices import probed_devices, process_devices, rank_devices
from tpdist.control.messages import ProbeReport
from tpdist.errors import PlanError, SettingsError
from tpdist.node import probe_in_child
from tpdist.place import place_of
from tpdist.plan.inventory import make_inventory, parse_devices
from tpdist.plan.inventory_file import read_inventory
from tpdist.plan.placement import Device, Inventory
from tpdist.plan.topology import local_world_sizes
from tpdist.settings import Role, Settings


@dataclass(frozen=True)
class Found:
    """The devices to plan for, in the order of ranks. `process`: all devices of the node's process, if there is one
    process only. `notes`: what was taken for granted, a sentence each."""

    inventory: Inventory
    process: Inventory | None = None
    notes: tuple[str, ...] = ()


def find_devices(settings: Settings, *, text: str | None, path: Path | None) -> Found:
    """The devices of `text` (--devices) or `path` (--inventory), else of this machine. Raises SettingsError, PlanError
    or JoinError."""
    if text is not None and path is not None:
        raise SettingsError("--devices and --inventory both say which devices there are; give one of them")
    found = _written(settings, text=text, path=path)
    if settings.one_process:
        process = _for_one_process(found.inventory, settings)
        return replace(found, inventory=process, process=process)
    return _for_ranks(found, settings)


def _written(settings: Settings, *, text: str | None, path: Path | None) -> Found:
    if text is not None:
        return Found(parse_devices(text))
    if path is not None:
        return Found(_of_all_nodes(read_inventory(path), settings))
    report = asyncio.run(probe_in_child())
    return _like_this_one(settings, report)


def _of_all_nodes(inventory: Inventory, settings: Settings) -> Inventory:
    """Raises SettingsError unless there are as many nodes as the head's variables say."""
    nodes, workers = _by_node(inventory), settings.head_num_workers
    if workers is not None and len(nodes) != workers + 1:
        raise SettingsError(
            f"MISTRALRS_MN_HEAD_NUM_WORKERS={workers} means {workers + 1} nodes, but --inventory has {len(nodes)}: "
            f"{', '.join(devices[0].node for devices in nodes)}"
        )
    return inventory


def _like_this_one(settings: Settings, report: ProbeReport) -> Found:
    """This machine, and for a head as many more as it has workers."""
    if settings.role is Role.WORKER:
        raise SettingsError(
            f"a worker (MISTRALRS_MN_WORKER_ID={settings.worker_id}) does not know the other nodes; run `tpdist plan` "
            "with the head's variables, or name all nodes in --inventory FILE"
        )
    workers = [f"worker{index}" for index in range(settings.head_num_workers or 0)]
    devices = [device for name in (report.hostname, *workers) for device in probed_devices(report, node=name)]
    notes = [f"the {len(workers)} worker nodes are taken to be like this one; --inventory FILE names others"]
    return Found(make_inventory(devices), notes=tuple(notes if workers else ()))


# -- ranks ------------------------------------------------------------------------------------------------------------


def _for_ranks(found: Found, settings: Settings) -> Found:
    """The same nodes with one device for each rank."""
    nodes = _by_node(found.inventory)
    kind = _kind(nodes, settings.device)
    own = [[device for device in devices if device.kind == kind] for devices in nodes]
    if missing := [devices[0].node for devices, mine in zip(nodes, own, strict=True) if not mine]:
        raise SettingsError(
            f"the ranks are to run on the CPU, but the memory of {', '.join(missing)} is not named; add cpu=64GiB to "
            '--devices, or memory = "64GiB" to the node in --inventory'
        )
    sizes = _rank_counts(settings, [len(mine) if kind == "cuda" else None for mine in own])
    notes = [note for mine, size in zip(own, sizes, strict=True) for note in _sharing(mine, size)]
    devices = [device for mine, size in zip(own, sizes, strict=True) for device in rank_devices(mine, size)]
    alone = len(devices) == 1 and kind == "cuda"
    return Found(
        replace(found.inventory, devices=tuple(devices)),
        process=_for_one_process(found.inventory, settings) if alone else None,
        notes=(*found.notes, *notes),
    )


def _by_node(inventory: Inventory) -> list[list[Device]]:
    nodes: dict[str, list[Device]] = {}
    for device in inventory.devices:
        nodes.setdefault(device.node, []).append(device)
    return list(nodes.values())


def _kind(nodes: Sequence[Sequence[Device]], asked: str) -> str:
    """One kind for all ranks: a process group cannot mix them."""
    without = [devices[0].node for devices in nodes if all(device.kind != "cuda" for device in devices)]
    if asked == "cuda" and without:
        raise PlanError(f"--device cuda was asked for, but {', '.join(without)} has no GPU")
    return "cpu" if without or asked == "cpu" else "cuda"


def _rank_counts(settings: Settings, gpus: Sequence[int | None]) -> tuple[int, ...]:
    """Ranks of each node: what was asked for, else its GPUs, else its share of what is left."""
    if len(gpus) == 1 and settings.global_world_size is None:
        return (place_of(settings).local_world_size or gpus[0] or settings.num_stages or 1,)
    requested = [settings.local_world_size or gpus[0], *gpus[1:]]
    if settings.global_world_size is None:
        return tuple(size or settings.local_world_size or 1 for size in requested)
    return local_world_sizes(requested, settings.global_world_size)


def _sharing(devices: Sequence[Device], size: int) -> list[str]:
    if devices[0].kind == "cpu" or size <= len(devices):
        return []
    return [
        f"{size} ranks share {len(devices)} GPUs on {devices[0].node}: each has a part of the memory, none of speed"
    ]


# -- one process ------------------------------------------------------------------------------------------------------


def _for_one_process(inventory: Inventory, settings: Settings) -> Inventory:
    """The devices of the one node: its GPUs, its memory, and its disk if layers may be there."""
    nodes = _by_node(inventory)
    if len(nodes) > 1:
        raise SettingsError(
            f"{settings.one_process} places the layers over the devices of one process, but --inventory has "
            f"{len(nodes)} nodes; leave one, or unset it"
        )
    devices = process_devices(
        nodes[0],
        cpu_only=settings.device == "cpu",
        disk=settings.offload_folder is not None,
        max_memory=settings.max_memory,
    )
    return replace(inventory, devices=tuple(devices))
