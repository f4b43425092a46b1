"""The folder of a running node: its ipc sockets, and what its ranks note. It goes with the node; the folder of a node
that was killed goes when the next one starts.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tpdist.errors import SettingsError

PREFIX = "tpdist-"
LOCK = "lock"
# A node locks its folder just after it has made it: younger ones are left alone.
SETTLED_S = 60.0
MAX_SOCKET_PATH_BYTES = 107


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """A private folder, gone afterwards. Raises SettingsError when its path is too long for Unix sockets."""
    remove_abandoned(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    longest = len(os.fsencode(folder / "control.sock"))
    if longest > MAX_SOCKET_PATH_BYTES:
        folder.rmdir()
        raise SettingsError(
            f"TMPDIR={tempfile.gettempdir()} is too long for Unix sockets ({longest} bytes with the name of one, "
            f"at most {MAX_SOCKET_PATH_BYTES}); set TMPDIR to a shorter folder, such as /tmp"
        )
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders in `parent` of this user's nodes that were killed: nobody holds their locks."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or no node's, or held
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _is_settled(folder, os.fstat(descriptor)):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _is_settled(folder: Path, lock: os.stat_result) -> bool:
    """Whether it is a folder of this user, and no link to one, that is old enough for its node to have locked it."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and time.time() - lock.st_mtime > SETTLED_S
