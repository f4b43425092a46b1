"""An answer to a client that may go away: one JSON object, or a stream of server-sent events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from tpdist.server.errors import describe

T = TypeVar("T")
logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def json_response(body: Any, *, status: int = 200) -> Response:
    """`body` as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def answer_while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """The result of `work` as JSON. A client that goes away first cancels it."""
    try:
        return json_response(await unless_disconnected(request.receive, work))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def write_event(body: dict[str, Any]) -> bytes:
    """`body` as one event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; if the client goes away first, `work` is cancelled and ClientGone raised.

    The body of the request must have been read: any message but the disconnect is dropped.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. Headers are sent with the first event, so that an early failure still gets its own status;
    a later one is an event with the error, and the end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_events(send))
        except ClientGone:
            logger.debug("a client left its stream")

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            event = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": event, "more_body": True})
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except Exception as error:  # the status is out: this event is all that can tell the client
                _, body = describe(error)
                await send({"type": "http.response.body", "body": write_event(body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
