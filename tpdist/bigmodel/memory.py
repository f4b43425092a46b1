"""How many bytes of each device a placement may use: as given, as free, or balanced over the GPUs.

Names and results are Accelerate's, without three of its faults: the caller's dict is never changed, a device map may
name GPUs with gaps in their numbers (and "disk") for `low_zero`, and a GPU without memory counts for none.
"""

import logging
from collections.abc import Iterable, Mapping
from numbers import Real

from torch import nn

from tpdist.bigmodel import devices
from tpdist.bigmodel.devices import Device, DeviceMapError, MaxMemory
from tpdist.bigmodel.sizes import (
    Dtype,
    class_names,
    compute_module_sizes,
    convert_file_size_to_int,
    get_module_leaves,
)

log = logging.getLogger(__name__)
LAST_DEVICES = ("mps", "cpu", "disk")
# Of the one GPU of a user who set no memory: the rest is for what a forward pass needs beside the weights.
SHARE_OF_A_SINGLE_GPU = 0.9


def get_max_memory(max_memory: Mapping[Device, float | str] | None = None) -> MaxMemory:
    """Bytes that may be used of each device: GPUs by number first, then "mps", "cpu", "disk".

    Without `max_memory`, what is free now. Its values are bytes, sizes with a unit ("10GiB"), or "auto": what is free
    of that device. Raises DeviceMapError for other devices and values.
    """
    if max_memory is None:
        return devices.free_memory()
    if unknown := [device for device in max_memory if not _is_known(device)]:
        raise DeviceMapError(
            f"max_memory names {unknown[0]!r}, which is no device: use GPU numbers, 'mps', 'cpu' and 'disk'"
        )
    present = devices.present_devices()
    if missing := [device for device in _gpus(max_memory) if device not in present]:
        log.warning("max_memory names GPUs %s, which are not available; there are %s", missing, _gpus(present))
    asked = [device for device, size in max_memory.items() if size == "auto"]
    free = devices.free_memory(asked) if asked else {}
    order: list[Device] = [*_gpus(max_memory), *(device for device in LAST_DEVICES if device in max_memory)]
    return {device: _num_bytes(device, max_memory[device], free) for device in order}


def _is_known(device: object) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return device >= 0
    return device in LAST_DEVICES


def _gpus(memory: Iterable[Device]) -> list[int]:
    return sorted(device for device in memory if isinstance(device, int))


def _num_bytes(device: Device, size: float | str, free: Mapping[Device, int]) -> int:
    if size == "auto":
        if device not in free:
            raise DeviceMapError(f"max_memory of {device!r} is 'auto', but its free memory is not known; give bytes")
        return free[device]
    try:
        if isinstance(size, str):
            return convert_file_size_to_int(size)
        if isinstance(size, Real) and not isinstance(size, bool) and size >= 0:
            return int(size)
    except (ValueError, OverflowError):  # a word, infinity
        pass
    raise DeviceMapError(
        f"max_memory of {device!r} is {size!r}: give bytes as a number of 0 or more, a size such as '10GiB', or "
        f"'auto'; leave out a device that is not to be used"
    )


def get_balanced_memory(
    model: nn.Module,
    max_memory: Mapping[Device, float | str] | None = None,
    no_split_module_classes: str | Iterable[str] | None = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    low_zero: bool = False,
) -> MaxMemory:
    """A max_memory that spreads the model evenly over the GPUs that it names, for infer_auto_device_map.

    With `low_zero`, GPU 0 (the first GPU, if 0 is not among them) only gets what the others have no room for. A single
    GPU of a user who gave no `max_memory` keeps a tenth free. The last GPU keeps all its memory.
    """
    memory = get_max_memory(max_memory)
    gpus = [device for device in _gpus(memory) if memory[device] > 0]
    # "mps" stands for the machine's one GPU; ours only counts, since its memory is the machine's.
    num_devices = len(gpus) + (memory.get("mps", 0) > 0 and "mps" in devices.present_devices())
    if num_devices == 0:
        return memory
    if num_devices == 1:
        low_zero = False
        if max_memory is None and gpus:
            memory[gpus[0]] = int(memory[gpus[0]] * SHARE_OF_A_SINGLE_GPU)
    sizes = compute_module_sizes(model, dtype=dtype, special_dtypes=special_dtypes)
    spare = _spare_bytes(model, sizes, class_names(no_split_module_classes))
    share = sizes[""] // (num_devices - 1 if low_zero else num_devices) + spare
    lowest = (0 if 0 in memory else gpus[0]) if low_zero else None
    for gpu in gpus[:-1]:
        if gpu != lowest:
            memory[gpu] = min(share, memory[gpu])
    if lowest is not None:
        others = sum(memory[gpu] for gpu in gpus if gpu != lowest)
        memory[lowest] = min(max(0, sizes[""] - others), memory[lowest])
    return memory


def _spare_bytes(model: nn.Module, sizes: Mapping[str, int], no_split: list[str]) -> int:
    """What an even share needs beside itself, since layers do not divide: a quarter more than the largest of the first
    no-split modules of each class, or than the mean of the modules without children."""
    leaves = set(get_module_leaves(sizes))
    modules = {name: size for name, size in sizes.items() if name not in leaves}
    lowest = get_module_leaves(modules)
    mean = int(sum(modules[name] for name in lowest) / max(len(lowest), 1))
    blocks = _first_of_each_class(model, sizes, no_split)
    return int(1.25 * max(mean, max(blocks.values(), default=0)))


def _first_of_each_class(model: nn.Module, sizes: Mapping[str, int], classes: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, module in model.named_modules() if classes else ():
        if name and name in sizes and type(module).__name__ in classes:
            found.setdefault(type(module).__name__, sizes[name])
    return found
