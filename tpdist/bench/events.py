"""Server-sent events, taken apart as bytes arrive (https://html.spec.whatwg.org/multipage/server-sent-events.html).

Only `data` matters here; names, ids and comments are skipped.
"""

import codecs
import re

LINE_END = re.compile(r"\r\n|\n|\r")


class EventParser:
    """Turns a stream of bytes, cut anywhere, into the data of its events."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._rest = ""
        self._data: list[str] = []
        self._after_return = False

    def feed(self, chunk: bytes) -> list[str]:
        """The data of the events that `chunk` completes."""
        text = self._decoder.decode(chunk)
        if not text:
            return []
        # A line that ends with a carriage return is complete: a line feed that follows belongs to it.
        body = text.removeprefix("\n") if self._after_return else text
        self._after_return = text.endswith("\r")
        *lines, self._rest = LINE_END.split(self._rest + body)
        return [data for line in lines if (data := self._take(line)) is not None]

    def _take(self, line: str) -> str | None:
        """Read one line; at the empty line after an event, its data."""
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        if line or not self._data:
            return None
        data, self._data = "\n".join(self._data), []
        return data
