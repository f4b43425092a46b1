"""Making a model run whose modules are on several devices, in CPU memory, and on the disk: layout.py does the work."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpdist.bigmodel.align import offloaded_in, slots
from tpdist.bigmodel.auto import no_split_classes
from tpdist.bigmodel.device_map import Placed, check_device_map
from tpdist.bigmodel.devices import DeviceMapError, check_devices, is_memory_or_disk, torch_device
from tpdist.bigmodel.layout import Layout
from tpdist.bigmodel.sizes import class_names
from tpdist.bigmodel.tied import report_ties
from tpdist.errors import SettingsError

PathLike = str | os.PathLike[str]
NUM_BLOCKS_AHEAD = 1


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Placed],
    main_device: Placed | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    offload_dir: PathLike | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: str | Sequence[str] | None = None,
    force_hooks: bool = False,
    prefetch_blocks: int = NUM_BLOCKS_AHEAD,
    no_split_module_classes: str | Sequence[str] | None = None,
) -> nn.Module:
    """Put each module where the map says, and make `model` run from there; it is changed and returned.

    What the map puts on "disk" is read from the checkpoint that load_checkpoint_in_model left it in, from
    `offload_index` (name to safetensors_file and weight_name), or, if it is in memory, is written to `offload_dir`
    first, as safetensors. "cpu" is offloaded if `main_device` (the first in the map that is neither "cpu" nor "disk")
    is a GPU, from `state_dict` if that is given. Buffers stay on the device that runs unless `offload_buffers`; those
    that no state dict holds always do. `prefetch_blocks` are read ahead of the disk, each into memory of its own; a
    block is a module of `no_split_module_classes`, or of those that the model names.

    If all is on one device, which is no disk, the model is moved there and gets no hooks, unless `force_hooks`.
    A model that is dispatched already is dispatched anew: what was on the disk, and stays there, is read from the same
    files. Raises DeviceMapError for a map that does not fit the model or this machine, CheckpointError for files; a
    model whose values are not all known to be somewhere stays as it was.
    """
    check_prefetch_blocks(prefetch_blocks)
    check_device_map(model, device_map)
    main = _main_device(device_map, main_device)
    report_ties(model, device_map)
    layout = Layout(model, device_map, main, offload_buffers, class_names(preload_module_classes))
    layout.no_split = no_split_classes(model, no_split_module_classes)
    devices = {str(device) if device == "disk" else str(torch_device(device)) for device in device_map.values()}
    with_hooks = force_hooks or len(devices) > 1 or "disk" in devices
    if not with_hooks and devices:
        layout.main, layout.offloads_cpu = torch_device(devices.pop()), False
    layout.find_sources(state_dict, offload_dir, offload_index, prefetch_blocks)
    layout.carry_out(skip_keys, with_hooks=with_hooks)
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]
    return model


def cpu_offload(
    model: nn.Module,
    execution_device: Placed | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    preload_module_classes: str | Sequence[str] | None = None,
) -> nn.Module:
    """Keep all parameters in CPU memory (`state_dict`, if given), and bring those of a module to `execution_device`
    (that of the first parameter, if not given) while it runs. `model` is changed and returned; when its hooks are
    removed, parameters come back to where they were, with the values of `state_dict`."""
    layout = _layout_of_one_device(model, "cpu", execution_device, offload_buffers, preload_module_classes)
    layout.find_sources(state_dict, None, None, 0)
    layout.carry_out(None, with_hooks=True)
    return model


def disk_offload(
    model: nn.Module,
    offload_dir: PathLike,
    execution_device: Placed | None = None,
    offload_buffers: bool = False,
    preload_module_classes: str | Sequence[str] | None = None,
    prefetch_blocks: int = NUM_BLOCKS_AHEAD,
) -> nn.Module:
    """Write all parameters that are in memory to `offload_dir`, and read each block's while it runs.

    They are written to offloaded.safetensors, in place of one that is there. Parameters on the meta device are read
    from where they are: from the checkpoint that load_checkpoint_in_model left them in, or else from an
    offloaded.safetensors that is in `offload_dir` already; no other file there is looked at. `model` is changed and
    returned; when its hooks are removed, parameters come back to where they were, to the CPU from a checkpoint.
    """
    check_prefetch_blocks(prefetch_blocks)
    layout = _layout_of_one_device(model, "disk", execution_device, offload_buffers, preload_module_classes)
    layout.find_sources(None, offload_dir, None, prefetch_blocks)
    layout.carry_out(None, with_hooks=True)
    return model


def check_prefetch_blocks(prefetch_blocks: int) -> None:
    """Raise SettingsError for what is no number of blocks."""
    if isinstance(prefetch_blocks, bool) or not isinstance(prefetch_blocks, int) or prefetch_blocks < 0:
        raise SettingsError(
            f"prefetch_blocks is {prefetch_blocks!r}: give the number of blocks to read ahead, 0 to read none ahead"
        )


def _layout_of_one_device(
    model: nn.Module,
    device: str,
    execution_device: Placed | None,
    offload_buffers: bool,
    preload: str | Sequence[str] | None,
) -> Layout:
    main = torch_device(_device_of_first_tensor(model) if execution_device is None else execution_device)
    if main.type == "meta":
        main = torch.device("cpu")
    check_devices({"execution_device": main})
    return Layout(model, {"": device}, main, offload_buffers, class_names(preload), offloads_cpu=True)


def _device_of_first_tensor(model: nn.Module) -> torch.device:
    """Where the first parameter (or else buffer) is, or was before it was offloaded."""
    every = list(slots(model))
    first = next((slot for slot in every if not slot.is_buffer), every[0] if every else None)
    if first is None:
        return torch.device("cpu")
    held = offloaded_in(model)[1].get((id(first.owner), first.leaf))
    return first.tensor.device if held is None else held.parked.home


def _main_device(device_map: Mapping[str, Placed], given: Placed | None) -> torch.device:
    if given is not None:
        check_devices({"main_device": given})
        if given == "disk":
            raise DeviceMapError("main_device is 'disk', where nothing runs: use 'cpu' or a GPU number")
        return torch_device(given)
    found = (device for device in device_map.values() if not is_memory_or_disk(device))
    return torch_device(next(found, "cpu"))
