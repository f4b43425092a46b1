"""`python -m tpdist.preflight.model_files`: whether a model can be read on this machine, and how fast.

A process of its own, because a file system that does not answer stops whoever asks it; its caller can kill it.
"""

import mmap
import os
import signal
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import msgspec

from tpdist.checkpoint.index import CheckpointIndex, check_names, model_fingerprint, weight_files
from tpdist.checkpoint.resolve import resolve_model
from tpdist.errors import CheckpointError, TpdistError
from tpdist.models import registry
from tpdist.parent import follow_parent
from tpdist.preflight.words import ModelFound

BLOCK_BYTES = 8 * 1024 * 1024
MOST_BYTES = 1024**3
READ_S = 2.0


def examine_model(model: str, *, revision: str | None = None) -> ModelFound:
    """Check config and headers of a folder or a Hugging Face id (downloaded unless it is in the cache), and read a
    part of its largest file. Raises TpdistError."""
    folder = resolve_model(model, revision=revision, progress=False)
    config = registry.load_config(folder)
    index = CheckpointIndex.read(folder)
    check_names(index, registry.weights(config))
    largest = max(weight_files(folder), key=lambda file: file.stat().st_size)
    num_bytes, seconds, from_disk = read_speed(largest)
    return ModelFound(
        folder=str(folder),
        total_bytes=index.total_bytes,
        read_bytes=num_bytes,
        read_s=seconds,
        from_disk=from_disk,
        digests=dict(model_fingerprint(folder)),
    )


def read_speed(file: Path, *, most_bytes: int = MOST_BYTES, most_s: float = READ_S) -> tuple[int, float, bool]:
    """Read the beginning of a file: bytes, seconds, and whether past the page cache."""
    descriptor, direct = _open(file)
    try:
        return *_timed(descriptor, most_bytes, most_s), direct
    finally:
        os.close(descriptor)


def _open(file: Path) -> tuple[int, bool]:
    """Past the page cache if the file system can do that: then neither does a warm cache flatter the disk, nor does
    the reading push anything out of it."""
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT), True
    except OSError:
        return os.open(file, os.O_RDONLY), False


def _timed(descriptor: int, most_bytes: int, most_s: float) -> tuple[int, float]:
    """Direct reads want aligned memory, which an anonymous mapping is."""
    done = 0
    with mmap.mmap(-1, BLOCK_BYTES) as block:
        started = time.perf_counter()
        while done < most_bytes and time.perf_counter() - started < most_s:
            count = os.preadv(descriptor, [block], done)
            done += count
            if count < BLOCK_BYTES:
                break
        return done, time.perf_counter() - started


def main() -> int:
    """Print what was found as JSON; or say on stderr what is wrong, and return the exit code of its kind."""
    parser = ArgumentParser(prog="python -m tpdist.preflight.model_files", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--revision")
    parser.add_argument("--parent-pid", type=int, required=True, help="this process ends with it")
    arguments = parser.parse_args()
    follow_parent(arguments.parent_pid, signal.SIGKILL)
    try:
        found = examine_model(arguments.model, revision=arguments.revision)
    except TpdistError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"cannot read {arguments.model}: {error}", file=sys.stderr)
        return CheckpointError.exit_code
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
