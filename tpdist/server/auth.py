"""Who may use the API: bearer tokens, and the loopback rule for the one call that ends the cluster.

An ASGI middleware, so that no route, known or unknown, can be reached around it.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tpdist.server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})
OTHERS_HEADERS = ("origin", "forwarded", "x-forwarded-for", "x-real-ip", "via")
"""Set by web pages and proxies: who sends one speaks for somebody else, from wherever."""


class ApiKeys:
    """The set of keys of which any one opens the API. Holds digests, so that keys of any length compare alike."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, authorization: str | None) -> bool:
        """Whether an Authorization header carries a key. Takes the same time for every wrong one."""
        scheme, _, token = (authorization or "").partition(" ")
        digest = _digest(token.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches) and scheme.lower() == "bearer"


class RequireApiKey:
    """Refuse every HTTP request without a key, but for the probes in OPEN_PATHS. No keys: everybody may."""

    def __init__(self, app: ASGIApp, *, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            authorization = Headers(scope=scope).get("authorization")
            if not self._keys.admit(authorization):
                await error_response(_unauthorized(authorization))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def require_trusted_client(request: Request, *, keys: ApiKeys) -> None:
    """Raise ApiError 403 unless the client has shown a key, or is a program on this machine.

    Without keys only a loopback address counts, and no web page and no proxy: a browser lets any page post to
    localhost, and says so in the Origin header.
    """
    if keys:
        return
    for_others = any(name in request.headers for name in OTHERS_HEADERS)
    if for_others or not _is_loopback(request.client.host if request.client else None):
        raise ApiError(
            403, "without an API key (--api-key-file) this is allowed from this machine only", code="forbidden"
        )


def _is_loopback(host: str | None) -> bool:
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _unauthorized(authorization: str | None) -> ApiError:
    message = "no API key: send Authorization: Bearer KEY" if authorization is None else "the API key is wrong"
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
