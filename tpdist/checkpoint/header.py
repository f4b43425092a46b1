"""The header of a safetensors file: which tensors it holds, of which types and shapes, and where their bytes lie.

Read here without torch and checked before anything trusts it: a truncated or damaged file is an error that names it.
The format: eight bytes with the length of the header, the header as JSON, then the tensors' bytes one after another
(https://github.com/huggingface/safetensors). Knows no other file of a checkpoint.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tpdist.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
# Bytes per element. A type that is not here may stand in a file; its size cannot be checked.
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint. `start` and `stop` are byte offsets in `file`; `dtype` is the format's name of it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_header(file: Path) -> tuple[TensorEntry, ...]:
    """The tensors of one safetensors file in the order of their bytes.

    Raises CheckpointError, naming the file and the tensor, unless every byte of the file is accounted for exactly once.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file} is damaged or truncated: its header is {length} bytes long by its first eight bytes, "
                    f"the file {size} bytes"
                )
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    header = _parse(file, text)
    entries = [_entry(file, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_layout(file, entries, 8 + length, size)
    return tuple(entries)


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is damaged: its header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a name that stands in it twice would hide a tensor."""
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{repeated!r} stands in it twice")
    return values


def _entry(file: Path, name: str, value: object, data_start: int) -> TensorEntry:
    """A tensor of the header, checked by itself. `data_start` is the offset of the first tensor byte in the file."""
    problem = f"{file} is damaged: tensor {name!r}"
    if not name.isprintable():
        raise CheckpointError(f"{problem} has a name with unprintable characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{problem} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{problem} has dtype {dtype!r}, shape {shape!r} and data_offsets {offsets!r}")
    size = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
    if offsets[0] > offsets[1] or (dtype in ITEM_BYTES and offsets[1] - offsets[0] != size):
        raise CheckpointError(f"{problem} of shape {shape} and dtype {dtype} needs {size} bytes, has offsets {offsets}")
    return TensorEntry(name, file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(file: Path, entries: Sequence[TensorEntry], data_start: int, size: int) -> None:
    """Tensors must lie one after another, without holes, up to the end of the file."""
    stop = max((entry.stop for entry in entries), default=data_start)
    if stop != size:
        word = "truncated" if size < stop else "longer than its header says"
        raise CheckpointError(f"{file} is {word}: it has {size} bytes, its header describes {stop}")
    if entries and entries[0].start != data_start:
        raise CheckpointError(f"{file} is damaged: no tensor owns its first {entries[0].start - data_start} bytes")
    for before, after in pairwise(entries):
        if before.stop != after.start:
            raise CheckpointError(
                f"{file} is damaged: tensor {before.name!r} ends at byte {before.stop}, {after.name!r} starts at "
                f"{after.start}"
            )
