"""How values of options are written where they are neither a word nor a number: sizes, lists, maps, and files.

Each parser leaves what is not text alone, and raises ValueError with what was expected.
"""

import json
import re
import stat
from pathlib import Path

BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
NO_FILE = "no such file"
NAMED_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def parse_bytes(value: object) -> object:
    """Turn "4GiB", "500 MB" or "1.5e9" into a number of bytes."""
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", value.lower())
    if parts is None or parts[2] not in BYTE_UNITS:
        raise ValueError("must be a number of bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    return int(float(parts[1]) * BYTE_UNITS[parts[2]])


def parse_counts(value: object) -> object:
    """Turn "10,12" into (10, 12), each at least 1; "auto" stays as it is."""
    if isinstance(value, str):
        value = value if value.strip() == "auto" else value.split(",")
    if not isinstance(value, list | tuple):
        return value
    if not value or not all(re.fullmatch(r"\s*[1-9][0-9]*\s*", str(each)) for each in value):
        raise ValueError("must be whole numbers of at least 1 with commas between them, as 10,12")
    return tuple(int(each) for each in value)


def parse_device_map(value: object) -> object:
    """Turn a JSON object into a dict; the named maps stay as they are."""
    if not isinstance(value, str) or value in NAMED_DEVICE_MAPS:
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        names = ", ".join(NAMED_DEVICE_MAPS)
        raise ValueError(f'must be one of {names}, or a JSON object such as {{"model.layers.0": 0}}') from error


def parse_sizes(value: object) -> object:
    """Turn "0=20GiB,cpu=30GiB", or a dict with such sizes, into bytes by device; a plain number is a GPU's, and "auto"
    is what is free there, None."""
    if isinstance(value, str):
        pairs = [each.partition("=") for each in value.split(",")]
        if not all(name.strip() and size.strip() for name, _, size in pairs):
            raise ValueError("must be sizes by device, as 0=20GiB,cpu=30GiB")
        names = [name.strip() for name, _, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"has {twice[0]} twice")
        value = dict(zip(names, (size for _, _, size in pairs), strict=True))
    if not isinstance(value, dict):
        return value
    return {str(name): None if _is_auto(size) else parse_bytes(size) for name, size in value.items()}


def file_problem(path: Path) -> str:
    """Why it is no file that can be read; empty if it is one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return NO_FILE
    except OSError as error:
        return error.strerror or str(error)
    if stat.S_ISDIR(mode):
        return "a folder, not a file"
    return "" if stat.S_ISREG(mode) else "not a regular file"


def _is_auto(size: object) -> bool:
    return isinstance(size, str) and size.strip().lower() == "auto"
