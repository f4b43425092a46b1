"""Which device of one process a part of a model goes to: the functions of transformer_lens.utilities.multi_gpu
(https://transformerlensorg.github.io/TransformerLens/) under their own names, with their arguments, results and errors.

`cfg` is any object with the attributes `n_layers`, `n_devices` and `device`. Errors are the built-in ones that callers
of TransformerLens catch, not TpdistError. Knows nothing of ranks, and moves no tensor: bytes of memory are asked of
torch.cuda in ways that make no CUDA context on a device that is only looked at.
"""

import warnings
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import nn

# Pairs of a CUDA device's index and its available memory in bytes.
AvailableDeviceMemory: TypeAlias = list[tuple[int, int]]

# What from_pretrained takes as device_map: for all of a model, or by the dotted names of its modules.
DeviceMap: TypeAlias = str | dict[str, str | int]
# From device index to a size such as "10GiB", or "auto" for what is free there.
MaxMemory: TypeAlias = dict[str | int, str]

# The ways that Accelerate has of its own to spread a model.
DIRECTIVES = ("auto", "balanced", "balanced_low_0", "sequential")
# Weights there are offloaded, and exist only while their module's forward runs: hooks that read them find nothing.
OFFLOADED = ("cpu", "disk", "meta")


def calculate_available_device_cuda_memory(i: int) -> int:
    """Return the bytes of CUDA device `i` that this process has not allocated.

    What other processes hold is not seen: the driver tells it only to a process with a context on that device, and a
    context takes some of the memory that is to be compared.
    """
    total: int = torch.cuda.get_device_properties(i).total_memory
    return total - torch.cuda.memory_allocated(i)


def determine_available_memory_for_available_devices(max_devices: int) -> AvailableDeviceMemory:
    """Return the available memory of the first `max_devices` CUDA devices, or of all if there are fewer."""
    indexes = range(min(max_devices, torch.cuda.device_count()))
    return [(index, calculate_available_device_cuda_memory(index)) for index in indexes]


def sort_devices_based_on_available_memory(devices: AvailableDeviceMemory) -> AvailableDeviceMemory:
    """Return a new list of `devices` with most memory first, and among equals in the order given."""
    return sorted(devices, key=lambda device: device[1], reverse=True)


def get_best_available_cuda_device(max_devices: int | None = None) -> torch.device:
    """Return the CUDA device with most memory available, of the first `max_devices` or of all.

    Raises OSError (EnvironmentError) if there is none.
    """
    count = torch.cuda.device_count() if max_devices is None else max_devices
    devices = sort_devices_based_on_available_memory(determine_available_memory_for_available_devices(count))
    if not devices:
        raise OSError(
            f"no CUDA device is available: {torch.cuda.device_count()} visible, max_devices is {max_devices}; check "
            f"CUDA_VISIBLE_DEVICES and the driver, or use device cpu"
        )
    return torch.device("cuda", devices[0][0])


def get_best_available_device(cfg: Any) -> torch.device:
    """Return the device of `cfg`; where that is CUDA with several devices, the one of them with most memory available.

    Raises ValueError without a device, OSError if CUDA is asked for and not there.
    """
    device = _configured(cfg.device)
    if device.type == "cuda" and cfg.n_devices > 1:
        return get_best_available_cuda_device(cfg.n_devices)
    return device


def get_device_for_block_index(index: int, cfg: Any, device: str | torch.device | None = None) -> torch.device:
    """Return the device of layer `index`, where `cfg.n_layers` consecutive layers are dealt to `cfg.n_devices` devices.

    The first of them is `device`, or that of `cfg`. Shares differ by one layer at most; with more devices than layers
    some have none. The CPU is one device, for any layer and whatever `n_devices` says; elsewhere a layer that is not
    there raises ValueError.

    Deprecated: it does not look at memory; use get_best_available_device, or place by plan.
    """
    warnings.warn(
        "get_device_for_block_index does not look at memory; use get_best_available_device",
        DeprecationWarning,
        stacklevel=2,
    )
    first = _configured(cfg.device if device is None else device)
    if first.type == "cpu":
        return first
    if not 0 <= index < cfg.n_layers:
        raise ValueError(f"layer {index} is not one of the model's layers 0 to {cfg.n_layers - 1}")
    if cfg.n_devices < 1:
        raise ValueError(f"n_devices is {cfg.n_devices}; it must be at least 1")
    # Multiplied first: dividing by n_layers // n_devices goes past the last device wherever that leaves a rest.
    return torch.device(first.type, (first.index or 0) + index * cfg.n_devices // cfg.n_layers)


def resolve_device_map(
    n_devices: int | None,
    device_map: DeviceMap | None,
    device: str | torch.device | None,
    max_memory: MaxMemory | None = None,
) -> tuple[DeviceMap | None, MaxMemory | None]:
    """Return `device_map` and `max_memory` as from_pretrained takes them; (None, None) stands for a single device.

    A `device_map` wins over `n_devices`; it and `max_memory` are returned as they are. Several devices become
    "balanced", limited to the first `n_devices` by a budget for each: that of `max_memory`, otherwise "auto". A budget
    for the CPU is kept.

    Raises ValueError for more devices than there are, `device` together with `device_map`, `device` or `max_memory`
    that name none of the `n_devices`, and a `device_map` that offloads or names no device.
    """
    if device_map is not None:
        _check_device_map(device_map, device)
        return device_map, max_memory
    if n_devices is None or n_devices <= 1:
        return None, None
    _check_cuda_devices(n_devices, device)
    return "balanced", _budgets(n_devices, max_memory or {})


def find_embedding_device(hf_model: Any) -> torch.device | None:
    """Return where the token ids that go into `hf_model` must be, or None if it was not spread over devices.

    That is the device of the input embedding, by the entry of `hf_device_map` that reaches its name furthest. A model
    that does not tell its embedding takes ids at the first entry. Modules on disk are computed on the first
    accelerator of the map, or on the CPU without one.
    """
    device_map = getattr(hf_model, "hf_device_map", None)
    if not device_map:
        return None
    embedding = _input_embedding(hf_model)
    names = [] if embedding is None else list(_names(hf_model, embedding))
    covering = [key for key in device_map if any(_covers(key, name) for name in names)]
    if not covering and (held := _held_on(embedding)) is not None:
        return held
    target = device_map[max(covering, key=len, default=next(iter(device_map)))]
    return _main_device(device_map.values()) if target == "disk" else _device(target)


def count_unique_devices(hf_model: Any) -> int:
    """Return how many devices the entries of `hf_device_map` name, offload targets included; 1 without the map."""
    device_map = getattr(hf_model, "hf_device_map", None)
    return len({_name(target) for target in device_map.values()}) if device_map else 1


def _configured(device: str | torch.device | None) -> torch.device:
    if device is None:
        raise ValueError("no device is configured: set cfg.device, for example to cuda or cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {str(device)!r} is no device; use one such as cuda:0 or cpu") from error


def _check_device_map(device_map: DeviceMap, device: str | torch.device | None) -> None:
    if device is not None:
        raise ValueError(
            f"device {str(device)!r} and device_map {device_map!r} are mutually exclusive: each says where the model "
            f"goes; leave one out"
        )
    if isinstance(device_map, str):
        # All of a model on the CPU is not offloaded: its weights are real ones.
        if device_map not in (*DIRECTIVES, "cpu"):
            _check_target("device_map", device_map, f"one of {', '.join(DIRECTIVES)}, or a device such as cuda:0")
        return
    if not device_map:
        raise ValueError('device_map is empty; name a device for each part of the model, such as {"": 0}')
    for module, target in device_map.items():
        _check_target(f"device_map[{module!r}]", target, "the index of a CUDA device, or a device such as cuda:0")


def _check_target(where: str, target: str | int, expected: str) -> None:
    """Raise ValueError unless `target` is a device that can hold weights. Whether it is there is seen at loading."""
    if _name(target).lower() in OFFLOADED:
        raise ValueError(
            f"{where} is {target!r}, which is not supported: weights that are offloaded cannot be read by hooks; use "
            f"{expected}, or more devices"
        )
    try:
        _device(target)
    except RuntimeError as error:
        raise ValueError(f"{where} is {target!r}, which is no device; use {expected}") from error


def _check_cuda_devices(n_devices: int, device: str | torch.device | None) -> None:
    visible = torch.cuda.device_count()
    if visible < n_devices:
        raise ValueError(
            f"n_devices is {n_devices}, which requires CUDA devices, but only {visible} are visible; use at most that "
            f"many, or check CUDA_VISIBLE_DEVICES"
        )
    first = _configured("cuda" if device is None else device)
    if first.type != "cuda" or (first.index or 0) >= n_devices:
        raise ValueError(
            f"device {str(device)!r} is none of the CUDA devices 0 to {n_devices - 1} that n_devices {n_devices} "
            f"stands for; leave one of the two out"
        )


def _budgets(n_devices: int, max_memory: MaxMemory) -> MaxMemory:
    for key in max_memory:
        if key not in (*range(n_devices), "cpu"):
            raise ValueError(
                f"max_memory has {key!r}, which is none of the CUDA devices 0 to {n_devices - 1} that n_devices "
                f"{n_devices} stands for; leave it out, or give a device_map"
            )
    every: MaxMemory = dict.fromkeys(range(n_devices), "auto")
    return every | max_memory


def _input_embedding(hf_model: Any) -> Any:
    """The module that takes token ids, or None where the model has none or does not tell."""
    try:
        return hf_model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _names(hf_model: Any, module: Any) -> Iterable[str]:
    """All dotted names of `module` in the model: a shared embedding has several."""
    if not isinstance(hf_model, nn.Module):
        return ()
    return (name for name, each in hf_model.named_modules(remove_duplicate=False) if each is module)


def _covers(key: str, name: str) -> bool:
    return key in ("", name) or name.startswith(key + ".")


def _held_on(module: Any) -> torch.device | None:
    """Where the weights of `module` are now; None without a module, without weights, or if they are offloaded."""
    parameters = getattr(module, "parameters", tuple)
    device = next((parameter.device for parameter in parameters()), None)
    return None if device is None or device.type == "meta" else device


def _main_device(targets: Iterable[str | int]) -> torch.device:
    return next((_device(target) for target in targets if _name(target) not in OFFLOADED), torch.device("cpu"))


def _device(target: str | int) -> torch.device:
    """The device that a value of a device map names. Raises RuntimeError if it names none."""
    return torch.device(_name(target))


def _name(target: str | int) -> str:
    """A device's name; a number is the index of a CUDA device."""
    return f"cuda:{target}" if isinstance(target, int) else str(target)
