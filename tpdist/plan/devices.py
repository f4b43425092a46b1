"""What is known of devices and links where nobody has measured them: memory and bandwidth by the name of a GPU, and
default links. Vendors' figures, as upper bounds: they compare layouts, and promise no speed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tpdist.plan.placement import Device, Link

GIB = 1024**3


@dataclass(frozen=True)
class _Known:
    memory_bytes: int
    bandwidth: float


_GPUS = {
    "B300": _Known(288 * GIB, 8.0e12),
    "B200": _Known(180 * GIB, 8.0e12),
    "H200": _Known(141 * GIB, 4.8e12),
    "GH200": _Known(96 * GIB, 4.0e12),
    "H100": _Known(80 * GIB, 3.35e12),
    "H100-NVL": _Known(94 * GIB, 3.9e12),
    "H100-PCIe": _Known(80 * GIB, 2.0e12),
    "H20": _Known(96 * GIB, 4.0e12),
    "A100": _Known(80 * GIB, 2.0e12),
    "A100-40GB": _Known(40 * GIB, 1.555e12),
    "A800": _Known(80 * GIB, 2.0e12),
    "A40": _Known(48 * GIB, 0.696e12),
    "A30": _Known(24 * GIB, 0.933e12),
    "A10": _Known(24 * GIB, 0.6e12),
    "A10G": _Known(24 * GIB, 0.6e12),
    "L40S": _Known(48 * GIB, 0.864e12),
    "L40": _Known(48 * GIB, 0.864e12),
    "L4": _Known(24 * GIB, 0.3e12),
    "T4": _Known(16 * GIB, 0.32e12),
    "V100": _Known(32 * GIB, 0.9e12),
    "V100-16GB": _Known(16 * GIB, 0.9e12),
    "P100": _Known(16 * GIB, 0.732e12),
    "RTX-PRO-6000": _Known(96 * GIB, 1.792e12),
    "RTX-6000-Ada": _Known(48 * GIB, 0.96e12),
    "RTX-A6000": _Known(48 * GIB, 0.768e12),
    "RTX-5090": _Known(32 * GIB, 1.792e12),
    "RTX-5080": _Known(16 * GIB, 0.96e12),
    "RTX-5070-Ti": _Known(16 * GIB, 0.896e12),
    "RTX-4090": _Known(24 * GIB, 1.008e12),
    "RTX-4080": _Known(16 * GIB, 0.717e12),
    "RTX-4070": _Known(12 * GIB, 0.504e12),
    "RTX-3090": _Known(24 * GIB, 0.936e12),
    "RTX-3080": _Known(10 * GIB, 0.76e12),
    "RTX-3060": _Known(12 * GIB, 0.36e12),
}
NAMES = tuple(_GPUS)

CPU_BANDWIDTH = 35e9
"""A machine's memory, read by a few cores."""

DISK_BYTES = 2**40
DISK_BANDWIDTH = 2e9
"""A solid-state drive."""

LARGE_GPU_BANDWIDTH = 1.5e12
SMALL_GPU_BANDWIDTH = 0.5e12
LARGE_GPU_BYTES = 40 * GIB

NVLINK = Link(bandwidth=300e9, latency_s=10e-6)
PCIE = Link(bandwidth=25e9, latency_s=20e-6)
SHARED_MEMORY = Link(bandwidth=6e9, latency_s=8e-6)
DEFAULT_ACROSS = Link(bandwidth=1.25e9, latency_s=100e-6)
"""Ten gigabit a second: what a network is at least taken for."""

NVLINK_FROM_BANDWIDTH = 1.5e12
"""GPUs that read their memory this fast have stacked memory, and are sold with direct links between them."""


def memory_of(name: str) -> int | None:
    """Memory of a GPU by a name such as H100 or `NVIDIA A100-SXM4-40GB`; None if it is not known."""
    known = _find(name)
    return None if known is None else known.memory_bytes


def disk_of(node: str) -> Device:
    """The disk of a node, as far as a placement knows it."""
    return Device(
        name="disk",
        kind="disk",
        node=node,
        total_bytes=DISK_BYTES,
        free_bytes=DISK_BYTES,
        bandwidth=DISK_BANDWIDTH,
    )


def bandwidth_of(name: str, *, kind: str, total_bytes: int = 0) -> float:
    """Bytes per second that a device reads its memory with: by name, else a guess from kind and size."""
    if kind == "cpu":
        return CPU_BANDWIDTH
    if kind == "disk":
        return DISK_BANDWIDTH
    known = _find(name)
    if known is not None:
        return known.bandwidth
    return LARGE_GPU_BANDWIDTH if total_bytes >= LARGE_GPU_BYTES else SMALL_GPU_BANDWIDTH


def default_inside(devices: Sequence[Device]) -> Link:
    """The link between the devices of one node. GPUs beside a CPU are linked as they are among themselves."""
    gpus = [device for device in devices if device.kind == "cuda"]
    if not gpus:
        return SHARED_MEMORY
    return NVLINK if min(gpu.bandwidth for gpu in gpus) >= NVLINK_FROM_BANDWIDTH else PCIE


def _find(name: str) -> _Known | None:
    """The entry with most words of its name in `name`, whatever their case."""
    words = set(_words(name))
    matches = [(len(_words(known)), entry) for known, entry in _GPUS.items() if words.issuperset(_words(known))]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def _words(name: str) -> list[str]:
    return re.split(r"[^0-9a-z]+", name.lower())
