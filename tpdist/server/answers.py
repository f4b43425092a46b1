"""One prompt as sequences for the engine, and their outputs as answers: what HTTP and the Python API have in common.

Each answer is one Generate with an id of its own. Knows nothing of HTTP.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from itertools import chain
from math import fsum

import msgspec

from tpdist.control.messages import Generate, TokenOutput
from tpdist.errors import RequestError
from tpdist.sampling_params import SamplingParams
from tpdist.server.text import Piece, TextReader, check_token_ids

GenerateFunction = Callable[[Generate], AsyncGenerator[TokenOutput, None]]


def check_sampling_ids(sampling: SamplingParams, *, vocab_size: int) -> None:
    """Raise RequestError for a token id in `sampling` that the model does not have."""
    check_token_ids(sampling.stop_token_ids, vocab_size=vocab_size, param="stop_token_ids")
    check_token_ids(tuple(sampling.logit_bias or ()), vocab_size=vocab_size, param="logit_bias")


def split_answers(request: Generate) -> list[Generate]:
    """One sequence for each answer to a prompt: answer i of n, or of best_of, is drawn with seed + i.

    Answer 0 alone scores the prompt: a sequence that does must compute it without the prefix cache, and all would find
    the same. Answers that compete are given log-probabilities to be compared by. Raises RequestError for a seed too
    large.
    """
    sampling = request.sampling
    count = sampling.best_of or sampling.n
    needed = 0 if count > sampling.n and sampling.logprobs is None else sampling.logprobs
    return [
        msgspec.structs.replace(
            request,
            request_id=f"{request.request_id}-{answer}",
            sampling=msgspec.structs.replace(
                sampling,
                n=1,
                best_of=None,
                logprobs=needed,
                prompt_logprobs=sampling.prompt_logprobs if answer == 0 else None,
                seed=None if sampling.seed is None else sampling.seed + answer,
            ),
        )
        for answer in range(count)
    ]


async def read_pieces(generate: GenerateFunction, request: Generate, reader: TextReader) -> AsyncGenerator[Piece, None]:
    """The pieces of one answer as they come. Leaving early aborts the sequence on all ranks.

    Raises RequestError as `generate` does, and when the outputs end without a reason.
    """
    async with aclosing(generate(request)) as outputs:
        async for output in outputs:
            piece = reader.push(output)
            yield piece
            if piece.finish_reason is not None:
                return
    raise RequestError("the cluster ended this request without an answer; send it again", status=503)


def join(pieces: Sequence[Piece]) -> Piece:
    """The whole answer of which these are the pieces, in order; at least one."""
    return msgspec.structs.replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        offsets=tuple(chain.from_iterable(piece.offsets for piece in pieces)),
        logprobs=tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
        prompt_logprobs=tuple(chain.from_iterable(piece.prompt_logprobs for piece in pieces)),
        num_cached_tokens=sum(piece.num_cached_tokens for piece in pieces),
    )


def best_answers(answers: Sequence[Piece], *, n: int) -> list[Piece]:
    """The n answers whose tokens have the highest mean log-probability, best first; all as they are if n wants all."""
    if len(answers) <= n:
        return list(answers)
    return sorted(answers, key=_mean_logprob, reverse=True)[:n]


def cumulative_logprob(answer: Piece) -> float:
    """The log-probability of all tokens of an answer that has its logprobs."""
    return fsum(entry.logprobs[0] for entry in answer.logprobs)


def _mean_logprob(answer: Piece) -> float:
    return cumulative_logprob(answer) / max(1, len(answer.logprobs))
