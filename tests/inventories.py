"""Devices and demands for tests of the planner. Small: a GPU's size is what it has beside the overhead of a process."""

from collections.abc import Sequence
from typing import Any

from tpdist.plan.costs import overhead_bytes
from tpdist.plan.placement import Demand, Device, Inventory, Link

MIB = 1024**2
GIB = 1024**3
LINK = Link(bandwidth=300e9, latency_s=10e-6)
SLOW = Link(bandwidth=1.25e9, latency_s=100e-6)


def demand(**changes: Any) -> Demand:
    """Of a GPU all that is free may be used."""
    return Demand(**{"dtype": "float32", "max_model_len": 512, "gpu_memory_utilization": 1.0, **changes})


def gpu(index: int, size: int, *, node: str = "a", bandwidth: float = 1e12) -> Device:
    """A GPU with `size` bytes for a model."""
    total = size + overhead_bytes("cuda")
    return Device(
        name=f"cuda:{index}", kind="cuda", node=node, total_bytes=total, free_bytes=total, bandwidth=bandwidth
    )


def cpu(size: int, *, node: str = "a", bandwidth: float = 35e9) -> Device:
    total = size + overhead_bytes("cpu")
    return Device(name="cpu", kind="cpu", node=node, total_bytes=total, free_bytes=total, bandwidth=bandwidth)


def disk(size: int, *, node: str = "a") -> Device:
    return Device(name="disk", kind="disk", node=node, total_bytes=size, free_bytes=size, bandwidth=2e9)


def inventory(devices: Sequence[Device]) -> Inventory:
    """One fast link inside each node, slow ones across."""
    nodes = {device.node for device in devices}
    return Inventory(devices=tuple(devices), inside=dict.fromkeys(nodes, LINK), across={}, default_across=SLOW)
