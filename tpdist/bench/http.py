"""As much of an HTTP/1.1 client as a load generator needs: one request a connection, its body read as it comes.

It shares its cores with the server that it measures, so it does little: no pool, no redirects, no compression, no
proxy. Knows nothing of OpenAI.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

from tpdist.errors import SettingsError

MAX_HEADER_BYTES = 1 << 16


class HttpError(Exception):
    """The other side does not speak HTTP/1.1, or stopped in the middle of its answer."""


@dataclass(frozen=True)
class Address:
    """Where a server is. `path` is what stands before the paths of its API; without a slash at its end."""

    host: str
    port: int
    tls: bool
    path: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Raises SettingsError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise SettingsError(f"--url {url}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"--url must be as http://HOST:PORT or https://HOST, not {url}")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/"))

    @cached_property
    def tls_context(self) -> ssl.SSLContext | None:
        """Made once: to read the certificates of the system takes longer than many a first token."""
        return ssl.create_default_context() if self.tls else None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"


class HttpAnswer:
    """The head of an answer, and its body."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body, as it comes. Raises HttpError if it breaks off, OSError if the connection does."""
        try:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                async for chunk in self._chunked():
                    yield chunk
            elif "content-length" in self.headers:
                yield await self._reader.readexactly(int(self.headers["content-length"]))
            else:
                while chunk := await self._reader.read(MAX_HEADER_BYTES):
                    yield chunk
        except (EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise HttpError(f"the answer broke off: {error}") from error

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def _chunked(self) -> AsyncIterator[bytes]:
        while True:
            line = await self._reader.readuntil(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            if size == 0:
                return
            yield (await self._reader.readexactly(size + 2))[:-2]


@asynccontextmanager
async def requesting(
    address: Address, path: str, *, headers: Mapping[str, str], body: bytes | None = None
) -> AsyncIterator[HttpAnswer]:
    """POST `body`, or GET without one, on a new connection, which closes afterwards. Raises HttpError and OSError."""
    reader, writer = await asyncio.open_connection(
        address.host, address.port, ssl=address.tls_context, limit=MAX_HEADER_BYTES
    )
    try:
        writer.write(_head(address, path, headers, body) + (body or b""))
        await writer.drain()
        yield await _read_head(reader)
    finally:
        writer.close()


def _head(address: Address, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    host = f"[{address.host}]" if ":" in address.host else address.host
    lines = {"Host": f"{host}:{address.port}", "Connection": "close", "Accept-Encoding": "identity", **headers}
    if body is not None:
        lines |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    method = "GET" if body is None else "POST"
    start = f"{method} {address.path}{path} HTTP/1.1\r\n"
    return (start + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n").encode("latin-1")


async def _read_head(reader: asyncio.StreamReader) -> HttpAnswer:
    while True:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (EOFError, asyncio.LimitOverrunError) as error:
            raise HttpError("the connection was closed, or what came is no HTTP") from error
        start, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        protocol, _, rest = start.partition(" ")
        status = rest[:3]
        if not protocol.startswith("HTTP/1.") or not status.isdigit():
            raise HttpError(f"what came is no HTTP/1.1: {start[:80]!r}")
        if int(status) >= 200:
            break
    pairs = (line.partition(":") for line in lines)
    return HttpAnswer(int(status), {name.strip().lower(): value.strip() for name, _, value in pairs}, reader)
