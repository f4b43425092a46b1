"""What the kernel grants the processes of this machine, read without starting anything."""

import resource
import shutil
from pathlib import Path

from tpdist.preflight.words import Limits

SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")


def limits(*, shared_memory: Path = SHARED_MEMORY, infiniband: Path = INFINIBAND) -> Limits:
    """Read now. A machine without /dev/shm has none of it."""
    return Limits(
        shm_bytes=shutil.disk_usage(shared_memory).total if shared_memory.is_dir() else 0,
        open_files=_soft(resource.RLIMIT_NOFILE),
        locked_bytes=_soft(resource.RLIMIT_MEMLOCK),
        infiniband=infiniband.is_dir() and any(infiniband.iterdir()),
    )


def _soft(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft
