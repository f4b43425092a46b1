"""Whole tensors of safetensors files, for modules that are not models of ours: finding, reading and writing them.

Files are read with plain reads into memory of our own, not mapped: a file that is cut short while it is in use is an
error that names it, not the end of the process. Nothing here, or anywhere, reads a pickle.
"""

import json
import os
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tpdist.checkpoint.header import TensorEntry, read_header
from tpdist.checkpoint.index import INDEX_NAME, CheckpointIndex
from tpdist.errors import CheckpointError

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX_SUFFIX = ".safetensors.index.json"
# Tensors start at multiples of this in memory, so that arithmetic on them is as fast as on any others.
ALIGNMENT = 64


def find_tensors(checkpoint: Path) -> CheckpointIndex:
    """What a checkpoint holds: a folder, a *.safetensors file, or the index (*.json) of several files.

    Raises CheckpointError, naming the file, if there is none or it is damaged, and for checkpoints that are pickles.
    """
    if checkpoint.is_dir():
        others = sorted(checkpoint.glob("*" + INDEX_SUFFIX))
        if len(others) == 1 and others[0].name != INDEX_NAME and not (checkpoint / "model.safetensors").exists():
            return find_tensors(others[0])
        if not any(checkpoint.glob("*.safetensors")):
            raise _no_safetensors(checkpoint)
        return CheckpointIndex.read(checkpoint)
    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint} does not exist: give a folder, a *.safetensors file, or an index *.json")
    if checkpoint.name == INDEX_NAME:
        return CheckpointIndex.read(checkpoint.parent)
    if checkpoint.suffix == ".json":
        return _of_files(checkpoint.parent, _files_of_index(checkpoint))
    if checkpoint.suffix != ".safetensors":
        raise _refused(checkpoint) if checkpoint.suffix in PICKLES else _no_safetensors(checkpoint)
    return _of_files(checkpoint.parent, [checkpoint])


def _no_safetensors(path: Path) -> CheckpointError:
    files = sorted(path.iterdir()) if path.is_dir() else []
    if pickles := [file for file in files if file.suffix in PICKLES]:
        return _refused(pickles[0])
    return CheckpointError(f"{path} is no safetensors checkpoint: give a folder, a *.safetensors file, or its index")


def _refused(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickle, which can run any code when it is read: convert the checkpoint to safetensors first "
        f"(for example with transformers' save_pretrained, where you trust its origin)"
    )


def _files_of_index(index: Path) -> list[Path]:
    """The files of an index of any name, which is an object of tensor to file names, or has one as weight_map."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content.get("weight_map", content)
        names = sorted({str(file) for file in weight_map.values()})
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{index} holds no weight_map of tensor to file names: {error!r}") from error
    for name in names:
        if Path(name).suffix in PICKLES:
            raise _refused(index.parent / name)
        if Path(name).name != name:
            raise CheckpointError(f"{index} names the file {name!r}, which is not directly in its folder")
    return [index.parent / name for name in names]


def _of_files(folder: Path, files: Iterable[Path]) -> CheckpointIndex:
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(file):
            if other := tensors.get(entry.name):
                raise CheckpointError(f"tensor {entry.name} is in both {other.file} and {file}")
            tensors[entry.name] = entry
    return CheckpointIndex(folder, tensors)


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """Raises CheckpointError for a type that torch has no word for."""
    if entry.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"tensor {entry.name} of {entry.file} has dtype {entry.dtype}, which cannot be read: convert the "
            f"checkpoint to one of {', '.join(TORCH_DTYPES)}"
        )
    return TORCH_DTYPES[entry.dtype]


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Write a safetensors file in place of one that may be there, and return what it holds. Tensors come to the CPU
    and lie one after another; readers of the old file keep what they have open. Raises CheckpointError, also for a type
    that the format has no word for."""
    for name, tensor in tensors.items():
        if tensor.dtype not in TORCH_DTYPES.values():
            raise CheckpointError(
                f"tensor {name} has dtype {tensor.dtype}, which {file} cannot hold: convert it to a type of "
                f"safetensors, such as float32 or complex64, or keep it in memory"
            )
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(_apart(tensors), temporary, metadata={"format": "pt"})
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return {entry.name: entry for entry in read_header(file)}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own, as the format wants it."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = _plain(tensor)
        address = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if address in seen else plain
        seen.add(address)
    return found


def _plain(tensor: Tensor) -> Tensor:
    plain = tensor.detach().to("cpu").contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


class TensorReader:
    """Reads tensors of any files, from any thread. Each file is opened once, and closed with the reader.

    `spare_buffers`: how many buffers are kept for the next reads once nothing uses their tensors any more; a reader
    that reads one block after another then touches no new memory. With `pinned`, tensors are ready for asynchronous
    copies to a GPU, and torch keeps the buffers.
    """

    def __init__(self, *, spare_buffers: int = 0, pinned: bool = False) -> None:
        self._pinned = pinned
        self._files: dict[Path, int] = {}
        # Its methods are atomic, which a lock would not be here: buffers come back whenever the collector runs.
        self._spare: deque[np.ndarray[Any, np.dtype[np.uint8]]] = deque(maxlen=spare_buffers)
        weakref.finalize(self, _close, self._files)

    def open(self, files: Iterable[Path]) -> None:
        """Open files now: what happens to their names later does not matter any more. Raises CheckpointError."""
        for file in files:
            if file not in self._files:
                try:
                    self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error

    def read(self, entries: Sequence[TensorEntry]) -> dict[str, Tensor]:
        """The tensors by name, in one piece of memory. Raises CheckpointError, naming tensor and file."""
        self.open(entry.file for entry in entries)
        starts, size = [], 0
        for entry in entries:
            starts.append(size)
            size += -(-entry.num_bytes // ALIGNMENT) * ALIGNMENT
        buffer = self._buffer(size)
        found: dict[str, Tensor] = {}
        for entry, start in sorted(zip(entries, starts, strict=True), key=lambda pair: (pair[0].file, pair[0].start)):
            values = buffer[start : start + entry.num_bytes]
            self._fill(values, entry)
            found[entry.name] = values.view(torch_dtype(entry)).reshape(entry.shape)
        return found

    def _fill(self, values: Tensor, entry: TensorEntry) -> None:
        memory = memoryview(values.numpy())  # type: ignore[arg-type, unused-ignore]
        done = 0
        try:
            while done < entry.num_bytes:
                count = os.preadv(self._files[entry.file], [memory[done:]], entry.start + done)
                if count == 0:
                    raise CheckpointError(
                        f"tensor {entry.name} of {entry.file} ends after {done} of {entry.num_bytes} bytes: the file "
                        f"was cut short while it was in use; restore it and load the model again"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"tensor {entry.name} of {entry.file} cannot be read: {error.strerror}") from error

    def _buffer(self, num_bytes: int) -> Tensor:
        """Bytes that nothing else uses, aligned."""
        if self._pinned:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        memory = self._take_spare(num_bytes)
        start = -memory.ctypes.data % ALIGNMENT
        view = memory[start : start + num_bytes]
        if self._spare.maxlen:
            # torch holds `view` as long as any tensor uses it: when it goes, its memory is free again.
            weakref.finalize(view, self._spare.append, memory).atexit = False
        return torch.from_numpy(view)

    def _take_spare(self, num_bytes: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """A spare buffer that is large enough; the others go behind, and the oldest out when a new one comes back."""
        for _ in range(len(self._spare)):
            try:
                memory = self._spare.popleft()
            except IndexError:
                break
            if memory.nbytes >= num_bytes + ALIGNMENT:
                return memory
            self._spare.append(memory)
        return np.empty(num_bytes + ALIGNMENT, np.uint8)


def _close(files: dict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])
