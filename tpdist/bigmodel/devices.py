"""Which devices this process has, and what a device of a map means to torch.

Tests replace `present_devices` and `free_memory`, which alone look at the machine.
"""

from collections.abc import Container, Mapping

import psutil
import torch

from tpdist.errors import SettingsError

Device = int | str
MaxMemory = dict[Device, int]


class DeviceMapError(SettingsError, ValueError):
    """A device map, or the memory or type for one, that cannot be used; a ValueError too, as Accelerate raises."""


def present_devices() -> list[Device]:
    """GPUs by number, then "mps", then "cpu". No GPU is asked for its free memory: that would take some hundred
    megabytes of it, for a context."""
    return [*range(torch.cuda.device_count()), *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def free_memory(among: Container[Device] | None = None) -> MaxMemory:
    """Free bytes of every device, or of those `among` these: GPUs by number, then "mps" or "cpu"."""
    memory: MaxMemory = {}
    shares_host_memory = False
    for index in range(torch.cuda.device_count()):
        if among is not None and index not in among:
            continue
        try:
            memory[index] = torch.cuda.mem_get_info(index)[0]
            properties = torch.cuda.get_device_properties(index)
        except RuntimeError:  # busy in exclusive mode, or broken: the others can still be used
            continue
        shares_host_memory |= bool(getattr(properties, "is_integrated", False))
    available: int = psutil.virtual_memory().available
    if torch.backends.mps.is_available():
        memory["mps"] = available
    elif not shares_host_memory:  # memory that both use must not count twice
        memory["cpu"] = available
    return memory if among is None else {device: size for device, size in memory.items() if device in among}


def torch_device(device: Device | torch.device) -> torch.device:
    """What torch calls a device of a map, which is not "disk": whole numbers are GPUs, "cuda" is the first of them."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    found = torch.device(device)
    if found.type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", 0) if found.type == "cuda" and found.index is None else found


def is_memory_or_disk(device: Device | torch.device) -> bool:
    """Whether a device of a map is where modules wait that run elsewhere: "cpu" or "disk"."""
    return device == "disk" or torch_device(device).type == "cpu"


def check_devices(devices: Mapping[str, object]) -> None:
    """Raise DeviceMapError unless each of these devices, by what they are for, exists here or is "disk"."""
    present = present_devices()
    for what, device in devices.items():
        if device != "disk" and not _is_device(device, present):
            existing = dict.fromkeys([*present, "cpu", "disk"])
            shown = ", ".join(f"{name} (cuda:{name})" if isinstance(name, int) else name for name in existing)
            raise DeviceMapError(f"{what} is {device!r}, which is no device of this machine; there are {shown}")


def _is_device(device: object, present: Container[Device]) -> bool:
    if isinstance(device, bool) or not isinstance(device, int | str | torch.device):
        return False
    try:
        return _exists(torch_device(device), present)
    except RuntimeError:  # torch knows no such word, or number
        return False


def _exists(device: torch.device, present: Container[Device]) -> bool:
    if device.type == "cuda":
        return device.index in present
    return device.type == "cpu" or (device.type == "mps" and "mps" in present)
