"""Loading a safetensors checkpoint into any module: each tensor straight to where it belongs, one after another.

What goes to the disk is not read at all, since it is on a disk already: dispatch.py reads it from there.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tpdist.bigmodel.align import Slot, like, slots
from tpdist.bigmodel.auto import best_device_map, no_split_classes
from tpdist.bigmodel.device_map import NUM_SHOWN, Placed, check_device_map, device_of
from tpdist.bigmodel.devices import Device, DeviceMapError, MaxMemory, torch_device
from tpdist.bigmodel.dispatch import NUM_BLOCKS_AHEAD, PathLike, check_prefetch_blocks, dispatch_model
from tpdist.bigmodel.greedy import infer_auto_device_map
from tpdist.bigmodel.memory import get_balanced_memory, get_max_memory
from tpdist.bigmodel.offload_files import remember_entries
from tpdist.bigmodel.sizes import Dtype, as_dtype, is_cast
from tpdist.bigmodel.sources import BadCheckpointError, check_shape
from tpdist.bigmodel.tied import find_tied_parameters, report_ties, warn_if_not_tied
from tpdist.checkpoint.header import TensorEntry
from tpdist.checkpoint.index import CheckpointIndex
from tpdist.checkpoint.tensors import TensorReader, find_tensors, torch_dtype
from tpdist.errors import CheckpointError, SettingsError

log = logging.getLogger(__name__)
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: PathLike,
    device_map: Mapping[str, Placed] | None = None,
    offload_folder: PathLike | None = None,
    dtype: Dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Sequence[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Fill the parameters and buffers of `model` from a safetensors checkpoint: a folder, a file, or an index.

    Each goes where `device_map` says, or stays where it is (the CPU, from meta). What goes to "disk" stays in the
    checkpoint, which must not change while the model is used: nothing is written, and `offload_folder` is not needed.
    Float tensors become `dtype` ("auto": the type of most of the checkpoint), or else what the model has; whole numbers
    and bools become nothing else. `keep_in_fp32_modules` counts with float16 only, as in Accelerate. Tensors are read
    one by one, so `offload_state_dict` changes nothing.

    Buffers that no state dict holds keep their values, even if the checkpoint has some for them.

    Raises CheckpointError for a checkpoint that is missing, damaged, a pickle, or of other shapes, and, if `strict`,
    for one that does not hold exactly the tensors of the model; else those are named in the log.
    """
    if offload_8bit_bnb or not full_state_dict or broadcast_from_rank0:
        raise SettingsError("offload_8bit_bnb, full_state_dict=False and broadcast_from_rank0 are not supported")
    index = _index_of(checkpoint)
    tied = find_tied_parameters(model)
    warn_if_not_tied(model, tied)
    if device_map is not None:
        check_device_map(model, device_map)
        report_ties(model, device_map)
    targets = _targets(model, index, strict=strict)
    wanted = loaded_dtype(index, dtype)
    kept = tuple(keep_in_fp32_modules or ()) if wanted == torch.float16 else ()
    loader = _Loader(device_map, wanted, kept, offload_buffers)
    loader.run(targets)
    remember_entries(model, loader.left_on_disk, loaded=loader.loaded)


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: PathLike,
    device_map: str | Mapping[str, Placed] | None = None,
    max_memory: Mapping[Device, float | str] | None = None,
    no_split_module_classes: str | Sequence[str] | None = None,
    offload_folder: PathLike | None = None,
    offload_buffers: bool = False,
    dtype: Dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: str | Sequence[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    prefetch_blocks: int = NUM_BLOCKS_AHEAD,
) -> nn.Module:
    """load_checkpoint_in_model, then dispatch_model, with a device map that may be a word; see there for the rest.

    "auto": the exact planner (auto.py) in memory that is balanced over the GPUs, unless a model would spill for it that
    has room in `max_memory` as it is.
    "balanced", "balanced_low_0", "sequential": Accelerate's greedy placement in balanced memory, in memory balanced
    without GPU 0, and in `max_memory` as it is. Without a map the model is loaded where it is, and not dispatched.
    """
    check_prefetch_blocks(prefetch_blocks)
    if isinstance(device_map, str):
        index = _index_of(checkpoint)
        no_split = no_split_classes(model, no_split_module_classes)
        wanted = loaded_dtype(index, dtype)
        device_map = named_device_map(model, device_map, max_memory, no_split, wanted, offload_buffers)
    load_checkpoint_in_model(
        model,
        checkpoint,
        device_map=device_map,
        offload_folder=offload_folder,
        dtype=dtype,
        offload_state_dict=bool(offload_state_dict),
        offload_buffers=offload_buffers,
        strict=strict,
        full_state_dict=full_state_dict,
        broadcast_from_rank0=broadcast_from_rank0,
    )
    if device_map is None:
        return model
    return dispatch_model(
        model,
        device_map=device_map,
        offload_dir=offload_folder,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=preload_module_classes,
        force_hooks=force_hooks,
        prefetch_blocks=prefetch_blocks,
        no_split_module_classes=no_split_module_classes,
    )


def named_device_map(
    model: nn.Module,
    name: str,
    max_memory: Mapping[Device, float | str] | None,
    no_split: Sequence[str],
    dtype: torch.dtype | None,
    offload_buffers: bool,
) -> dict[str, Device]:
    """The device map that a word stands for. Raises DeviceMapError for another word."""
    if name not in DEVICE_MAPS:
        raise DeviceMapError(
            f"device_map is {name!r}: use {', '.join(DEVICE_MAPS)}, or a dict of module names to devices"
        )
    if name == "sequential":
        return infer_auto_device_map(model, max_memory, no_split, dtype=dtype, offload_buffers=offload_buffers)
    low_zero = name == "balanced_low_0"
    balanced = get_balanced_memory(model, max_memory, no_split, dtype=dtype, low_zero=low_zero)
    if name != "auto":
        return infer_auto_device_map(model, balanced, no_split, dtype=dtype, offload_buffers=offload_buffers)
    options = (_capped(balanced), balanced, get_max_memory(max_memory))
    return best_device_map(model, options, no_split, dtype=dtype, offload_buffers=offload_buffers)


def _capped(balanced: MaxMemory) -> MaxMemory:
    """Balanced memory whose last GPU has no more than the others: it keeps all of its own, in case that the shares are
    too small, and the planner, which likes few GPUs, would put everything there."""
    gpus = [device for device in balanced if isinstance(device, int) and balanced[device] > 0]
    if len(gpus) < 2:
        return balanced
    return balanced | {gpus[-1]: min(balanced[gpus[-1]], max(balanced[gpu] for gpu in gpus[:-1]))}


def loaded_dtype(index: CheckpointIndex, dtype: Dtype | None) -> torch.dtype | None:
    """The type that floats are loaded as; None for what the model has. Raises DeviceMapError for a type of whole
    numbers, which would cut the weights off."""
    if dtype == "auto":
        return None if index.dtype is None else as_dtype(index.dtype)
    if dtype is None:
        return None
    wanted = as_dtype(dtype)
    if not wanted.is_floating_point:
        raise DeviceMapError(f"dtype {wanted} cannot hold weights: use a floating type, as torch.float16, or 'auto'")
    return wanted


def _index_of(checkpoint: PathLike) -> CheckpointIndex:
    try:
        return find_tensors(Path(checkpoint))
    except CheckpointError as error:
        raise BadCheckpointError(str(error)) from error


def _targets(model: nn.Module, index: CheckpointIndex, *, strict: bool) -> list[tuple[TensorEntry, list[Slot]]]:
    """Each tensor of the checkpoint that the model has, with all its places, in file order. A parameter that stands at
    several places is read once, under the first of its names that the checkpoint holds: those of non-persistent buffers
    do not count."""
    groups: dict[int, list[Slot]] = {}
    aliases: dict[int, list[str]] = {}
    for slot in slots(model):
        groups.setdefault(id(slot.tensor), []).append(slot)
    for path, owner in model.named_modules(remove_duplicate=False):
        for slot in slots(owner, prefix=path, recurse=False):
            if slot.is_stored:
                aliases.setdefault(id(slot.tensor), []).append(slot.name)
    persistent = {id(value) for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)}
    found: list[tuple[TensorEntry, list[Slot]]] = []
    missing: list[str] = []
    for key, places in groups.items():
        names = aliases.get(key, [])
        entry = next((index.tensors[name] for name in names if name in index.tensors), None)
        if entry is not None:
            check_shape(entry, name=places[0].name, shape=places[0].tensor.shape)
            found.append((entry, places))
        elif names and key in persistent:
            missing.append(names[0])
    known = {name for names in aliases.values() for name in names}
    _report(model, index, missing, [name for name in index.tensors if name not in known], strict=strict)
    return sorted(found, key=lambda target: (target[0].file, target[0].start))


def _report(
    model: nn.Module, index: CheckpointIndex, missing: Sequence[str], unexpected: Sequence[str], *, strict: bool
) -> None:
    """Name what the checkpoint and the model do not share: an error if `strict`, else a line in the log."""
    problems = [
        f"{len(names)} tensors of the {whose} are not in the {other}: {', '.join(names[:NUM_SHOWN])}"
        for whose, other, names in (("model", "checkpoint", missing), ("checkpoint", "model", unexpected))
        if names
    ]
    if not problems:
        return
    text = f"{index.folder} and {type(model).__name__} differ: {'; '.join(problems)}"
    if strict:
        raise BadCheckpointError(text)
    log.warning("%s", text)


class _Loader:
    """Reads tensors and puts them where they go. `left_on_disk`: the entries that were not read, by name; `loaded`: the
    names of the others."""

    def __init__(
        self,
        device_map: Mapping[str, Placed] | None,
        dtype: torch.dtype | None,
        kept_in_float32: Sequence[str],
        offload_buffers: bool,
    ) -> None:
        self._device_map = device_map
        self._dtype = dtype
        self._kept = kept_in_float32
        self._offload_buffers = offload_buffers
        self._reader = TensorReader()
        self.left_on_disk: dict[str, TensorEntry] = {}
        self.loaded: list[str] = []

    def run(self, targets: Sequence[tuple[TensorEntry, list[Slot]]]) -> None:
        for entry, places in targets:
            values: Tensor | None = None
            made: dict[str, Tensor] = {}
            for slot in places:
                device = self._device(slot)
                if device is None:
                    self.left_on_disk[slot.name] = entry
                else:
                    self.loaded.append(slot.name)
                    values = self._reader.read([entry])[entry.name] if values is None else values
                if str(device) not in made:
                    made[str(device)] = self._tensor(slot, entry, values, device)
                slot.put(made[str(device)])

    def _device(self, slot: Slot) -> torch.device | None:
        """Where a place's tensor goes; None for the disk. Buffers that are not offloaded wait on the CPU."""
        if self._device_map is None:
            device = slot.tensor.device
            return torch.device("cpu") if device.type == "meta" else device
        placed = device_of(slot.name, self._device_map)
        if placed != "disk":
            return torch_device(placed)
        stays = slot.is_buffer and not (self._offload_buffers and slot.is_stored)
        return torch.device("cpu") if stays else None

    def _tensor(self, slot: Slot, entry: TensorEntry, values: Tensor | None, device: torch.device | None) -> Tensor:
        """What stands at a place from now on; without values, a placeholder of the right type."""
        old = slot.tensor
        dtype = self._dtype_of(entry, old)
        if self._device_map is None and old.device == device and dtype == old.dtype:
            assert values is not None
            old.detach().copy_(values)
            return old
        if self._dtype is not None and not is_cast(stored := torch_dtype(entry)):
            dtype = stored
        if device is None:
            return like(torch.empty_like(old, dtype=dtype, device="meta"), old)
        assert values is not None
        return like(values.to(dtype).to(device), old)

    def _dtype_of(self, entry: TensorEntry, old: Tensor) -> torch.dtype:
        if self._dtype is None or not is_cast(old.dtype):
            return old.dtype
        # Accelerate's rule: the end of a name counts too, "norm" is also "layernorm".
        is_kept = any(f"{name}." in entry.name or name == entry.name for name in self._kept)
        return torch.float32 if is_kept else self._dtype
