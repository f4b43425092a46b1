"""Serves an ASGI app from the running event loop. Signals belong to the launcher; the app's meaning to nobody here."""

import asyncio
import contextlib
import functools
import logging
import math
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tpdist.errors import SettingsError
from tpdist.server.connections import Connections, GuardedProtocol, Limits, Listener

START_POLL_S = 0.005
STOP_GRACE_S = 2.0


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host` (a name, IPv4 or IPv6 address) and `port` (0: any), not listening yet.

    Raises SettingsError that names the address when it is taken, not ours, or unknown.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror or error}; check --host") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; free the port, or set --host and --port"
        ) from error
    sock.setblocking(False)
    return sock


class HttpServer:
    """One app on one socket, started and stopped by its owner. Not reusable after `stop`.

    The socket is bound when the object is made, so that a taken port is known before anything else starts; a bound
    one may be passed as `sock`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        ssl_certfile: Path | None = None,
        ssl_keyfile: Path | None = None,
        sock: socket.socket | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Raises SettingsError for an address that cannot be bound, or a certificate that cannot be read."""
        config = _config(app, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile)
        self._server = _Server(config, limits or Limits())
        self._socket = sock or bind(host, port)
        self.port = int(self._socket.getsockname()[1])
        self._scheme = "http" if ssl_certfile is None else "https"
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where clients on this machine find the server."""
        host = str(self._socket.getsockname()[0])
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def start(self) -> None:
        """Return once connections are accepted."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")
        while not self._server.started:
            if self._task.done():
                await self._task
                raise SettingsError(f"the HTTP server on port {self.port} ended while it started")
            await asyncio.sleep(START_POLL_S)

    async def wait(self) -> None:
        """Return when the server has ended; raises what ended it, if that was not `stop`."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def stop(self, *, timeout_s: float = 5.0) -> None:
        """Accept no more connections, give running answers `timeout_s`, then cut them off."""
        if self._task is None:
            self._socket.close()
            return
        self._server.config.timeout_graceful_shutdown = math.ceil(timeout_s)
        self._server.should_exit = True
        done, _ = await asyncio.wait({self._task}, timeout=timeout_s + STOP_GRACE_S)
        if not done:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()


def check_certificate(certfile: Path | None, keyfile: Path | None) -> None:
    """Raise SettingsError for a certificate or key that cannot be used, before anything else starts."""
    if certfile is None:
        return
    try:
        # Without an answer of ours OpenSSL asks the terminal for the passphrase of a key that has one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certfile, keyfile, password=lambda: _refuse(keyfile or certfile)
        )
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"cannot use --ssl-certfile {certfile}, --ssl-keyfile {keyfile}: {error}") from error


def _refuse(keyfile: Path) -> str:
    raise SettingsError(
        f"--ssl-keyfile {keyfile} has a passphrase, which nobody is there to type: write the key without it, as with "
        "`openssl pkey -in KEY -out NEW_KEY`, and chmod 600 it"
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with limits on connections."""

    def __init__(self, config: uvicorn.Config, limits: Limits) -> None:
        super().__init__(config)
        self._limits = limits

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        connections = Connections(self._limits)
        protocol = functools.partial(
            GuardedProtocol, limits=self._limits, config=self.config, server_state=self.server_state, app_state={}
        )
        tls = self.config.ssl
        listeners: list[Any] = [Listener(sock, protocol, connections=connections, tls=tls) for sock in sockets or ()]
        self.servers = listeners
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(app: ASGIApp, *, ssl_certfile: Path | None, ssl_keyfile: Path | None) -> uvicorn.Config:
    check_certificate(ssl_certfile, ssl_keyfile)
    options: dict[str, Any] = {}
    if ssl_certfile is not None:
        options = {"ssl_certfile": str(ssl_certfile), "ssl_keyfile": str(ssl_keyfile) if ssl_keyfile else None}
    # A client's mistakes get an answer, and no line in the log; its X-Forwarded-For is nobody's address.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        **options,
    )
    config.load()
    return config
