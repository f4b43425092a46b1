"""Where the tensors of offloaded modules are while they do not compute: in memory, or in safetensors files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tpdist.bigmodel.prefetch import Prefetcher
from tpdist.checkpoint.header import TensorEntry
from tpdist.checkpoint.tensors import TensorReader
from tpdist.errors import CheckpointError


class BadCheckpointError(CheckpointError, ValueError, RuntimeError):
    """A checkpoint that is missing, damaged, or another model's; a ValueError and a RuntimeError too, since Accelerate
    raises the one or the other."""


class Source(Protocol):
    """Gives the tensors of one module at a time. A deep copy of a model shares it."""

    def fetch(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """At least these tensors, by their names in the model. They may be shared: nobody writes to them."""
        ...


class MemorySource:
    """Tensors that stay in memory, by their names in the model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def fetch(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        return {name: self._tensors[name] for name in names}

    def __deepcopy__(self, memo: object) -> "MemorySource":
        return self


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, the type that the model wants it in, and its block."""

    entry: TensorEntry
    dtype: torch.dtype
    block: str


class DiskSource:
    """Tensors in files, by their names in the model, read block by block and some blocks ahead.

    A block has one buffer; besides those of the current block and of the ones ahead, one more is kept for the next.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        *,
        ahead: int,
        pinned: bool = False,
        reader: TensorReader | None = None,
    ) -> None:
        self._stored = stored
        self._block_of = {name: tensor.block for name, tensor in stored.items()}
        blocks: dict[str, list[tuple[str, StoredTensor]]] = {}
        for name, tensor in stored.items():
            blocks.setdefault(tensor.block, []).append((name, tensor))
        if reader is None:
            reader = TensorReader(spare_buffers=ahead + 2, pinned=pinned)
        self._reader = reader
        reader.open({tensor.entry.file for tensor in stored.values()})
        # Not a method: the thread that runs it must not keep this object, nor the Prefetcher, alive.
        self._prefetcher = Prefetcher(list(blocks), lambda block: _read(reader, blocks[block]), ahead=ahead)

    def fetch(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        blocks = dict.fromkeys(self._block_of[name] for name in names)
        tensors: dict[str, Tensor] = {}
        for block in blocks:
            tensors |= self._prefetcher.take(block)
        return tensors

    def of(self, names: Sequence[str], *, ahead: int) -> "DiskSource":
        """A source of some of these tensors, in the files that are open already, whatever has become of their names."""
        return DiskSource({name: self._stored[name] for name in names}, ahead=ahead, reader=self._reader)

    def settle(self) -> None:
        """Wait until nothing is being read ahead."""
        self._prefetcher.settle()

    def __deepcopy__(self, memo: object) -> "DiskSource":
        return self


@torch.inference_mode(False)
def _read(reader: TensorReader, tensors: Iterable[tuple[str, StoredTensor]]) -> dict[str, Tensor]:
    """Tensors of one block, in the types that the model wants; a tensor under several names is read once."""
    wanted = dict(tensors)
    values = reader.read(list({stored.entry: None for stored in wanted.values()}))
    return {name: values[stored.entry.name].to(stored.dtype) for name, stored in wanted.items()}


def check_shape(entry: TensorEntry, *, name: str, shape: Sequence[int]) -> None:
    if entry.shape != tuple(shape):
        raise BadCheckpointError(
            f"tensor {entry.name} of {entry.file} has shape {list(entry.shape)}, but {name} of the model has shape "
            f"{list(shape)}: the checkpoint is of another model"
        )
