"""One HTTP request as sequences for the engine, and their outputs as pieces of text.

Knows nothing of HTTP or of the shape of an answer. Each choice is one Generate with an id of its own; leaving any of
the generators here early closes the engine's, which aborts the sequence on all ranks.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from tpdist.control.messages import EngineInfo, Generate
from tpdist.errors import RequestError
from tpdist.server.errors import ApiError
from tpdist.server.metrics import SequenceTimer
from tpdist.server.schema import GenerationRequest
from tpdist.server.service import Service
from tpdist.server.text import Piece, TextReader, check_token_ids
from tpdist.server.tokenizer import Tokenizer

LONG_TEXT_CHARS = 8192


@dataclass(frozen=True, kw_only=True)
class Job:
    """All choices of one HTTP request, in the order of their index. `num_prompt_tokens` counts each prompt once."""

    service: Service
    tokenizer: Tokenizer
    choices: tuple[Generate, ...]
    num_prompt_tokens: int
    arrived_s: float


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
    arrived_s: float,
) -> Job:
    """One sequence for each prompt and answer. `arrived_s` is when the request came, on the monotonic clock.

    Raises ApiError or RequestError, status 400, for what the model or the cache cannot hold.
    """
    engine, param = service.ready_engine(), body.PROMPT_FIELD
    check_token_ids(body.stop_token_ids or (), vocab_size=service.vocab_size, param="stop_token_ids")
    choices: list[Generate] = []
    for prompt in prompts:
        check_token_ids(prompt, vocab_size=service.vocab_size, param=param)
        room = room_for(prompt, max_tokens=body.token_limit, engine=engine, param=param)
        limit = body.token_limit or min(room, body.DEFAULT_TOKENS or room)
        for answer in range(body.n or 1):
            choices.append(
                Generate(
                    request_id=f"{request_id}-{len(choices)}",
                    prompt_token_ids=prompt,
                    sampling=body.sampling(max_tokens=limit, answer=answer),
                    eos_token_ids=service.eos_token_ids,
                )
            )
    return Job(
        service=service,
        tokenizer=tokenizer,
        choices=tuple(choices),
        num_prompt_tokens=sum(map(len, prompts)),
        arrived_s=arrived_s,
    )


def room_for(prompt: tuple[int, ...], *, max_tokens: int | None, engine: EngineInfo, param: str) -> int:
    """How many tokens can follow `prompt`. Raises ApiError 400 if that is none, or fewer than `max_tokens`."""
    if not prompt:
        raise ApiError(400, f"{param} has no tokens; at least one is needed", param=param)
    wanted = max_tokens or 1
    if len(prompt) + wanted > engine.max_tokens:
        raise ApiError(
            400,
            f"{param} has {len(prompt)} tokens and {wanted} more are asked for, which makes {len(prompt) + wanted}; "
            f"this server holds at most {engine.max_tokens} tokens of one request (longest context "
            f"{engine.max_model_len}, KV cache {engine.num_kv_blocks * engine.block_size})",
            param=param,
            code="context_length_exceeded",
        )
    return engine.max_tokens - len(prompt)


def run_job(job: Job) -> AsyncGenerator[Piece, None]:
    """The pieces of all choices as they come. Raises RequestError when one of them is lost; the rest are aborted."""
    sequences = [_read_sequence(job, index) for index in range(len(job.choices))]
    return sequences[0] if len(sequences) == 1 else _merge(sequences)


async def _read_sequence(job: Job, index: int) -> AsyncGenerator[Piece, None]:
    request = job.choices[index]
    reader = TextReader(job.tokenizer, request, index=index)
    timer = SequenceTimer(job.service.metrics, arrived_s=job.arrived_s, num_prompt_tokens=len(request.prompt_token_ids))
    reason = "abort"
    try:
        async with aclosing(job.service.client.generate(request)) as outputs:
            async for output in outputs:
                piece = reader.push(output)
                if piece.token_ids:
                    timer.saw_tokens(len(piece.token_ids))
                if piece.finish_reason == "abort":
                    raise RequestError("the cluster gave this request up; send it again", status=503)
                reason = piece.finish_reason or reason
                yield piece
                if reader.stop_string_found:
                    return
        if reason == "abort":
            raise RequestError("the cluster ended this request without an answer; send it again", status=503)
    except Exception:
        reason = "error"
        raise
    finally:
        timer.ended(reason)


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
