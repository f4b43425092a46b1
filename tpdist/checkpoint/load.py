"""Copies one rank's slices of a checkpoint into its model: only those, in file order, on several threads.

The files are mapped into memory: a slice is a view of the page cache, and the copy into the parameter is the only one.
Large slices are copied a few rows at a time, which keeps all threads busy and the temporaries of device copies small.
Knows neither which slices a rank holds (plan/shards.py) nor what the model computes.
"""

import ctypes
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tpdist.checkpoint.header import ITEM_BYTES, TensorEntry
from tpdist.checkpoint.index import CheckpointIndex
from tpdist.errors import CheckpointError
from tpdist.plan.shards import Partition, Weights, WeightSpec, local_shape, slices

CHUNK_BYTES = 16 * 1024 * 1024

Progress = Callable[[int, int], None]


@runtime_checkable
class Fused(Protocol):
    """A module whose parameters are made of several tensors of the checkpoint."""

    def part_view(self, leaf: str, part: int) -> Tensor:
        """Where one part of the parameter `leaf` goes."""
        ...


@runtime_checkable
class Finishing(Protocol):
    """A module that wants to know when a parameter is complete, to pack it for example."""

    def finish_loading(self, leaf: str) -> None: ...


@dataclass(frozen=True)
class Copy:
    """Some rows of a slice of a checkpoint tensor, and the view of a parameter that they go to, of the same shape."""

    entry: TensorEntry
    source: tuple[slice, ...]
    target: Tensor

    @property
    def num_bytes(self) -> int:
        return self.target.numel() * ITEM_BYTES[self.entry.dtype]


def load_weights(
    model: nn.Module,
    *,
    index: CheckpointIndex,
    weights: Weights,
    partition: Partition,
    rank: int,
    threads: int,
    progress: Progress,
    elsewhere: Collection[str] = (),
    finish: bool = True,
) -> int:
    """Fill every parameter of `model`, but for those that come from `elsewhere`, with the slices that `rank` of
    `partition` holds; return the bytes read.

    The index must have passed check_names. Values are converted to each parameter's dtype and device. `progress` gets
    the bytes done and their total, from one thread at a time. With `finish` modules pack what they have got; without,
    they can be filled again. Raises CheckpointError for a file that cannot be read.
    """
    _check_coverage(model, weights, elsewhere)
    copies = [copy for spec in weights.specs for copy in _copies(model, index, spec, partition, rank)]
    copies.sort(key=lambda copy: (copy.entry.file, copy.entry.start))
    total = sum(copy.num_bytes for copy in copies)
    _run(_Work(copies, total, progress), threads)
    del copies  # their targets are views of the parameters, which could not be freed
    if not finish:
        return total
    for module, leaf in dict.fromkeys(_owner(model, spec.parameter) for spec in weights.specs):
        if isinstance(module, Finishing):
            module.finish_loading(leaf)
    _release_free_memory()
    return total


class _Work:
    """The copies still to do, in order, shared by the threads.

    `_lock` guards `_pending` and `_done`, and is held while `progress` is called.
    """

    def __init__(self, copies: list[Copy], total: int, progress: Progress) -> None:
        self._pending: Iterator[Copy] = iter(copies)
        self._done = 0
        self._total = total
        self._progress = progress
        self._lock = threading.Lock()
        progress(0, total)

    def run(self) -> None:
        """Copy until nothing is pending. On an error nothing stays pending for the other threads."""
        with _Reader() as reader:
            try:
                while copy := self._take():
                    reader.copy(copy)
                    self._finished(copy)
            finally:
                self.stop()

    def stop(self) -> None:
        with self._lock:
            self._pending = iter(())

    def _take(self) -> Copy | None:
        with self._lock:
            return next(self._pending, None)

    def _finished(self, copy: Copy) -> None:
        with self._lock:
            self._done += copy.num_bytes
            self._progress(self._done, self._total)


class _Reader(ExitStack):
    """One thread's open file. Copies come in file order, so one is enough."""

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._file: Any = None

    def copy(self, copy: Copy) -> None:
        try:
            _read_ahead(copy)
            values = self._open(copy.entry.file).get_slice(copy.entry.name)[copy.source]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"tensor {copy.entry.name} of {copy.entry.file} cannot be read: {error}") from error
        copy.target.copy_(values)

    def _open(self, path: Path) -> Any:
        if path != self._path:
            self.close()
            self._file = self.enter_context(safe_open(path, framework="pt"))
            self._path = path
        return self._file


def _read_ahead(copy: Copy) -> None:
    """Ask the kernel for all rows at once: faults of a mapping alone read a cold file in small pieces, at half the
    speed."""
    row_bytes = copy.entry.num_bytes // copy.entry.shape[0]
    rows = copy.source[0]
    with copy.entry.file.open("rb") as file:
        start = copy.entry.start + rows.start * row_bytes
        os.posix_fadvise(file.fileno(), start, (rows.stop - rows.start) * row_bytes, os.POSIX_FADV_WILLNEED)


def _run(work: _Work, threads: int) -> None:
    """Work on it with so many threads; raise what the first one to fail raised, once all have stopped."""
    with ThreadPoolExecutor(threads, thread_name_prefix="load") as pool:
        try:
            futures = [pool.submit(work.run) for _ in range(threads)]
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            work.stop()
    for future in ended:
        future.result()


def _release_free_memory() -> None:
    """Give back what modules that packed their weights have freed. glibc would keep it, since ranks are started with
    high thresholds for returning memory (see rank_environment)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _copies(
    model: nn.Module, index: CheckpointIndex, spec: WeightSpec, partition: Partition, rank: int
) -> Iterator[Copy]:
    """One slice, as copies of whole rows of at most CHUNK_BYTES (or one row)."""
    module, leaf = _owner(model, spec.parameter)
    parameter = module.part_view(leaf, spec.part) if isinstance(module, Fused) else module.get_parameter(leaf)
    target = parameter.detach()
    shape = local_shape(spec, partition, rank)
    assert tuple(target.shape) == shape, f"{spec.parameter} part {spec.part}: {tuple(target.shape)}, expected {shape}"
    entry = index.tensors[spec.name]
    rows, *rest = slices(spec, partition, rank)
    row_bytes = math.prod(shape[1:]) * ITEM_BYTES[entry.dtype]
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        source = (slice(rows.start + start, rows.start + stop), *rest)
        yield Copy(entry, source, target[start:stop])


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    path, _, leaf = parameter.rpartition(".")
    return model.get_submodule(path), leaf


def mapped_tensor(entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    """A tensor of a checkpoint where it lies in its mapped file, which takes no memory but the kernel's cache; a copy
    if it has another dtype. Raises CheckpointError."""
    try:
        with safe_open(entry.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(entry.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"tensor {entry.name} of {entry.file} cannot be read: {error}") from error
    return tensor.to(dtype)


def _check_coverage(model: nn.Module, weights: Weights, elsewhere: Collection[str]) -> None:
    """Our own invariant: the table fills every parameter of the model, and nothing stays uninitialized."""
    parameters = {name for name, _ in model.named_parameters()} - set(elsewhere)
    filled = {spec.parameter for spec in weights.specs}
    assert parameters == filled, f"weight table and model differ in {sorted(parameters ^ filled)[:5]}"
