"""Pieces of text as an HTTP answer: one JSON object, or a stream of events. Watches for a client that goes away.

Knows completions and chat only through Shape. Chunks are plain dicts written by msgspec: no validation while tokens
stream.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from tpdist.server.errors import describe
from tpdist.server.generation import Job, run_job
from tpdist.server.schema import GenerationRequest
from tpdist.server.text import Piece

T = TypeVar("T")
logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED_REQUEST = 499


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


@dataclass(kw_only=True)
class Answer:
    """One choice, collected."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Shape(Protocol):
    """How one endpoint writes its choices. Fields that all endpoints share are written by this module."""

    @property
    def object(self) -> str: ...

    @property
    def chunk_object(self) -> str: ...

    def choice(self, text: str) -> dict[str, Any]:
        """The text of a whole choice."""
        ...

    def delta(self, text: str) -> dict[str, Any]:
        """The text of one chunk of a choice."""
        ...

    def opening(self) -> dict[str, Any] | None:
        """What the first chunk of a choice holds before any text, if there is such a chunk."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How one request wants its answer."""

    id: str
    model: str
    created: int
    shape: Shape
    stream: bool
    include_usage: bool
    return_token_ids: bool

    def choice(self, index: int, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def plan_reply(body: GenerationRequest, *, prefix: str, shape: Shape) -> Reply:
    """A reply with a new id that starts with `prefix`."""
    return Reply(
        id=f"{prefix}-{uuid.uuid4().hex}",
        model=body.model,
        created=int(time.time()),
        shape=shape,
        stream=bool(body.stream),
        include_usage=body.include_usage,
        return_token_ids=bool(body.return_token_ids),
    )


async def respond(request: Request, *, job: Job, reply: Reply) -> Response:
    """Run `job` and answer as `reply` says. A client that goes away aborts it."""
    if reply.stream:
        return EventStream(_events(job, reply))
    try:
        answers = await unless_disconnected(request.receive, _collect(job))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return json_response(_whole(job, reply, answers))


def json_response(body: Any, *, status: int = 200) -> Response:
    """`body` as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


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
                await send({"type": "http.response.body", "body": _event(body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(job: Job, reply: Reply) -> AsyncGenerator[bytes, None]:
    opened: set[int] = set()
    num_tokens = 0
    async with aclosing(run_job(job)) as pieces:
        async for piece in pieces:
            num_tokens += len(piece.token_ids)
            event = b""
            if piece.index not in opened:
                opened.add(piece.index)
                event = _opening(reply, piece.index)
            if piece.text or piece.finish_reason or reply.return_token_ids:
                event += _chunk(reply, piece)
            if event:
                yield event
    if reply.include_usage:
        body = reply.body(reply.shape.chunk_object, [])
        yield _event({**body, "usage": _usage(job, num_tokens)})
    yield DONE


def _opening(reply: Reply, index: int) -> bytes:
    content = reply.shape.opening()
    return b"" if content is None else _chunk_event(reply, reply.choice(index, content, None))


def _chunk(reply: Reply, piece: Piece) -> bytes:
    choice = reply.choice(piece.index, reply.shape.delta(piece.text), piece.finish_reason)
    if reply.return_token_ids:
        choice["token_ids"] = piece.token_ids
    return _chunk_event(reply, choice)


def _chunk_event(reply: Reply, choice: dict[str, Any]) -> bytes:
    body = reply.body(reply.shape.chunk_object, [choice])
    if reply.include_usage:
        body["usage"] = None
    return _event(body)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def _collect(job: Job) -> list[Answer]:
    answers = [Answer() for _ in job.choices]
    async with aclosing(run_job(job)) as pieces:
        async for piece in pieces:
            answer = answers[piece.index]
            answer.text.append(piece.text)
            answer.token_ids += piece.token_ids
            answer.finish_reason = piece.finish_reason
    return answers


def _whole(job: Job, reply: Reply, answers: list[Answer]) -> dict[str, Any]:
    choices = []
    for index, answer in enumerate(answers):
        choice = reply.choice(index, reply.shape.choice("".join(answer.text)), answer.finish_reason)
        if reply.return_token_ids:
            choice["token_ids"] = answer.token_ids
        choices.append(choice)
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    return {**reply.body(reply.shape.object, choices), "usage": _usage(job, num_tokens)}


def _usage(job: Job, num_tokens: int) -> dict[str, int]:
    prompt = job.num_prompt_tokens
    return {"prompt_tokens": prompt, "completion_tokens": num_tokens, "total_tokens": prompt + num_tokens}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
