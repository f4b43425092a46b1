"""What is known of devices by their names."""

import pytest

from tpdist.plan.devices import (
    GIB,
    NAMES,
    NVLINK,
    PCIE,
    SHARED_MEMORY,
    bandwidth_of,
    default_inside,
    memory_of,
)
from tpdist.plan.placement import Device


def device(kind: str, bandwidth: float) -> Device:
    return Device(name=kind, kind=kind, node="a", total_bytes=1, free_bytes=1, bandwidth=bandwidth)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "memory", "bandwidth"),
    [
        ("H100", 80 * GIB, 3.35e12),
        ("NVIDIA H100 80GB HBM3", 80 * GIB, 3.35e12),
        ("NVIDIA H100 PCIe", 80 * GIB, 2.0e12),
        ("NVIDIA H200", 141 * GIB, 4.8e12),
        ("NVIDIA A100-SXM4-40GB", 40 * GIB, 1.555e12),
        ("NVIDIA A100-SXM4-80GB", 80 * GIB, 2.0e12),
        ("NVIDIA GeForce RTX 4090", 24 * GIB, 1.008e12),
        ("l4", 24 * GIB, 0.3e12),
    ],
)
def test_a_gpu_is_known_by_the_name_that_torch_gives_it(name: str, memory: int, bandwidth: float) -> None:
    assert memory_of(name) == memory
    assert bandwidth_of(name, kind="cuda") == bandwidth


def test_every_name_finds_itself() -> None:
    assert len({(name, memory_of(name)) for name in NAMES}) == len(NAMES)
    assert all(memory_of(name) for name in NAMES)


def test_an_unknown_gpu_is_guessed_from_its_size() -> None:
    assert memory_of("Voodoo 2") is None
    assert memory_of("") is None
    assert bandwidth_of("", kind="cuda", total_bytes=80 * GIB) > bandwidth_of("", kind="cuda", total_bytes=8 * GIB)
    assert bandwidth_of("", kind="cpu") > bandwidth_of("", kind="disk")


def test_links_follow_the_kind_of_the_devices() -> None:
    cpu, fast, slow = device("cpu", 35e9), device("cuda", 3e12), device("cuda", 1e12)
    assert default_inside([cpu, cpu]) == default_inside([]) == SHARED_MEMORY
    assert default_inside([fast, fast, cpu]) == NVLINK
    assert default_inside([fast, slow]) == PCIE
