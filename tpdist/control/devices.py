"""What nodes have, as the planner counts it: a device for each rank, or all devices of one process.

Ranks share evenly what is one: the memory of a machine, also where several nodes stand on it, and a GPU that has more
ranks than one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tpdist.control.messages import ProbeReport
from tpdist.errors import PlanError
from tpdist.plan.devices import bandwidth_of, disk_of
from tpdist.plan.inventory import make_devices
from tpdist.plan.placement import Device

_KINDS = ("cuda", "cpu", "disk")


def probed_devices(report: ProbeReport, *, node: str) -> list[Device]:
    """The GPUs and the memory of a machine."""
    gpus = [
        Device(
            name=f"cuda:{device.index}",
            kind="cuda",
            node=node,
            total_bytes=device.total_bytes,
            free_bytes=device.free_bytes,
            bandwidth=bandwidth_of(device.name, kind="cuda", total_bytes=device.total_bytes),
        )
        for device in report.devices
        if device.kind == "cuda"
    ]
    return [*gpus, *make_devices(node, kind="cpu", size=report.memory_bytes, free=report.available_bytes)]


def rank_devices(devices: Sequence[Device], size: int, *, ranks_on_machine: int | None = None) -> list[Device]:
    """A device for each of a node's `size` ranks, of `devices` of one kind; those that share one have an even part of
    it. `ranks_on_machine`: how many share a memory, of this node and of others beside it."""
    sharing = Counter(rank % len(devices) for rank in range(size))
    return [
        _part(
            devices[rank % len(devices)],
            number=rank if devices[0].kind == "cpu" else rank // len(devices),
            parts=(ranks_on_machine or size) if devices[0].kind == "cpu" else sharing[rank % len(devices)],
        )
        for rank in range(size)
    ]


def _part(device: Device, *, number: int, parts: int) -> Device:
    name = f"cpu:{number}" if device.kind == "cpu" else device.name if parts == 1 else f"{device.name}.{number}"
    return replace(
        device,
        name=name,
        total_bytes=device.total_bytes // parts,
        free_bytes=device.free_bytes // parts,
        bandwidth=device.bandwidth / parts,
    )


def process_devices(
    devices: Sequence[Device],
    *,
    cpu_only: bool,
    disk: bool,
    max_memory: Mapping[str, int | None] | None,
) -> list[Device]:
    """All devices of one process on a node: GPUs, its memory, and its disk if layers may be there, of which no more may
    be used than `max_memory` allows, nor than else. Raises PlanError for a device that is not there."""
    found = [device for device in devices if device.kind != "cuda" or not cpu_only]
    if disk:
        found.append(disk_of(found[0].node))
    if max_memory is not None:
        found = _limited(found, max_memory)
    return sorted(found, key=lambda device: _KINDS.index(device.kind))


def _with_limit(device: Device, size: int | None) -> Device:
    """A memory's limit is what is free of it: caches are dealt by that. Of a GPU more is free, which others may use."""
    free = device.free_bytes if size is None or device.kind == "cuda" else min(device.free_bytes, size)
    return replace(device, free_bytes=free, limit_bytes=size)


def _limited(devices: Sequence[Device], most: Mapping[str, int | None]) -> list[Device]:
    """With at most these bytes, None for what is free; what is not named takes nothing, but for the disk, which was
    allowed by itself. A plain number is a GPU's."""
    limits = {f"cuda:{name}" if name.isdecimal() else name: size for name, size in most.items()}
    if len(limits) < len(most):
        raise PlanError(f"--max-memory has a device twice, by its number and by its name: {', '.join(most)}")
    names = [device.name for device in devices]
    if unknown := [name for name in limits if name not in names]:
        raise PlanError(f"--max-memory names {', '.join(unknown)}, but the devices are {', '.join(names)}")

    return [
        _with_limit(device, limits.get(device.name))
        for device in devices
        if device.name in limits or device.kind == "disk"
    ]
