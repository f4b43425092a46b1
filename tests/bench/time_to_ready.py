"""Time from the start of `tpdist serve` until /readyz answers 200, on a random 1.1B bfloat16 checkpoint.

    python tests/bench/time_to_ready.py [--runs 3]

Each run also measures a plain read of the same file into new memory, so that the time can be compared with a limit of
the same machine at the same moment. The page cache is warm: the file is read once before.
"""

import time
from pathlib import Path

from measuring import Figure, alternate, model_folder, parser, ratio, served, show


def main() -> None:
    arguments = parser(__doc__ or "", runs=3).parse_args()
    with model_folder(arguments) as folder:
        plain_read_s(folder)
        flags = ("--threads", str(arguments.threads))
        measures = {"plain read": lambda: plain_read_s(folder), "ready": lambda: time_to_ready_s(folder, *flags)}
        measured = alternate(arguments.runs, measures)
    found = [
        Figure("plain read of the weights", measured["plain read"], "s"),
        Figure("time to ready", measured["ready"], "s"),
        ratio("time to ready over the plain read", measured["ready"], measured["plain read"]),
    ]
    show(found, as_json=arguments.json)


def plain_read_s(folder: Path) -> float:
    """Seconds to read the weights into newly allocated memory with one thread."""
    started = time.monotonic()
    for file in sorted(folder.glob("*.safetensors")):
        file.read_bytes()
    return time.monotonic() - started


def time_to_ready_s(folder: Path, *flags: str) -> float:
    """Start one node, wait for it, stop it."""
    started = time.monotonic()
    with served(folder, *flags):
        return time.monotonic() - started


if __name__ == "__main__":
    main()
