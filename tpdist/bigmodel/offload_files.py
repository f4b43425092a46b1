"""Which tensors of which safetensors files stand for the parts of a model that are on the disk."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpdist.bigmodel.align import Slot
from tpdist.bigmodel.device_map import NUM_SHOWN
from tpdist.bigmodel.devices import DeviceMapError
from tpdist.bigmodel.sizes import as_dtype
from tpdist.bigmodel.sources import BadCheckpointError
from tpdist.checkpoint.header import TensorEntry, read_header
from tpdist.checkpoint.tensors import write_tensors

OffloadIndex = Mapping[str, tuple[TensorEntry, torch.dtype | None]]
OFFLOAD_FILE = "offloaded.safetensors"
# Where load_checkpoint_in_model leaves the entries of what it did not read, by name, for dispatch_model.
REMEMBERED = "_tpdist_offload_entries"


def remember_entries(model: nn.Module, entries: Mapping[str, TensorEntry], *, loaded: Iterable[str]) -> None:
    """Add to what earlier calls left on the disk, which is in memory now for the names in `loaded`."""
    left = dict(model.__dict__.get(REMEMBERED, {}))
    for name in loaded:
        left.pop(name, None)
    model.__dict__[REMEMBERED] = left | dict(entries)


def disk_entries(
    model: nn.Module,
    places: Sequence[Slot],
    *,
    values: Mapping[str, Tensor],
    folder: Path | None,
    index: Mapping[str, Any],
) -> OffloadIndex:
    """The tensor in a file for each of these places, and the type that it is wanted in (None: the place's).

    What is in memory (`values`, by name) is written to `folder`; the rest is looked up in `index`, then in the
    checkpoint that it was left in, then in what is in `folder` already. A name that is not there is looked for under
    the other names of its parameter. Raises DeviceMapError for what is nowhere, CheckpointError for files.
    """
    known: dict[str, tuple[TensorEntry, torch.dtype | None]] = {}
    known |= {name: (entry, None) for name, entry in _in_folder(folder).items()}
    known |= {name: (entry, None) for name, entry in model.__dict__.get(REMEMBERED, {}).items()}
    known |= _of_index(index)
    written = _write(values, folder)
    known |= {name: (entry, None) for name, entry in written.items()}
    aliases = _aliases(model)
    found = {slot.name: _first(known, aliases.get(slot.name, [slot.name])) for slot in places}
    if missing := [name for name, entry in found.items() if entry is None]:
        raise DeviceMapError(
            f"the device map puts {len(missing)} tensors on the disk that are in no file: "
            f"{', '.join(missing[:NUM_SHOWN])}; load the checkpoint with this device map, or give an offload_index"
        )
    return {name: entry for name, entry in found.items() if entry is not None}


def _first(known: OffloadIndex, names: Sequence[str]) -> tuple[TensorEntry, torch.dtype | None] | None:
    return next((known[name] for name in names if name in known), None)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each tensor, its own first."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    return {name: [name, *(other for other in group if other != name)] for group in names.values() for name in group}


def _in_folder(folder: Path | None) -> dict[str, TensorEntry]:
    file = None if folder is None else folder / OFFLOAD_FILE
    return {} if file is None or not file.is_file() else {entry.name: entry for entry in read_header(file)}


def _of_index(index: Mapping[str, Any]) -> OffloadIndex:
    """The entries of an offload_index: for each name its safetensors_file, and perhaps weight_name and dtype."""
    headers: dict[Path, dict[str, TensorEntry]] = {}
    found: dict[str, tuple[TensorEntry, torch.dtype | None]] = {}
    for name, where in index.items():
        if not isinstance(where, Mapping) or "safetensors_file" not in where:
            raise DeviceMapError(f"offload_index gives no safetensors_file for {name}; other formats are not read")
        file, stored_name = Path(where["safetensors_file"]), where.get("weight_name", name)
        if file not in headers:
            headers[file] = {entry.name: entry for entry in read_header(file)}
        if stored_name not in headers[file]:
            raise BadCheckpointError(f"{file} holds no tensor {stored_name}, though offload_index says so of {name}")
        dtype = as_dtype(where["dtype"]) if "dtype" in where else None
        found[name] = (headers[file][stored_name], dtype)
    return found


def _write(values: Mapping[str, Tensor], folder: Path | None) -> dict[str, TensorEntry]:
    """Write values to the folder, and return what stands for each name; a parameter that stands at several places is
    written once, under its first name."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, value in values.items():
        unique.setdefault(id(value), (name, value))
    found = dict(unique.values())
    if found and folder is None:
        raise DeviceMapError(
            f"the device map puts {len(found)} tensors on the disk that are in memory: "
            f"{', '.join(list(found)[:NUM_SHOWN])}; give a folder to write them to (offload_dir or offload_folder)"
        )
    if folder is None or not found:
        return {}
    entries = write_tensors(folder / OFFLOAD_FILE, found)
    return {name: entries[unique[id(value)][0]] for name, value in values.items()}
