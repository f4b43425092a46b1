"""The exact placement of a model's modules: what search.py finds, as a device map.

A model that fits on the GPUs is never spilled. Each device holds one run of modules that follow each other: of all such
placements the best is found (search.py has what is wanted, and in which order), for the GPUs in the order of their
numbers, and, where that order spills, in every other order too, up to MAX_ORDERS different ones (all for five GPUs;
equal ones count as one). Where all of these spill, the GPUs may hold modules from several places of the model: if any
such placement is found that spills nothing (packing.py), it is taken.

Modules are split only where a border between devices falls into them. Tied parameters stay together, with the modules
that hold them, at the place of the first, and count once.
"""

from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from tpdist.bigmodel.device_map import add_second_names, clean_device_map
from tpdist.bigmodel.devices import Device, MaxMemory
from tpdist.bigmodel.greedy import warn_of_buffers
from tpdist.bigmodel.memory import get_max_memory
from tpdist.bigmodel.packing import pack
from tpdist.bigmodel.search import Piece, place_in_best_order
from tpdist.bigmodel.sizes import (
    Dtype,
    as_dtype,
    class_names,
    direct_parts,
    is_whole,
    joined,
    loaded_byte_size,
    special_types,
)
from tpdist.bigmodel.tied import find_tied_parameters, warn_if_not_tied


@dataclass
class _Unit:
    """What is never split, or several of them that must stay together. `num_bytes` counts a tensor at the first unit
    that has it; `layer_bytes` is what the largest layer of the unit needs to run."""

    names: list[str]
    num_bytes: int
    layer_bytes: int
    parameters: set[int] = field(default_factory=set)


def auto_device_map(
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
    """Where each module goes so that the fast devices hold as much as they can; infer_auto_device_map's signature.

    Without `no_split_module_classes`, those of the model's `_no_split_modules`. `fallback_allocation` changes nothing:
    what fits on the GPUs in any arrangement goes there. The map is in the order of the model. Buffers
    count with their modules, although those of offloaded modules stay on the main device without `offload_buffers`: a
    warning says so if no GPU has room for them.
    """
    return best_device_map(
        model,
        [get_max_memory(max_memory)],
        no_split_classes(model, no_split_module_classes),
        dtype=dtype,
        special_dtypes=special_dtypes,
        verbose=verbose,
        clean_result=clean_result,
        offload_buffers=offload_buffers,
    )


def best_device_map(
    model: nn.Module,
    options: Sequence[MaxMemory],
    no_split: Sequence[str],
    *,
    dtype: Dtype | None = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
) -> dict[str, Device]:
    """The map for the first of these memories that spills least; what is to be said in the log is said of it alone."""
    warn_if_not_tied(model, find_tied_parameters(model))
    units = _units(model, list(no_split), _Sizes(dtype, special_dtypes))
    placements = [_placed(units, memory) for memory in options]
    best = min(range(len(options)), key=lambda option: _spilled(units, placements[option]))
    placed = placements[best]
    if not offload_buffers:
        _warn_if_buffers_have_no_room(model, options[best], units, placed)
    if verbose:
        for unit, device in zip(units, placed, strict=True):
            print(f"{', '.join(unit.names)} ({unit.num_bytes} bytes) goes to {device}")
    where = {name: device for unit, device in zip(units, placed, strict=True) for name in unit.names}
    add_second_names(model, where)
    device_map = {name: where[name] for name in _in_model_order(model, where)}
    cleaned = clean_device_map(device_map) if clean_result else device_map
    return {name: cleaned[name] for name in _in_model_order(model, cleaned)}


def _spilled(units: list[_Unit], placed: list[Device]) -> tuple[int, int]:
    """Bytes on the disk, and on the CPU."""
    sums = dict[Device, int]()
    for unit, device in zip(units, placed, strict=True):
        sums[device] = sums.get(device, 0) + unit.num_bytes
    return sums.get("disk", 0), sums.get("cpu", 0)


def _placed(units: list[_Unit], memory: MaxMemory) -> list[Device]:
    gpus = [device for device in memory if device not in ("cpu", "disk")]
    devices: list[Device] = [*gpus, "cpu", "disk"]
    numbers = _numbers(units, [memory[gpu] for gpu in gpus], memory.get("cpu", 0))
    return [devices[number] for number in numbers]


def _numbers(units: list[_Unit], gpu_bytes: list[int], cpu_bytes: int) -> list[int]:
    """The number of each unit's device: the GPUs, the CPU, the disk. What takes no bytes fits on the first."""
    if not any(unit.num_bytes for unit in units):
        return [0] * len(units)
    pieces = [
        # A buffer that several layers share counts once, but is in each of them.
        Piece(unit.num_bytes, min(unit.layer_bytes, unit.num_bytes), _common_modules(before, unit))
        for before, unit in pairwise([_Unit([""], 0, 0), *units])
    ]
    numbers = place_in_best_order(pieces, gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes)
    if max(numbers) < len(gpu_bytes):
        return numbers
    return pack([unit.num_bytes for unit in units], gpu_bytes) or numbers


def _warn_if_buffers_have_no_room(
    model: nn.Module, memory: MaxMemory, units: list[_Unit], placed: list[Device]
) -> None:
    used: dict[Device, int] = {}
    buffers: dict[Device, int] = {}
    for unit, device in zip(units, placed, strict=True):
        used[device] = used.get(device, 0) + unit.num_bytes
        tensors = (buffer for name in unit.names for buffer in _buffers(model, name))
        buffers[device] = buffers.get(device, 0) + sum(tensor.nbytes for tensor in tensors)
    warn_of_buffers(memory, used, buffers)


def _buffers(model: nn.Module, name: str) -> list[Tensor]:
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    if isinstance(buffer := owner._buffers.get(leaf), Tensor):
        return [buffer]
    return [] if leaf in owner._parameters else list(model.get_submodule(name).buffers())


def no_split_classes(model: nn.Module, given: str | Iterable[str] | None) -> list[str]:
    """The classes that a user named, or else those that the model names itself."""
    return class_names(getattr(model, "_no_split_modules", None) if given is None else given)


class _Sizes:
    """Bytes of tensors once they are loaded. A bool takes a byte, whatever compute_module_sizes says."""

    def __init__(self, dtype: Dtype | None, special_dtypes: Mapping[str, Dtype] | None) -> None:
        self._dtype = None if dtype is None else as_dtype(dtype)
        self._special = special_types(special_dtypes)

    def of(self, name: str, tensor: Tensor) -> int:
        if tensor.dtype == torch.bool and name not in self._special:
            return tensor.numel()
        size = loaded_byte_size(tensor, name=name, dtype=self._dtype, special_dtypes=self._special)
        return -int(-tensor.numel() * size // 1)


def _units(model: nn.Module, no_split: list[str], sizes: _Sizes) -> list[_Unit]:
    """The model in pieces that hold something, in order."""
    counted: set[int] = set()
    units = [_unit(name, part, sizes, counted) for name, part in _whole_parts("", model, no_split)]
    return _join_empty(_join_tied(units))


def _whole_parts(name: str, part: nn.Module | Tensor, no_split: list[str]) -> Iterable[tuple[str, nn.Module | Tensor]]:
    if not isinstance(part, nn.Module) or is_whole(part, no_split):
        yield name, part
        return
    for child_name, child in direct_parts(name, part):
        yield from _whole_parts(child_name, child, no_split)


def _unit(name: str, part: nn.Module | Tensor, sizes: _Sizes, counted: set[int]) -> _Unit:
    tensors: dict[str, Tensor] = {"": part} if isinstance(part, Tensor) else {}
    if isinstance(part, nn.Module):
        tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    num_bytes = layer_bytes = 0
    for leaf, tensor in tensors.items():
        size = sizes.of(joined(name, leaf), tensor)
        layer_bytes += size
        if id(tensor) not in counted:
            num_bytes += size
            counted.add(id(tensor))
    parameters = {id(tensor) for tensor in tensors.values() if isinstance(tensor, nn.Parameter)}
    return _Unit([name], num_bytes, layer_bytes, parameters)


def _join_tied(units: list[_Unit]) -> list[_Unit]:
    """Units that share parameters become one, at the place of the first."""
    joined: dict[int, _Unit] = {}
    owner: dict[int, int] = {}
    for place_of, unit in enumerate(units):
        places = sorted({owner[parameter] for parameter in unit.parameters if parameter in owner})
        target = places[0] if places else place_of
        joined.setdefault(target, _Unit([], 0, 0))
        for other in (*(joined.pop(later) for later in places[1:]), unit):
            _add(joined[target], other)
        owner.update(dict.fromkeys(joined[target].parameters, target))
    return [joined[place_of] for place_of in sorted(joined)]


def _add(unit: _Unit, other: _Unit) -> None:
    unit.names += other.names
    unit.num_bytes += other.num_bytes
    unit.layer_bytes = max(unit.layer_bytes, other.layer_bytes)
    unit.parameters |= other.parameters


def _join_empty(units: list[_Unit]) -> list[_Unit]:
    """Units without bytes (an activation function, for example) go with the neighbour that they share more modules
    with, so that none of them splits a module for nothing. If nothing has bytes, they stay."""
    full = [place_of for place_of, unit in enumerate(units) if unit.num_bytes]
    if not full:
        return units
    for place_of, unit in enumerate(units):
        if not unit.num_bytes:
            following = bisect(full, place_of)
            neighbours = [full[max(0, following - 1)], full[min(following, len(full) - 1)]]
            nearest = max(neighbours, key=lambda other: _common_modules(units[other], units[place_of]))
            units[nearest].names += unit.names
    return [units[place_of] for place_of in full]


def _common_modules(unit: _Unit, other: _Unit) -> int:
    """How many modules hold both: what a border between the two would split."""
    pairs = zip(unit.names[0].split(".")[:-1], other.names[0].split(".")[:-1], strict=False)
    count = 0
    for left, right in pairs:
        if left != right:
            break
        count += 1
    return count


def _in_model_order(model: nn.Module, names: Mapping[str, Device]) -> Iterable[str]:
    pending: list[tuple[str, object]] = [("", model)]
    while pending:
        name, part = pending.pop()
        if name in names:
            yield name
        elif isinstance(part, nn.Module):
            # Not direct_parts, which has what stands twice once.
            parts = {**part._parameters, **part._modules, **part._buffers}
            pending += [(joined(name, leaf), parts[leaf]) for leaf in reversed(parts)]
