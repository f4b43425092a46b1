"""Reads the body of a request: size limits, and strict JSON (no NaN, no lone surrogates, no endless nesting).

Knows nothing of what the JSON means.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from tpdist.server.errors import ApiError

DEFAULT_MAX_BODY_BYTES = 16 * 1024 * 1024
ROOM_BYTES = 256 * 1024 * 1024
FREE_BYTES = 64 * 1024


class BodyRoom:
    """The memory that the bodies of all requests take together, each beyond its first FREE_BYTES.

    What is small gets in even while large ones fill the room.
    """

    def __init__(self, size: int = ROOM_BYTES) -> None:
        self._left = size

    def take(self, size: int) -> bool:
        """Whether there was room for `size` bytes more."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        self._left += size


class StrictRequest(Request):
    """A request whose body is refused with 413, 503 or 400 instead of filling the memory or raising a bug."""

    _taken = 0

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await self._read_body(self.app.state.max_body_bytes)
        return self._body

    async def json(self) -> Any:
        try:
            return msgspec.json.decode(await self.body())
        except RecursionError as error:
            raise ApiError(400, "the body is not usable JSON: nested too deeply") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from error

    async def _read_body(self, limit: int) -> bytes:
        announced = self.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise _too_large(limit)
        body = bytearray()
        async for chunk in self.stream():
            body += chunk
            if len(body) > limit:
                raise _too_large(limit)
            self._take_room(len(body) - FREE_BYTES)
        return bytes(body)

    def _take_room(self, size: int) -> None:
        if size > self._taken:
            if not self.app.state.body_room.take(size - self._taken):
                headers = {"Connection": "close", "Retry-After": "1"}
                raise ApiError(503, "too many large requests at once; send this one again", headers=headers)
            self._taken = size

    def leave_room(self) -> None:
        """The body has been read and understood, or given up."""
        self.app.state.body_room.give_back(self._taken)
        self._taken = 0


class StrictRoute(APIRoute):
    """A route whose handler gets a StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            strict = StrictRequest(request.scope, request.receive)
            try:
                return await handle(strict)
            finally:
                strict.leave_room()

        return handle_strictly


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes", code="request_too_large", headers={"Connection": "close"}
    )
