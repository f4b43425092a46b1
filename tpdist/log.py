"""Logging for all processes: one line an event, on stderr, with time, level, node, rank and epoch.

Modules take their logger with `logging.getLogger(__name__)`; only this module configures handlers.
"""

import logging
import sys

_context: dict[str, object] = {}


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        where = " ".join(f"{key}={value}" for key, value in _context.items())
        head = f"{self.formatTime(record, '%H:%M:%S')}.{int(record.msecs):03d} {record.levelname:<7} {where}"
        line = f"{head} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(*, level: str = "INFO", **context: object) -> None:
    """Send this process's log to stderr instead of anywhere else. `context` (node, rank, epoch) stands on each line."""
    _context.clear()
    add_context(**context)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    root = logging.getLogger("tpdist")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False


def add_context(**context: object) -> None:
    """Add or replace what stands on every line from now on."""
    _context.update(context)
