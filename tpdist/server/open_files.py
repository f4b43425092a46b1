"""How many files and connections this process may have open. Knows nothing of what they are for."""

import logging
import resource

from tpdist.errors import SettingsError

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 65536
"""Also the most connections that strangers can open, each of which takes memory: no more, even where it is allowed."""
FEW_OPEN_FILES = 4096
TOO_FEW_OPEN_FILES = 128
"""With fewer a node's own sockets and pipes have no room, and ZeroMQ ends the process without a word."""


def set_open_file_limit() -> int:
    """Allow this process, and the ranks that it starts, MAX_OPEN_FILES, or as many as the machine's hard limit lets
    it. Returns the limit. Raises SettingsError if not even the node itself has room."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if limit < TOO_FEW_OPEN_FILES:
        raise SettingsError(
            f"this machine allows a process {limit} open files, and a node needs {TOO_FEW_OPEN_FILES} at least: raise "
            "the hard limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < FEW_OPEN_FILES:
        logger.warning("at most %d open files and connections: raise the hard limit (ulimit -Hn) of this node", limit)
    return limit
