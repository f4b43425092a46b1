"""The greedy placement of a model's modules, module by module and device by device, with Accelerate's results.

infer_auto_device_map gives the dict that Accelerate 1.15 gives, in its order, except where that would repeat a fault:

- A group of tied parameters concerns a module if one of its names is the module's or in it, by whole parts of the name.
  Accelerate looks for the module's name anywhere in the text, and takes "layers.10.weight" to be in "0".
- A module that is split leaves its own buffers behind in Accelerate, and its map says nothing of them. Here they follow
  the module's children.
- Tied parameters that were placed before, or that stand alone after their module was split, end Accelerate with an
  IndexError; sizes with bools in them end its fallback allocation with an AttributeError.
- What stands twice in one module ends it with an IndexError too, or has a device under its first name only, which
  check_device_map refuses. Here the other names follow, on the device of the first.
- Accelerate's order of modules that are joined again (clean_result) and of tied groups is that of a Python set, another
  one in every process. Here both come in the order of the model.

auto.py has the planner that is exact.
"""

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from tpdist.bigmodel.device_map import add_second_names, clean_device_map
from tpdist.bigmodel.devices import Device, MaxMemory
from tpdist.bigmodel.memory import get_max_memory
from tpdist.bigmodel.sizes import (
    Dtype,
    Part,
    class_names,
    compute_module_sizes,
    compute_module_total_buffer_size,
    direct_parts,
    get_max_layer_size,
    is_whole,
)
from tpdist.bigmodel.tied import find_tied_parameters, is_within, warn_if_not_tied

log = logging.getLogger(__name__)


def infer_auto_device_map(
    model: nn.Module,
    max_memory: Mapping[Device, float | str] | None = None,
    no_split_module_classes: str | Iterable[str] | None = None,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> dict[str, Device]:
    """Where each module goes: GPUs first, then the CPU, then the disk, greedily and in the order of the model.

    The first GPU and the CPU keep room for the largest layer that is still to be placed. `fallback_allocation` looks
    for a smaller module for a device that could take none; `verbose` prints each decision. See the module's docstring
    for what differs from Accelerate.
    """
    memory = get_max_memory(max_memory)
    tied = find_tied_parameters(model)
    warn_if_not_tied(model, tied)
    sizes = compute_module_sizes(model, dtype=dtype, special_dtypes=special_dtypes)
    walk = _Walk(model, memory, sizes, class_names(no_split_module_classes), tied, verbose, fallback_allocation)
    walk.run()
    add_second_names(model, walk.device_map)
    if not offload_buffers:
        buffers = {
            device: sum(compute_module_total_buffer_size(part, dtype, special_dtypes) for part in parts)
            for device, parts in walk.modules_on.items()
        }
        warn_of_buffers(memory, walk.used, buffers)
    return clean_device_map(walk.device_map) if clean_result else walk.device_map


def main_devices(memory: Iterable[Device]) -> list[Device]:
    """The devices that keep room for the largest layer that is offloaded below them."""
    gpus = [device for device in memory if device not in ("cpu", "disk")]
    return ["mps"] if "mps" in gpus else [*gpus[:1], "cpu"]


@dataclass
class _Walk:
    """The state of the placement. What is not placed yet is in `pending`, next part first."""

    model: nn.Module
    memory: MaxMemory
    sizes: dict[str, int]
    no_split: list[str]
    tied: list[list[str]]
    verbose: bool
    fallback: bool
    device_map: dict[str, Device] = field(default_factory=dict)
    used: dict[Device, int] = field(default_factory=dict)
    modules_on: dict[Device, list[nn.Module]] = field(default_factory=dict)
    found: set[tuple[Device, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.devices = [*self.memory, *(["disk"] if "disk" not in self.memory else [])]
        self.main_devices = main_devices(self.memory)
        self.used = dict.fromkeys(self.devices, 0)
        self.pending: list[Part] = direct_parts("", self.model)
        self.largest, self.largest_names = get_max_layer_size(self.pending, self.sizes, self.no_split)

    def run(self) -> None:
        while self.pending:
            name, part = self.pending.pop(0)
            self._forget_layer(name)
            if not self._place(name, part):
                self._make_room(name, part)

    def _place(self, name: str, part: nn.Module | Tensor) -> bool:
        """Put a part and those that are tied to it on the current device, if they fit."""
        limit, needed = self._limit(), self._size_with_ties(name)
        device = self.devices[0]
        if limit is not None and self.used[device] + needed > limit:
            return False
        self._say(f"{name} ({needed} bytes) goes to {device}, of which {self.used[device]} of {limit} bytes are used")
        self.used[device] += needed
        self.device_map[name] = device
        for other, _ in self._tied_parts(name):
            self.pending = [pending for pending in self.pending if pending[0] != other]
            self.device_map[other] = device
        if isinstance(part, nn.Module):
            self.modules_on.setdefault(device, []).append(part)
        return True

    def _make_room(self, name: str, part: nn.Module | Tensor) -> None:
        """What to do with a part that does not fit: split one that is tied to it, split it, give the device a smaller
        one, or go on to the next device."""
        limit = self._limit()
        assert limit is not None, "the disk takes everything"
        free = limit - self.used[self.devices[0]]
        self._say(f"{name} does not fit on {self.devices[0]}: {self._size_with_ties(name)} bytes, {free} are free")
        if self._tied_names(name) and self.sizes[name] <= free and self._split_tied_part(name, part):
            return
        if self.sizes[name] >= free and isinstance(part, nn.Module) and not is_whole(part, self.no_split):
            self._say(f"splitting {name}")
            self.pending[:0] = direct_parts(name, part)
            self._find_largest_layer()
            return
        if not (self.fallback and self.used[self.devices[0]] == 0 and self._take_smaller_part(name, part)):
            self._next_device(name, part)

    def _next_device(self, name: str, part: nn.Module | Tensor) -> None:
        device = self.devices.pop(0)
        reserved = self.largest if device in self.main_devices else 0
        if self.used[device] == 0:
            log.info("%s gets nothing: %s needs %s bytes there", device, name, self._size_with_ties(name) + reserved)
        self.used[device] += reserved
        self.pending.insert(0, (name, part))

    def _split_tied_part(self, name: str, part: nn.Module | Tensor) -> bool:
        """Replace the first part that is tied to this one, and can be split, by its own parts."""
        for other, tied_part in self._tied_parts(name):
            if isinstance(tied_part, nn.Module) and not is_whole(tied_part, self.no_split):
                self._say(f"splitting {other}, which is tied to {name}")
                place = [pending for pending, _ in self.pending].index(other)
                self.pending[place : place + 1] = direct_parts(other, tied_part)
                self.pending.insert(0, (name, part))
                self._find_largest_layer()
                return True
        return False

    def _take_smaller_part(self, name: str, part: nn.Module | Tensor) -> bool:
        """Find a part among the pending ones that fits on the current, empty device, and make it the next.

        A part that did not fit after all, because of others that are tied to it, is not found again for this device.
        """
        room = self.memory[self.devices[0]] - max(self.largest, self._size_with_ties(name))
        found = self._first_that_fits(room) if room >= 0 else None
        if found is None or (self.devices[0], found[0]) in self.found:
            return False
        self.found.add((self.devices[0], found[0]))
        for parent in _ancestors(found[0]):
            names = [pending for pending, _ in self.pending]
            if parent in names:
                place = names.index(parent)
                module = self.pending[place][1]
                assert isinstance(module, nn.Module)
                self.pending[place : place + 1] = direct_parts(parent, module)
        place = [pending for pending, _ in self.pending].index(found[0])
        self.pending = [found, (name, part), *self.pending[:place], *self.pending[place + 1 :]]
        return True

    def _first_that_fits(self, room: int) -> Part | None:
        """Parts in order, each before what it is made of."""
        searched = list(self.pending)
        while searched:
            name, part = searched.pop(0)
            if self._size_with_ties(name, among=searched) <= room:
                return name, part
            if isinstance(part, nn.Module) and not is_whole(part, self.no_split):
                searched[:0] = direct_parts(name, part)
        return None

    def _limit(self) -> int | None:
        """Bytes that parts may take of the current device; None for the disk."""
        device = self.devices[0]
        if device == "disk":
            return None
        return self.memory[device] - (self.largest if device in self.main_devices else 0)

    def _tied_names(self, name: str) -> list[str]:
        """The parameters outside of a part that are tied to one inside."""
        outside = ([tied for tied in group if not is_within(tied, name)] for group in self.tied)
        return [
            tied for names, group in zip(outside, self.tied, strict=True) if len(names) < len(group) for tied in names
        ]

    def _tied_parts(self, name: str, among: Sequence[Part] | None = None) -> list[Part]:
        return [part for _, part in self._tied_pairs(name, self.pending if among is None else among)]

    def _tied_pairs(self, name: str, parts: Sequence[Part]) -> list[tuple[str, Part]]:
        """Each parameter that is tied to a part, with the pending part that holds it."""
        pairs = (
            (tied, next((part for part in parts if is_within(tied, part[0])), None)) for tied in self._tied_names(name)
        )
        return [(tied, part) for tied, part in pairs if part is not None]

    def _size_with_ties(self, name: str, among: Sequence[Part] | None = None) -> int:
        """Bytes of a part and of all pending parts that are tied to it; the tied parameters count once."""
        pairs = self._tied_pairs(name, self.pending if among is None else among)
        return self.sizes[name] + sum(self.sizes[part] - self.sizes[tied] for tied, (part, _) in pairs)

    def _forget_layer(self, name: str) -> None:
        """A part that is being placed needs no reserve any more, nor do the layers in it."""
        self.largest_names = [layer for layer in self.largest_names if not is_within(layer, name)]
        if not self.largest_names:
            self._find_largest_layer()

    def _find_largest_layer(self) -> None:
        modules = [part for part in self.pending if isinstance(part[1], nn.Module)]
        self.largest, self.largest_names = get_max_layer_size(modules, self.sizes, self.no_split)

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text)


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def warn_of_buffers(memory: MaxMemory, used: Mapping[Device, int], buffers: Mapping[Device, int]) -> None:
    """Buffers of offloaded layers stay on the GPU that runs them, beside the bytes that a plan counts there."""
    needed = buffers.get("cpu", 0) + buffers.get("disk", 0)
    gpus = [device for device in memory if device not in ("cpu", "disk")]
    if needed and gpus and all(memory[gpu] < needed + used.get(gpu, 0) for gpu in gpus):
        text = f"buffers of offloaded layers take {needed} bytes, more than any GPU has left: use offload_buffers=True"
        warnings.warn(text, UserWarning, stacklevel=3)
