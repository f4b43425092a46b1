"""What a checkpoint folder holds, from the headers of its safetensors files, without torch.

Finds the files, joins their headers, compares them with the weight table of a model, and digests the folder so that
nodes can tell whether they have the same. Knows no model.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tpdist.checkpoint.header import TensorEntry, read_header
from tpdist.errors import CheckpointError
from tpdist.plan.shards import Weights

INDEX_NAME = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
NUM_SAMPLES = 16
SAMPLE_BYTES = 64 * 1024
# The types that a model weight may have, by their names in config.json.
WEIGHT_DTYPES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a checkpoint, by name, in the order of their files and of their bytes in each."""

    folder: Path
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def read(cls, folder: Path) -> "CheckpointIndex":
        """Read and check the header of every safetensors file that belongs to the checkpoint in `folder`.

        Raises CheckpointError, naming the file, if there is none, one is missing or damaged, or two hold one name.
        """
        tensors: dict[str, TensorEntry] = {}
        files = weight_files(folder)
        for file in files:
            for entry in read_header(file):
                if other := tensors.get(entry.name):
                    raise CheckpointError(f"tensor {entry.name} is in both {other.file} and {file}")
                tensors[entry.name] = entry
        _check_weight_map(folder, tensors)
        return cls(folder, tensors)

    @property
    def total_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def dtype(self) -> str | None:
        """The type, by its name in config.json, that most bytes of float weights have; None if there are none."""
        sizes: Counter[str] = Counter()
        for entry in self.tensors.values():
            if entry.dtype in WEIGHT_DTYPES:
                sizes[WEIGHT_DTYPES[entry.dtype]] += entry.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, by name: those that its index names, or else model.safetensors, or else
    every one in the folder."""
    if (folder / INDEX_NAME).exists():
        files = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    elif (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors file")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist, though {INDEX_NAME} names it")
    return tuple(files)


def model_fingerprint(folder: Path) -> dict[str, str]:
    """A digest of each part of the checkpoint: configuration, tokenizer and every weight file.

    A weight file stands for its size, its header and sixteen samples spread over its data: a fine-tune has the header
    of its base, and reading everything would take minutes. Raises CheckpointError if a file is missing or unreadable.
    """
    files = weight_files(folder)
    configs = [folder / name for name in CONFIG_FILES if (folder / name).is_file()]
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    try:
        parts = {path.name: _digest([path.read_bytes()]) for path in configs}
        if tokenizer:
            pieces = (piece for path in tokenizer for piece in (path.name.encode(), path.read_bytes()))
            parts["tokenizer"] = _digest(pieces)
        return parts | {file.name: _digest(_weight_samples(file)) for file in files}
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error


def check_names(index: CheckpointIndex, weights: Weights) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the tensors of `weights`, of these shapes and of a
    float type; the message names the first five that are wrong."""
    shapes = _expected_shapes(weights)
    problems = [
        *(f"{name} is missing" for name in shapes if name not in index.tensors),
        *(f"{name} in {index.tensors[name].file.name} is unknown" for name in _unknown(index, weights, shapes)),
        *(_problem(index.tensors[name], shape) for name, shape in shapes.items() if name in index.tensors),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        shown = "; ".join(problems[:5])
        raise CheckpointError(f"{index.folder} does not match its config.json in {len(problems)} tensors: {shown}")
    for unused, used in weights.tied:
        _check_tied(index.tensors.get(unused), index.tensors[used])


def _expected_shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the checkpoint; of parts that lie along one dimension the last one ends it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in weights.specs:
        shape = list(spec.shape)
        if spec.shape:
            shape[spec.dim] += spec.offset
        shapes[spec.name] = max(tuple(shape), shapes.get(spec.name, ()))
    return shapes


def _unknown(index: CheckpointIndex, weights: Weights, names: Iterable[str]) -> list[str]:
    known = set(names)
    return [
        name
        for name in index.tensors
        if name not in known and not any(re.fullmatch(pattern, name) for pattern in weights.ignorable)
    ]


def _problem(entry: TensorEntry, shape: tuple[int, ...]) -> str:
    """What is wrong with a tensor of the checkpoint, or nothing."""
    where = f"{entry.name} in {entry.file.name}"
    if entry.shape != shape:
        return f"{where} has shape {list(entry.shape)}, expected {list(shape)}"
    if entry.dtype not in WEIGHT_DTYPES:
        return f"{where} has dtype {entry.dtype}, supported are {', '.join(WEIGHT_DTYPES)}"
    return ""


def _check_tied(unused: TensorEntry | None, used: TensorEntry) -> None:
    """Two tensors that config.json declares to be one must look so where both exist: same type, shape, and bytes at
    both ends and in the middle."""
    if unused is None:
        return
    same_kind = (unused.dtype, unused.shape) == (used.dtype, used.shape)
    if not same_kind or _sample(unused) != _sample(used):
        raise CheckpointError(
            f"config.json sets tie_word_embeddings, but {unused.name} in {unused.file} differs from {used.name} "
            f"in {used.file}; set tie_word_embeddings to false"
        )


def _weight_samples(file: Path) -> list[bytes]:
    """The size of a weight file, its header, and samples at fixed places of its data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), size)
        header = stream.read(length)
    starts = (8 + length + i * max(0, size - 8 - length) // NUM_SAMPLES for i in range(NUM_SAMPLES))
    return [str(size).encode(), header, *_read(file, starts, size)]


def _sample(entry: TensorEntry) -> list[bytes]:
    starts = (entry.start, (entry.start + entry.stop) // 2, max(entry.start, entry.stop - SAMPLE_BYTES))
    return _read(entry.file, starts, entry.stop)


def _read(file: Path, starts: Iterable[int], stop: int) -> list[bytes]:
    """One sample from each of these byte offsets, none beyond `stop`."""
    pieces = []
    with file.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            pieces.append(stream.read(max(0, min(SAMPLE_BYTES, stop - start))))
    return pieces


def _digest(pieces: Iterable[bytes]) -> str:
    """Sixteen hexadecimal digits. The length of each piece counts too, so that no two lists of pieces look the same."""
    state = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        state.update(len(piece).to_bytes(8, "little"))
        state.update(piece)
    return state.hexdigest()


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to file name, as the folder's index says."""
    path = folder / INDEX_NAME
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no weight_map of tensor to file names: {error!r}") from error
    if outside := [file for file in names.values() if Path(file).name != file]:
        raise CheckpointError(f"{path} names the file {outside[0]!r}, which is not directly in the folder")
    return names


def _check_weight_map(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """The index, if there is one, must place every tensor where it is."""
    if not (folder / INDEX_NAME).exists():
        return
    expected = _weight_map(folder)
    actual = {name: entry.file.name for name, entry in tensors.items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise CheckpointError(
                f"{folder / INDEX_NAME} places tensor {name} in {expected.get(name)}, the files in {actual.get(name)}"
            )
