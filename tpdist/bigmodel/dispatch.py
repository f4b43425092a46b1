"""Making a model run whose modules are on several devices, in CPU memory, and on the disk.

Every module with tensors of its own gets a hook (align.py) that moves its inputs to where it runs, and brings what is
offloaded of it for the time that it runs. Files are read block by block, ahead (prefetch.py): a block is a module of a
class that the model says is never split, or else a single module's own tensors.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpdist.bigmodel.align import AlignDevicesHook, Offloaded, Slot, like, slots
from tpdist.bigmodel.auto import no_split_classes
from tpdist.bigmodel.device_map import NUM_SHOWN, Placed, check_device_map, device_of, key_of
from tpdist.bigmodel.devices import DeviceMapError, check_devices, is_memory_or_disk, torch_device
from tpdist.bigmodel.guard import guard_against_moves
from tpdist.bigmodel.hooks import add_hook_to_module, remove_hook_from_submodules
from tpdist.bigmodel.offload_files import OffloadIndex, disk_entries
from tpdist.bigmodel.sizes import class_names, get_non_persistent_buffers
from tpdist.bigmodel.sources import DiskSource, MemorySource, Source, StoredTensor, check_shape
from tpdist.bigmodel.tied import check_tied_parameters_on_same_device, find_tied_parameters

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
    Raises DeviceMapError for a map that does not fit the model or this machine, CheckpointError for files.
    """
    check_device_map(model, device_map)
    remove_hook_from_submodules(model)
    check_tied_parameters_on_same_device(find_tied_parameters(model), device_map)
    plan = _Plan(
        model, device_map, _main_device(device_map, main_device), offload_buffers, class_names(preload_module_classes)
    )
    devices = {str(device) if device == "disk" else str(torch_device(device)) for device in device_map.values()}
    if len(devices) == 1 and "disk" not in devices and not force_hooks:
        plan.main, plan.offloads_cpu = torch_device(devices.pop()), False
        plan.place_the_rest()
    else:
        plan.no_split = no_split_classes(model, no_split_module_classes)
        plan.offload(state_dict, offload_dir, offload_index, prefetch_blocks)
        plan.place_the_rest()
        plan.attach_hooks(skip_keys)
        guard_against_moves(model)
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
    (that of the first parameter, if not given) while it runs. `model` is changed and returned."""
    plan = _plan_for_one_device(model, "cpu", execution_device, offload_buffers, preload_module_classes)
    plan.offload(state_dict, None, None, 0)
    plan.place_the_rest()
    plan.attach_hooks(None)
    guard_against_moves(model)
    return model


def disk_offload(
    model: nn.Module,
    offload_dir: PathLike,
    execution_device: Placed | None = None,
    offload_buffers: bool = False,
    preload_module_classes: str | Sequence[str] | None = None,
    prefetch_blocks: int = NUM_BLOCKS_AHEAD,
) -> nn.Module:
    """Write all parameters that are in memory to `offload_dir`, as safetensors, and read each block's while it runs.

    Parameters on the meta device are read from files that are in `offload_dir`. `model` is changed and returned.
    """
    plan = _plan_for_one_device(model, "disk", execution_device, offload_buffers, preload_module_classes)
    plan.offload(None, offload_dir, None, prefetch_blocks)
    plan.place_the_rest()
    plan.attach_hooks(None)
    guard_against_moves(model)
    return model


def _plan_for_one_device(
    model: nn.Module,
    device: str,
    execution_device: Placed | None,
    offload_buffers: bool,
    preload: str | Sequence[str] | None,
) -> "_Plan":
    if execution_device is None:
        execution_device = next(iter(model.parameters())).device
    if torch_device(execution_device).type == "meta":
        execution_device = "cpu"
    check_devices({"execution_device": execution_device})
    remove_hook_from_submodules(model)
    main = torch_device(execution_device)
    return _Plan(model, {"": device}, main, offload_buffers, class_names(preload), offloads_cpu=True)


def _main_device(device_map: Mapping[str, Placed], given: Placed | None) -> torch.device:
    if given is not None:
        check_devices({"main_device": given})
        if given == "disk":
            raise DeviceMapError("main_device is 'disk', where nothing runs: use 'cpu' or a GPU number")
        return torch_device(given)
    found = (device for device in device_map.values() if not is_memory_or_disk(device))
    return torch_device(next(found, "cpu"))


@dataclass
class _Plan:
    """What goes where in one model. `offloads_cpu`: what the map puts on the CPU is offloaded, wherever it runs."""

    model: nn.Module
    device_map: Mapping[str, Placed]
    main: torch.device
    offload_buffers: bool
    preload: list[str]
    offloads_cpu: bool = False
    offloaded: dict[str, Offloaded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.offloads_cpu |= self.main.type not in ("cpu", "mps")
        self.non_persistent = get_non_persistent_buffers(self.model, recurse=True, fqns=True)
        self.slots = list(slots(self.model))
        self.no_split = no_split_classes(self.model, None)

    def offload(
        self,
        state_dict: Mapping[str, Tensor] | None,
        offload_dir: PathLike | None,
        offload_index: Mapping[str, Any] | None,
        prefetch_blocks: int,
    ) -> None:
        """Take what is offloaded out of the model, and remember where it comes from.

        Nothing is taken before all is known to be somewhere: after an error the model is as it was.
        """
        on_disk = [slot for slot in self.slots if self._is_offloaded(slot) and self._device(slot) == "disk"]
        in_memory = [slot for slot in self.slots if self._is_offloaded(slot) and self._device(slot) != "disk"]
        sources: list[tuple[list[Slot], Source]] = []
        if in_memory:
            sources.append((in_memory, MemorySource(self._memory(in_memory, state_dict or {}))))
        rest = [slot for slot in self.slots if not self._is_offloaded(slot)]
        _check_values(self.model, [slot for slot in rest if slot.tensor.device.type == "meta"])
        if on_disk:
            folder = None if offload_dir is None else Path(offload_dir)
            entries = disk_entries(self.model, on_disk, folder=folder, index=offload_index)
            sources.append((on_disk, self._disk_source(on_disk, entries, prefetch_blocks)))
        for places, source in sources:
            self._offload(places, source)

    def place_the_rest(self) -> None:
        """Move all other tensors to where they run. A parameter that stands at several places stays one."""
        rest = [slot for slot in self.slots if slot.name not in self.offloaded]
        _check_values(self.model, [slot for slot in rest if slot.tensor.device.type == "meta"])
        moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        for slot in rest:
            old, device = slot.tensor, self._execution_device(slot)
            if old.device != device:
                # The old one is kept too: another at its address would be taken for it.
                _, new = moved.setdefault((id(old), device), (old, like(old.detach().to(device), old)))
                slot.put(new)

    def attach_hooks(self, skip_keys: str | Sequence[str] | None) -> None:
        if skip_keys is None:
            skip_keys = getattr(self.model, "_skip_keys_device_placement", None)
        for name, module, items in self._hooked_modules():
            device = self._module_device(name, module)
            add_hook_to_module(module, AlignDevicesHook(device, items, io_same_device=not name, skip_keys=skip_keys))

    def _is_offloaded(self, slot: Slot) -> bool:
        device = self._device(slot)
        if device != "disk" and not (self.offloads_cpu and is_memory_or_disk(device)):
            return False
        return not slot.is_buffer or (self.offload_buffers and slot.name not in self.non_persistent)

    def _device(self, slot: Slot) -> Placed:
        return device_of(slot.name, self.device_map)

    def _execution_device(self, slot: Slot) -> torch.device:
        device = self._device(slot)
        return self.main if is_memory_or_disk(device) else torch_device(device)

    def _module_device(self, name: str, module: nn.Module) -> torch.device:
        """Where a module runs: as the map says of it, or else with its own first tensor."""
        if key_of(name, self.device_map) is None:
            own = next(slots(module, prefix=name, recurse=False), None)
            return self.main if own is None else self._execution_device(own)
        device = device_of(name, self.device_map)
        return self.main if is_memory_or_disk(device) else torch_device(device)

    def _hooked_modules(self) -> Iterator[tuple[str, nn.Module, list[Offloaded]]]:
        """The modules that need a hook: the top, those with tensors of their own or in the map, with what is offloaded
        of each. A module of a preload class takes all that is in it, and nothing below it has a hook."""
        done: set[str] = set()
        for name, module in self.model.named_modules():
            if any(name.startswith(above + ".") for above in done):
                continue
            whole = type(module).__name__ in self.preload
            own = list(slots(module, prefix=name, recurse=whole))
            items = [self.offloaded[slot.name] for slot in own if slot.name in self.offloaded]
            if whole and items:
                done.add(name)
            if not name or own or name in self.device_map or _is_encoder(self.model, module):
                yield name, module, items

    def _memory(self, places: Sequence[Slot], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors on the CPU by name. A parameter that stands at several places is copied to the CPU once."""
        copies: dict[int, Tensor] = {}
        found = {slot.name: state_dict.get(slot.name, slot.tensor).detach() for slot in places}
        _check_values(self.model, [slot for slot in places if found[slot.name].device.type == "meta"])
        for slot in places:
            value = state_dict.get(slot.name, slot.tensor)
            found[slot.name] = copies.setdefault(id(value), found[slot.name].to("cpu"))
        return found

    def _disk_source(self, places: Sequence[Slot], entries: OffloadIndex, ahead: int) -> DiskSource:
        blocks = _blocks(self.model, self.no_split)
        stored: dict[str, StoredTensor] = {}
        for slot in places:
            entry, dtype = entries[slot.name]
            check_shape(entry, name=slot.name, shape=slot.tensor.shape)
            stored[slot.name] = StoredTensor(entry, dtype or slot.tensor.dtype, blocks[id(slot.owner)])
        return DiskSource(stored, ahead=ahead, pinned=self.main.type == "cuda")

    def _offload(self, places: Sequence[Slot], source: Source) -> None:
        placeholders: dict[int, Tensor] = {}
        for slot in places:
            old = slot.tensor
            is_meta = old.device.type == "meta"
            placeholder = placeholders.setdefault(id(old), old if is_meta else like(old.detach().to("meta"), old))
            self.offloaded[slot.name] = Offloaded(slot, source, placeholder, None if is_meta else old)
        for slot in places:
            slot.put(self.offloaded[slot.name].placeholder)


def _blocks(model: nn.Module, no_split: Sequence[str]) -> dict[int, str]:
    """The block of each module's own tensors, by the module's id."""
    blocks: dict[int, str] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in no_split:
            for inner in module.modules():
                blocks.setdefault(id(inner), name)
        blocks.setdefault(id(module), name)
    return blocks


def _is_encoder(model: nn.Module, module: nn.Module) -> bool:
    """transformers calls the encoder of an encoder-decoder by itself, and expects a hook of a dispatched one."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return False
    return bool(model.get_encoder() is module)  # type: ignore[operator]


def _check_values(model: nn.Module, missing: Sequence[Slot]) -> None:
    """Raise DeviceMapError for tensors that should be somewhere, but have no values."""
    if missing:
        names = ", ".join(slot.name for slot in missing[:NUM_SHOWN])
        raise DeviceMapError(
            f"{len(missing)} tensors of {type(model).__name__} are on the meta device and have no values: {names}"
            f"{', ...' if len(missing) > NUM_SHOWN else ''}; load a checkpoint that holds them, tie what is tied "
            f"(tie_weights()), and build the model without include_buffers if they are buffers that no checkpoint holds"
        )
