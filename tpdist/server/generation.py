"""One HTTP request as sequences for the engine, and their outputs as pieces of text.

Knows nothing of HTTP or of the shape of an answer. Leaving any of the generators here early closes the engine's, which
aborts the sequence on all ranks.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from tpdist.control.messages import EngineInfo, Generate
from tpdist.server.answers import check_sampling_ids, read_pieces, split_answers
from tpdist.server.echo import Echo, make_echo
from tpdist.server.errors import ApiError
from tpdist.server.metrics import SequenceTimer
from tpdist.server.schema import GenerationRequest
from tpdist.server.service import Service
from tpdist.server.text import Piece, TextReader, check_token_ids
from tpdist.server.tokenizer import Tokenizer

LONG_TEXT_CHARS = 8192
MAX_PROMPT_LOGPROBS = 500_000
"""How many log-probabilities of prompts one answer may hold: some 30 MB of JSON."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All sequences of one HTTP request: those of one prompt, `per_prompt` of them, stand together.

    `num_prompt_tokens` counts each prompt once. `echoes` are the prompts if answers begin with them. With
    `prompt_only` the one token that the engine makes is dropped.
    """

    service: Service
    tokenizer: Tokenizer
    sequences: tuple[Generate, ...]
    per_prompt: int
    echoes: tuple[Echo, ...]
    prompt_only: bool
    num_prompt_tokens: int
    arrived_s: float

    @property
    def scores_prompts(self) -> bool:
        """The first sequence of each prompt brings the prompt's log-probabilities."""
        return self.sequences[0].sampling.prompt_logprobs is not None

    def prompt_of(self, index: int) -> int:
        """The number of the prompt that sequence `index` answers."""
        return index // self.per_prompt

    def echo(self, index: int) -> Echo | None:
        """What the answer of sequence `index` begins with."""
        return self.echoes[self.prompt_of(index)] if self.echoes else None


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    """Token ids of `text`; a long one is encoded on a thread, so that running streams do not stutter."""
    if len(text) > LONG_TEXT_CHARS:
        return tuple(await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens))
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def plan_job(
    body: GenerationRequest,
    *,
    request_id: str,
    service: Service,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[int, ...]],
    echoed: Sequence[str | Sequence[int]] = (),
    arrived_s: float,
) -> Job:
    """The sequences of each prompt. `echoed` are the prompts as the client gave them, if answers begin with them;
    `arrived_s` is when the request came, on the monotonic clock.

    Raises ApiError or RequestError, status 400, for what the model or the cache cannot hold.
    """
    engine, param = service.ready_engine(), body.PROMPT_FIELD
    sequences: list[Generate] = []
    for number, prompt in enumerate(prompts):
        check_token_ids(prompt, vocab_size=service.vocab_size, param=param)
        room = room_for(prompt, max_tokens=body.token_limit, engine=engine, param=param, prompt_only=body.prompt_only)
        sampling = body.sampling(max_tokens=body.token_limit or min(room, body.DEFAULT_TOKENS or room))
        check_sampling_ids(sampling, vocab_size=service.vocab_size)
        request = Generate(
            request_id=f"{request_id}-{number}",
            prompt_token_ids=prompt,
            sampling=sampling,
            eos_token_ids=service.eos_token_ids,
            priority=body.priority or 0,
        )
        sequences += split_answers(request)
    num_prompt_tokens = sum(map(len, prompts))
    _check_prompt_logprobs(body, num_prompt_tokens)
    return Job(
        service=service,
        tokenizer=tokenizer,
        sequences=tuple(sequences),
        per_prompt=len(sequences) // len(prompts),
        echoes=tuple(make_echo(tokenizer, *pair) for pair in zip(echoed, prompts, strict=False)),
        prompt_only=body.prompt_only,
        num_prompt_tokens=num_prompt_tokens,
        arrived_s=arrived_s,
    )


def _check_prompt_logprobs(body: GenerationRequest, num_prompt_tokens: int) -> None:
    """Raise ApiError 400 if the choices, each of which shows its prompt, would show too many log-probabilities."""
    most, choices = body.num_prompt_logprobs, body.n or 1
    if most is None:
        return
    entries = num_prompt_tokens * (most + 1) * choices
    if entries > MAX_PROMPT_LOGPROBS:
        param = "prompt_logprobs" if body.prompt_logprobs == most else "logprobs"
        raise ApiError(
            400,
            f"{param} would give {entries} log-probabilities of prompts ({num_prompt_tokens} prompt tokens, {most} + 1 "
            f"at each, n={choices}), and one request may have at most {MAX_PROMPT_LOGPROBS}; send fewer prompts at "
            "once, or ask for fewer",
            param=param,
        )


def room_for(
    prompt: tuple[int, ...], *, max_tokens: int | None, engine: EngineInfo, param: str, prompt_only: bool = False
) -> int:
    """How many tokens can follow `prompt`. Raises ApiError 400 if that is none, or fewer than `max_tokens`; with
    `prompt_only` it speaks of the one that the engine makes and nobody asked for."""
    if not prompt:
        raise ApiError(400, f"{param} has no tokens; at least one is needed", param=param)
    wanted = max_tokens or 1
    if len(prompt) + wanted > engine.max_tokens:
        needed = "scoring it needs room for one token more" if prompt_only else f"{wanted} more are asked for"
        raise ApiError(
            400,
            f"{param} has {len(prompt)} tokens and {needed}, which makes {len(prompt) + wanted}; "
            f"this server holds at most {engine.max_tokens} tokens of one request (longest context "
            f"{engine.max_model_len}, KV cache {engine.num_kv_blocks * engine.block_size})",
            param=param,
            code="context_length_exceeded",
        )
    return engine.max_tokens - len(prompt)


def run_job(job: Job) -> AsyncGenerator[Piece, None]:
    """The pieces of all sequences as they come. Raises RequestError when one of them is lost; the rest are aborted."""
    job.service.metrics.prompt_tokens.inc(job.num_prompt_tokens)
    sequences = [_read_sequence(job, index) for index in range(len(job.sequences))]
    return sequences[0] if len(sequences) == 1 else _merge(sequences)


async def _read_sequence(job: Job, index: int) -> AsyncGenerator[Piece, None]:
    request, echo = job.sequences[index], job.echo(index)
    reader = TextReader(job.tokenizer, request, index=index, start=len(echo.text) if echo else 0)
    timer = SequenceTimer(job.service.metrics, arrived_s=job.arrived_s)
    reason = "abort"
    try:
        async with aclosing(read_pieces(job.service.client.generate, request, reader)) as pieces:
            async for piece in pieces:
                if piece.queue_s is not None:
                    timer.was_scheduled(piece.queue_s)
                if job.prompt_only:
                    piece = _without_tokens(piece)
                if piece.token_ids:
                    timer.saw_tokens(len(piece.token_ids))
                reason = piece.finish_reason or reason
                yield piece
    except Exception:
        reason = "error"
        raise
    finally:
        timer.ended(reason)


def _without_tokens(piece: Piece) -> Piece:
    ends = None if piece.finish_reason is None else "length"
    return msgspec.structs.replace(
        piece, text="", token_ids=(), offsets=(), logprobs=(), finish_reason=ends, stop_reason=None
    )


async def _merge(sequences: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Pieces of all sequences in the order in which they come; the first failure ends them all."""
    arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(sequence, arrived)) for sequence in sequences]
    running = len(tasks)
    try:
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(sequence: AsyncGenerator[Piece, None], arrived: "asyncio.Queue[Piece | Exception | None]") -> None:
    """Put every piece into `arrived`, then None, or the error that ended the sequence."""
    try:
        async with aclosing(sequence):
            async for piece in sequence:
                arrived.put_nowait(piece)
    except Exception as error:  # handed on to the task that reads `arrived`, which raises it
        arrived.put_nowait(error)
    else:
        arrived.put_nowait(None)
