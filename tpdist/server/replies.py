"""Pieces of text as an HTTP answer: one JSON object, or a stream of events.

Knows completions and chat only through Shape. Chunks are plain dicts written by msgspec: no validation while tokens
stream.
"""

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request, Response

from tpdist.control.messages import TokenLogprobs
from tpdist.server.answers import best_answers, join
from tpdist.server.event_stream import EventStream, answer_while_connected, write_event
from tpdist.server.generation import Job, run_job
from tpdist.server.logprobs import PromptLogprobs, shown_prompt
from tpdist.server.schema import GenerationRequest
from tpdist.server.text import Piece

DONE = b"data: [DONE]\n\n"


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

    def logprobs(self, piece: Piece, *, most: int) -> dict[str, Any]:
        """The log-probabilities of the tokens of a piece, with the `most` most probable ones in the place of each."""
        ...

    def add_prompt_logprobs(self, body: dict[str, Any], of_choices: Sequence[PromptLogprobs]) -> None:
        """Write the prompt's log-probabilities, given for each choice, into a whole answer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How one request wants its answer. `n` choices for each prompt; `logprobs` and `prompt_logprobs` as in
    SamplingParams."""

    id: str
    model: str
    created: int
    shape: Shape
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    n: int
    logprobs: int | None
    prompt_logprobs: int | None

    def choice(self, index: int, content: dict[str, Any], piece: Piece) -> dict[str, Any]:
        """Choice number `index`: `content` is the text of `piece` in the endpoint's shape."""
        shows_logprobs = self.logprobs is not None and piece.logprobs
        choice = {
            "index": index,
            **content,
            "logprobs": self.shape.logprobs(piece, most=self.logprobs or 0) if shows_logprobs else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def plan_reply(body: GenerationRequest, *, prefix: str, shape: Shape) -> Reply:
    """A reply with a new id that starts with `prefix`."""
    options = body.stream_options
    return Reply(
        id=f"{prefix}-{uuid.uuid4().hex}",
        model=body.model,
        created=int(time.time()),
        shape=shape,
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        return_token_ids=bool(body.return_token_ids),
        n=body.n or 1,
        logprobs=body.num_logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )


class Meter:
    """Counts the tokens of a job as its pieces come."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._num_tokens = 0
        self._num_cached_tokens = 0

    def count(self, piece: Piece) -> None:
        self._num_tokens += len(piece.token_ids)
        if piece.index % self._job.per_prompt == 0:  # the other answers share the prompt, which counts once
            self._num_cached_tokens += piece.num_cached_tokens

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage of all that was counted."""
        num_prompt_tokens = self._job.num_prompt_tokens
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": num_prompt_tokens + self._num_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens},
        }


async def respond(request: Request, *, job: Job, reply: Reply) -> Response:
    """Run `job` and answer as `reply` says. A client that goes away aborts it."""
    if reply.stream:
        return EventStream(_events(job, reply))
    return await answer_while_connected(request, _whole(job, reply))


async def _events(job: Job, reply: Reply) -> AsyncGenerator[bytes, None]:
    meter = Meter(job)
    writer = _ChunkWriter(job, reply, meter)
    async with aclosing(run_job(job)) as pieces:
        async for piece in pieces:
            meter.count(piece)
            # An opening may hold a long prompt's log-probabilities: shaping them must not hold up the event loop.
            opens = job.scores_prompts and not writer.has_opened(piece.index)
            event = await asyncio.to_thread(writer.write, piece) if opens else writer.write(piece)
            if event:
                yield event
    if reply.include_usage:
        body = reply.body(reply.shape.chunk_object, [])
        yield write_event({**body, "usage": meter.usage()})
    yield DONE


class _ChunkWriter:
    """Pieces as events. Where a choice begins with its prompt's log-probabilities, which the prompt's first sequence
    brings, all pieces of the prompt are held until that sequence has a token: then they are all there."""

    def __init__(self, job: Job, reply: Reply, meter: Meter) -> None:
        self._job = job
        self._reply = reply
        self._meter = meter
        self._opened: set[int] = set()
        self._scores: defaultdict[int, list[TokenLogprobs]] = defaultdict(list)
        self._scored: set[int] = set()
        self._held: defaultdict[int, list[Piece]] = defaultdict(list)
        self._shows_tokens = reply.return_token_ids or reply.logprobs is not None

    def has_opened(self, index: int) -> bool:
        """Events of choice `index` were written."""
        return index in self._opened

    def write(self, piece: Piece) -> bytes:
        """The events that `piece` makes, if any, and those of the pieces that waited for it."""
        prompt = self._job.prompt_of(piece.index)
        self._scores[prompt] += piece.prompt_logprobs
        if not piece.token_ids and piece.finish_reason is None:
            return b""
        if self._job.scores_prompts and prompt not in self._scored:
            if piece.index % self._job.per_prompt:
                self._held[prompt].append(piece)
                return b""
            self._scored.add(prompt)
        return b"".join(self._write(each) for each in (piece, *self._held.pop(prompt, ())))

    def _write(self, piece: Piece) -> bytes:
        event = b"" if self.has_opened(piece.index) else self._open(piece)
        if piece.text or piece.finish_reason or (self._shows_tokens and piece.token_ids):
            event += self._chunk(piece)
        return event

    def _open(self, piece: Piece) -> bytes:
        self._opened.add(piece.index)
        echo, content = self._job.echo(piece.index), self._reply.shape.opening()
        if echo is not None:
            return self._chunk(echo.as_piece(piece.index, self._scores[self._job.prompt_of(piece.index)]))
        return b"" if content is None else self._event(content, Piece(index=piece.index, text="", token_ids=()))

    def _chunk(self, piece: Piece) -> bytes:
        return self._event(self._reply.shape.delta(piece.text), piece)

    def _event(self, content: dict[str, Any], piece: Piece) -> bytes:
        choice = self._reply.choice(piece.index, content, piece)
        body = self._reply.body(self._reply.shape.chunk_object, [choice])
        if self._reply.include_usage:
            body["usage"] = self._meter.usage() if self._reply.continuous_usage else None
        return write_event(body)


async def _whole(job: Job, reply: Reply) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    meter = Meter(job)
    pieces: list[list[Piece]] = [[] for _ in job.sequences]
    async with aclosing(run_job(job)) as arriving:
        async for piece in arriving:
            meter.count(piece)
            pieces[piece.index].append(piece)
    if job.scores_prompts:  # much to shape, which must not hold up the event loop
        return await asyncio.to_thread(_whole_body, job, reply, meter, pieces)
    return _whole_body(job, reply, meter, pieces)


def _whole_body(job: Job, reply: Reply, meter: Meter, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
    """The body, given the pieces of each sequence."""
    answers = [join(of_answer) for of_answer in pieces]
    scores = [answer.prompt_logprobs for answer in answers[:: job.per_prompt]]
    prompts = [answers[first : first + job.per_prompt] for first in range(0, len(answers), job.per_prompt)]
    kept = [answer for of_prompt in prompts for answer in best_answers(of_prompt, n=reply.n)]
    choices = [
        _choice(job, reply, index, answer, scores[job.prompt_of(answer.index)]) for index, answer in enumerate(kept)
    ]
    body = {**reply.body(reply.shape.object, choices), "usage": meter.usage()}
    if reply.prompt_logprobs is not None:
        shown = [shown_prompt(job.tokenizer, of_prompt, most=reply.prompt_logprobs) for of_prompt in scores]
        reply.shape.add_prompt_logprobs(body, [shown[job.prompt_of(answer.index)] for answer in kept])
    return body


def _choice(
    job: Job, reply: Reply, index: int, answer: Piece, prompt_logprobs: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    echo = job.echo(answer.index)
    if echo is not None:
        answer = join([echo.as_piece(answer.index, prompt_logprobs), answer])
    return reply.choice(index, reply.shape.choice(answer.text), answer)
