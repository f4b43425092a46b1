"""What goes where in a model that is dispatched, and making it so: the work behind dispatch.py.

Every module with tensors of its own gets a hook (align.py) that moves its inputs to where it runs, and brings what is
offloaded of it for the time that it runs. Files are read block by block, ahead (prefetch.py): a block is a module of a
class that the model says is never split, or else a single module's own tensors.
"""

import os
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpdist.bigmodel.align import AlignDevicesHook, Offloaded, Parked, Slot, Turns, like, offloaded_in, slots
from tpdist.bigmodel.auto import no_split_classes
from tpdist.bigmodel.device_map import NUM_SHOWN, Placed, device_of, key_of
from tpdist.bigmodel.devices import DeviceMapError, is_memory_or_disk, torch_device
from tpdist.bigmodel.guard import guard_against_moves
from tpdist.bigmodel.hooks import add_hook_to_module, remove_hook_from_submodules
from tpdist.bigmodel.offload_files import OffloadIndex, disk_entries
from tpdist.bigmodel.sources import DiskSource, MemorySource, Source, StoredTensor, check_shape


@dataclass
class Layout:
    """What goes where in one model. `offloads_cpu`: what the map puts on the CPU is offloaded, wherever it runs.

    First find_sources, which changes nothing in the model, then carry_out. A model may be dispatched already: `_held`
    is what its hooks offload, whose values are where those say.
    """

    model: nn.Module
    device_map: Mapping[str, Placed]
    main: torch.device
    offload_buffers: bool
    preload: list[str]
    offloads_cpu: bool = False
    offloaded: dict[str, Offloaded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.offloads_cpu |= self.main.type not in ("cpu", "mps")
        self.slots = list(slots(self.model))
        self.no_split = no_split_classes(self.model, None)
        self._hooks, self._held = offloaded_in(self.model)
        self._sources: list[tuple[list[Slot], Source]] = []
        self._kept: dict[str, Offloaded] = {}

    def find_sources(
        self,
        state_dict: Mapping[str, Tensor] | None,
        offload_dir: str | os.PathLike[str] | None,
        offload_index: Mapping[str, Any] | None,
        prefetch_blocks: int,
    ) -> None:
        """Find out where everything comes from, and write what is to be on the disk; the model stays as it is."""
        offloaded = [slot for slot in self.slots if self._is_offloaded(slot)]
        on_disk = [slot for slot in offloaded if self._device(slot) == "disk"]
        in_memory = [slot for slot in offloaded if self._device(slot) != "disk"]
        given, index = state_dict or {}, offload_index or {}
        _check_values(self.model, [slot for slot in in_memory if slot.name not in given and not self._has_value(slot)])
        _check_values(self.model, [slot for slot in self._rest() if not self._has_value(slot)])
        in_memory = self._keep(in_memory, MemorySource, but=given)
        on_disk = self._keep(on_disk, DiskSource, but=index)
        self._reopen(prefetch_blocks)
        read: dict[int, Tensor] = {}
        if in_memory:
            self._sources.append((in_memory, MemorySource(self._memory(in_memory, given, read))))
        if on_disk:
            folder = None if offload_dir is None else Path(offload_dir)
            written = [slot for slot in on_disk if slot.name not in index and self._has_value(slot)]
            values = {slot.name: self._value(slot, read) for slot in written}
            entries = disk_entries(self.model, on_disk, values=values, folder=folder, index=index)
            self._sources.append((on_disk, self._disk_source(on_disk, entries, prefetch_blocks)))

    def carry_out(self, skip_keys: str | Sequence[str] | None, *, with_hooks: bool) -> None:
        """Take away the hooks that are there, put everything where it belongs, and attach the new ones."""
        for hook in self._hooks:
            hook.forget()
        remove_hook_from_submodules(self.model)
        self._park()
        self._place_the_rest()
        if with_hooks:
            self._attach_hooks(skip_keys)
            guard_against_moves(self.model)

    def _place_the_rest(self) -> None:
        """Move all other tensors to where they run. A parameter that stands at several places stays one."""
        moved: dict[tuple[int, torch.device], tuple[object, Tensor]] = {}
        for slot in self._rest():
            held, device = self._held.get(_key(slot)), self._execution_device(slot)
            if held is None and slot.tensor.device == device:
                continue
            # What the key is of is kept too: another at its address would be taken for it.
            one = slot.tensor if held is None else held.parked
            if (id(one), device) not in moved:
                old = self._value(slot, {})
                new = old if old.device == device else like(old.detach().to(device), old)
                moved[id(one), device] = (one, new)
            slot.put(moved[id(one), device][1])

    def _attach_hooks(self, skip_keys: str | Sequence[str] | None) -> None:
        if skip_keys is None:
            skip_keys = getattr(self.model, "_skip_keys_device_placement", None)
        hooked = list(self._hooked_modules())
        num_hooks = Counter(_key(item.slot) for _, _, items in hooked for item in items)
        # A module that is hooked in a preloaded one has its tensors from there: nobody may run it by itself meanwhile.
        shared = Turns()
        for name, module, items in hooked:
            turns = shared if any(num_hooks[_key(item.slot)] > 1 for item in items) else Turns()
            device = self._module_device(name, module)
            hook = AlignDevicesHook(device, items, io_same_device=not name, skip_keys=skip_keys, turns=turns)
            add_hook_to_module(module, hook)

    def _rest(self) -> list[Slot]:
        return [slot for slot in self.slots if not self._is_offloaded(slot)]

    def _is_offloaded(self, slot: Slot) -> bool:
        device = self._device(slot)
        if device != "disk" and not (self.offloads_cpu and is_memory_or_disk(device)):
            return False
        return not slot.is_buffer or (self.offload_buffers and slot.is_stored)

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
        of each. A module of a preload class takes all that is in it too."""
        offloaded = {_key(item.slot): item for item in self.offloaded.values()}
        for name, module in self.model.named_modules():
            own = list(slots(module, prefix=name, recurse=type(module).__name__ in self.preload))
            # By place and not by name: a module that stands at several has the name of the first.
            items = [offloaded[_key(slot)] for slot in own if _key(slot) in offloaded]
            if not name or own or name in self.device_map or _is_encoder(self.model, module):
                yield name, module, items

    def _has_value(self, slot: Slot) -> bool:
        return slot.tensor.device.type != "meta" or _key(slot) in self._held

    def _value(self, slot: Slot, read: dict[int, Tensor]) -> Tensor:
        """A place's tensor; `read` has those that had to be taken from their sources, by what is offloaded."""
        held = self._held.get(_key(slot))
        if held is None:
            return slot.tensor
        if id(held.parked) not in read:
            read[id(held.parked)] = held.restored(torch.device("cpu"))
        return read[id(held.parked)]

    def _keep(self, places: Sequence[Slot], kind: type[Source], *, but: Container[str]) -> list[Slot]:
        """Leave what is offloaded in this way already where it is, except for some names; returns the others."""
        for slot in places:
            held = self._held.get(_key(slot))
            if held is not None and isinstance(held.source, kind) and slot.name not in but:
                self._kept[slot.name] = held
        return [slot for slot in places if slot.name not in self._kept]

    def _reopen(self, ahead: int) -> None:
        """Read the files that are kept as is wanted now. A name may be another file's by now: they are open still."""
        kept = [(name, item, item.source) for name, item in self._kept.items()]
        names: dict[int, list[str]] = {}
        for _, item, source in kept:
            names.setdefault(id(source), []).append(item.slot.name)
        again: dict[int, Source] = {}
        for name, item, source in kept:
            if isinstance(source, DiskSource):
                if id(source) not in again:
                    again[id(source)] = source.of(names[id(source)], ahead=ahead)
                self._kept[name] = replace(item, source=again[id(source)])

    def _memory(
        self, places: Sequence[Slot], state_dict: Mapping[str, Tensor], read: dict[int, Tensor]
    ) -> dict[str, Tensor]:
        """Tensors on the CPU by name. A parameter that stands at several places is copied to the CPU once."""
        copies: dict[int, Tensor] = {}
        found: dict[str, Tensor] = {}
        for slot in places:
            value = state_dict[slot.name] if slot.name in state_dict else self._value(slot, read)
            if value.shape != slot.tensor.shape:
                raise DeviceMapError(
                    f"{slot.name} of state_dict has shape {list(value.shape)}, but {slot.name} of the model has shape "
                    f"{list(slot.tensor.shape)}: give the state dict of this model"
                )
            if value.device.type == "meta":
                _check_values(self.model, [slot])
            if id(value) not in copies:
                copies[id(value)] = value.detach().to("cpu")
            found[slot.name] = copies[id(value)]
        return found

    def _disk_source(self, places: Sequence[Slot], entries: OffloadIndex, ahead: int) -> DiskSource:
        blocks = _blocks(self.model, self.no_split)
        stored: dict[str, StoredTensor] = {}
        for slot in places:
            entry, dtype = entries[slot.name]
            check_shape(entry, name=slot.name, shape=slot.tensor.shape)
            stored[slot.name] = StoredTensor(entry, dtype or slot.tensor.dtype, blocks[id(slot.owner)])
        return DiskSource(stored, ahead=ahead, pinned=self.main.type == "cuda")

    def _park(self) -> None:
        """Take what is offloaded out of the model, and remember where it comes from."""
        self.offloaded |= self._kept
        parked: dict[int, Parked] = {}
        for places, source in self._sources:
            for slot in places:
                old, held = slot.tensor, self._held.get(_key(slot))
                if id(old) not in parked:
                    home = old.device if held is None else held.parked.home
                    parked[id(old)] = _park(old, home, slot.name, source)
                self.offloaded[slot.name] = Offloaded(slot, source, parked[id(old)])
        # Only now, since ids are those of other tensors once the old ones are gone.
        for item in self.offloaded.values():
            item.slot.put(item.placeholder)


def _key(slot: Slot) -> tuple[int, str]:
    return id(slot.owner), slot.leaf


def _park(old: Tensor, home: torch.device, name: str, source: Source) -> Parked:
    """The tensor itself is kept only where that takes no memory: the source holds the same."""
    if old.device.type == "meta":
        return Parked(old, torch.device("cpu") if home.type == "meta" else home, None)
    kept = isinstance(source, MemorySource) and _is_same_memory(source.fetch([name])[name], old)
    return Parked(like(old.detach().to("meta"), old), home, old if kept else None)


def _is_same_memory(left: Tensor, right: Tensor) -> bool:
    shapes = ((each.shape, each.stride(), each.storage_offset(), each.dtype) for each in (left, right))
    return left.untyped_storage()._cdata == right.untyped_storage()._cdata and next(shapes) == next(shapes)


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
