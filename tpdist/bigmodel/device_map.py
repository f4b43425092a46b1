"""Maps of module names to devices: looking names up, checking a map against a model, and writing it shortly."""

import logging
from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import nn

from tpdist.bigmodel.devices import Device, DeviceMapError, check_devices
from tpdist.bigmodel.sizes import prefixes

log = logging.getLogger(__name__)
Placed = Device | torch.device
NUM_SHOWN = 5


def key_of(name: str, device_map: Iterable[str]) -> str | None:
    """The key of a map that decides where a module or tensor goes: the longest of the name and its ancestors."""
    return next((prefix for prefix in reversed(list(prefixes(name))) if prefix in device_map), None)


def device_of(name: str, device_map: Mapping[str, Placed]) -> Placed:
    """Where a module or tensor goes. Raises DeviceMapError if the map does not say."""
    key = key_of(name, device_map)
    if key is None:
        raise DeviceMapError(f"the device map says nothing of {name}: add it, or one of the modules around it")
    return device_map[key]


def check_device_map(model: nn.Module, device_map: Mapping[str, Placed]) -> None:
    """Raise DeviceMapError unless every device exists and every parameter and buffer has one; the first are named.

    Keys that name nothing in the model are reported in the log.
    """
    check_devices({f"the device of {key!r} in the device map": device for key, device in device_map.items()})
    every_name = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = [name for name, _ in every_name]
    left_out = [name for name in tensors if key_of(name, device_map) is None]
    if left_out:
        raise DeviceMapError(
            f"the device map gives no device to {len(left_out)} of {len(tensors)} parameters and buffers: "
            f"{', '.join(left_out[:NUM_SHOWN])}{', ...' if len(left_out) > NUM_SHOWN else ''}; "
            f"add them, or the modules around them"
        )
    known = {name for name, _ in model.named_modules(remove_duplicate=False)} | set(tensors)
    if unknown := [key for key in device_map if key not in known]:
        log.warning("keys of the device map that name nothing in %s: %s", type(model).__name__, unknown[:NUM_SHOWN])


def clean_device_map(device_map: Mapping[str, Device]) -> dict[str, Device]:
    """The map with one key for every module whose parts all go to one device.

    What stays as it is keeps its order; modules made of several keys follow, in the order of their first parts.
    """
    devices: dict[str, set[Device]] = {}
    counts: dict[str, int] = {}
    children: dict[str, dict[str, None]] = {}
    for key, device in device_map.items():
        path = list(prefixes(key))
        for parent, child in pairwise(path):
            devices.setdefault(parent, set()).add(device)
            counts[parent] = counts.get(parent, 0) + 1
            children.setdefault(parent, {})[child] = None
    merged: dict[str, Device] = {}
    pending = [""]
    while pending:
        name = pending.pop()
        if counts.get(name, 0) > 1 and len(devices[name]) == 1:
            merged[name] = next(iter(devices[name]))
        else:
            pending.extend(reversed(children.get(name, {})))
    kept = {key: device for key, device in device_map.items() if not any(name in merged for name in prefixes(key))}
    return kept | merged
