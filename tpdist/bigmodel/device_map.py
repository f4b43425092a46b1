"""Maps of module names to devices: looking names up, checking a map against a model, and writing it shortly."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from tpdist.bigmodel.devices import Device, DeviceMapError, check_devices
from tpdist.bigmodel.sizes import joined, prefixes

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

    A buffer that no state dict holds needs one only under the first name of its module. Warns of keys that name nothing
    in the model.
    """
    check_devices({f"the device of {key!r} in the device map": device for key, device in device_map.items()})
    tensors = [*(name for name, _ in model.named_parameters(remove_duplicate=False)), *_buffer_names(model)]
    left_out = [name for name in tensors if key_of(name, device_map) is None]
    if left_out:
        raise DeviceMapError(
            f"the device map gives no device to {len(left_out)} of {len(tensors)} parameters and buffers: "
            f"{', '.join(left_out[:NUM_SHOWN])}{', ...' if len(left_out) > NUM_SHOWN else ''}; "
            f"add them, or the modules around them"
        )
    known = {name for name, _ in model.named_modules(remove_duplicate=False)} | set(tensors)
    if unknown := [key for key in device_map if key not in known]:
        text = f"keys of the device map that name nothing in {type(model).__name__}: {unknown[:NUM_SHOWN]}"
        warnings.warn(text, UserWarning, stacklevel=2)


def _buffer_names(model: nn.Module) -> Iterator[str]:
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        left_out = module._non_persistent_buffers_set if id(module) in seen else ()
        seen.add(id(module))
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in left_out:
                yield joined(path, leaf)


def add_second_names(model: nn.Module, device_map: dict[str, Device]) -> None:
    """Give what stands twice in one module the device of its first name under the others too, which a planner that goes
    from child to child never sees. Only what check_device_map wants gets one."""
    first_names: dict[int, str] = {}
    for name, part in _every_name(model):
        first = first_names.setdefault(id(part), name)
        key = key_of(first, device_map)
        if key is not None and key_of(name, device_map) is None:
            device_map[name] = device_map[key]


def _every_name(model: nn.Module) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Modules that hold something that a map must place, each before its own tensors, under all their names."""
    wanted = {*(name for name, _ in model.named_parameters(remove_duplicate=False)), *_buffer_names(model)}
    around = {prefix for name in wanted for prefix in prefixes(name)}
    for path, module in model.named_modules(remove_duplicate=False):
        own = {**module._modules, **module._parameters, **module._buffers}
        for leaf, part in own.items():
            name = joined(path, leaf)
            if part is not None and name in around:
                yield name, part


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
