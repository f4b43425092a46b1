"""How many files and connections this process may have open. Knows nothing of what they are for."""

import logging
import resource

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 65536
"""Also the most connections that strangers can open, each of which takes memory: no more, even where it is allowed."""
FEW_OPEN_FILES = 4096


def set_open_file_limit() -> int:
    """Allow this process, and the ranks that it starts, MAX_OPEN_FILES, or as many as the machine's hard limit lets
    it. Returns the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < FEW_OPEN_FILES:
        logger.warning("at most %d open files and connections: raise the hard limit (ulimit -Hn) of this node", limit)
    return limit
