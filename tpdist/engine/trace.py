"""When a rank does what: a line of JSON for each part of each step, to be drawn as a timeline.

Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share. Without a file nothing is measured.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class Trace:
    """Writes to rank-N.jsonl in `folder`, which must exist; None: nowhere."""

    def __init__(self, folder: Path | None, *, rank: int) -> None:
        self._rank = rank
        self._file: TextIO | None = None if folder is None else (folder / f"rank-{rank}.jsonl").open("w", buffering=1)

    @contextmanager
    def span(self, name: str, *, step: int, num_tokens: int) -> Iterator[None]:
        """Measure what is done meanwhile."""
        if self._file is None:
            yield
            return
        begin = time.monotonic()
        yield
        event = {"rank": self._rank, "step": step, "name": name, "begin": begin, "end": time.monotonic()}
        self._file.write(json.dumps({**event, "num_tokens": num_tokens}) + "\n")
