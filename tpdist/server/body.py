"""Reads the body of a request: a size limit, and strict JSON (no NaN, no lone surrogates, no endless nesting).

Knows nothing of what the JSON means.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from tpdist.server.errors import ApiError

DEFAULT_MAX_BODY_BYTES = 16 * 1024 * 1024


class StrictRequest(Request):
    """A request whose body is refused with 413 or 400 instead of filling the memory or raising a bug."""

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
        chunks, size = [], 0
        async for chunk in self.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            chunks.append(chunk)
        return b"".join(chunks)


class StrictRoute(APIRoute):
    """A route whose handler gets a StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes", code="request_too_large", headers={"Connection": "close"}
    )
