"""A process that must not outlive its parent: the kernel tells it when the parent ends, however that ends."""

import ctypes
import os
import signal

from tpdist.errors import LostError

PR_SET_PDEATHSIG = 1


def follow_parent(parent_pid: int, number: signal.Signals) -> None:
    """Get signal `number` when the parent ends (Linux; elsewhere nothing happens). Raises LostError if it has ended
    already, and OSError if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl") and libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        raise LostError(f"the parent process {parent_pid} has ended")
