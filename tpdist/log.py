"""Logging for all processes: one line an event, on stderr, with time, level, node, rank and epoch.

    text    for people: an event may bring further lines, such as a traceback
    json    for programs: every line is one object, also what was written to stderr without a logger

Modules take their logger with `logging.getLogger(__name__)`; only this module configures handlers, and in JSON it
stands between `sys.stderr` and the rest of the process.
"""

import io
import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]

EVENT_KEYS = ("time", "level", "node", "rank", "epoch", "logger", "message")
"""What every event has in JSON, null where it does not apply. `exception` and the fields of some events follow."""

_context: dict[str, object] = {}


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        where = " ".join(f"{key}={value}" for key, value in _context.items())
        head = f"{self.formatTime(record, '%H:%M:%S')}.{int(record.msecs):03d} {record.levelname:<7} {where}"
        line = f"{head} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JsonFormatter(logging.Formatter):
    """`extra={"fields": {...}}` of a record goes into its event."""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return _event(
            record.levelname, record.getMessage(), created_s=record.created, logger=record.name, fields=fields
        )


class _EventStream(io.TextIOBase):
    """What `sys.stderr` is in JSON: each line that is no event becomes one. It is no terminal, so nobody draws bars."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = re.split(r"[\r\n]+", self._rest + text)
        for line in lines:
            self.pass_on(line, {})
        return len(text)

    def pass_on(self, line: str, context: Mapping[str, object]) -> None:
        if line.strip():
            event = line if _read_event(line) else _event("INFO", line, context=context)
            self.stream.write(event + "\n")
            self.stream.flush()

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


def configure(*, level: str = "INFO", log_format: LogFormat = "text", **context: object) -> None:
    """Send this process's log to stderr instead of anywhere else. `context` (node, rank, epoch) stands on each line."""
    _context.clear()
    add_context(**context)
    stream: TextIO = sys.stderr.stream if isinstance(sys.stderr, _EventStream) else sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    ours, others = logging.getLogger("tpdist"), logging.getLogger()
    ours.handlers[:] = [handler]
    ours.setLevel(level)
    ours.propagate = False
    others.handlers[:] = [each for each in others.handlers if not isinstance(each.formatter, _JsonFormatter)]
    sys.stderr = stream
    if log_format == "json":
        others.addHandler(handler)
        sys.stderr = _EventStream(stream)


def add_context(**context: object) -> None:
    """Add or replace what stands on every line from now on."""
    _context.update(context)


def logs_json() -> bool:
    """Whether what is for people to look at, such as a table, has to be an event instead."""
    return isinstance(sys.stderr, _EventStream)


def pass_on(line: str, **context: object) -> None:
    """Write a line of another process to stderr. In JSON one that is no event becomes one, with this `context`. Where
    nothing can be written, because the disk is full or nobody reads any more, the line is lost, as the log's own are.
    """
    with suppress(OSError):
        if isinstance(sys.stderr, _EventStream):
            sys.stderr.pass_on(line, context)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def show_error(message: str, *, exit_code: int, traceback: str = "") -> None:
    """The last word of a command that fails."""
    if isinstance(sys.stderr, _EventStream):
        fields = {"exit_code": exit_code, **({"exception": traceback.rstrip("\n")} if traceback else {})}
        sys.stderr.write(_event("ERROR", message, fields=fields) + "\n")
    else:
        print(f"{traceback}error: {message}", file=sys.stderr)


def readable(line: str) -> str:
    """A line of a log for people: an event in JSON as text, any other line as it is."""
    event = _read_event(line)
    if event is None:
        return line
    exception = f"\n{event['exception']}" if "exception" in event else ""
    return f"{event['time']} {event['level']:<7} {event['message']}{exception}"


def _event(
    level: str,
    message: str,
    *,
    created_s: float | None = None,
    logger: str | None = None,
    context: Mapping[str, object] | None = None,
    fields: Mapping[str, object] | None = None,
) -> str:
    """One line of JSON, in ASCII, so that no terminal, pipe or lone surrogate breaks it."""
    created = datetime.fromtimestamp(time.time() if created_s is None else created_s, tz=UTC)
    event = dict.fromkeys(EVENT_KEYS, None) | {**_context, **(context or {})}
    event |= {
        "time": created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": level,
        "logger": logger,
        "message": message,
    }
    return json.dumps({**event, **(fields or {})}, default=str)


def _read_event(line: str) -> dict[str, Any] | None:
    if not line.startswith('{"time":'):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and set(EVENT_KEYS) <= set(event) else None
