"""Log-probabilities in the shapes that clients know: OpenAI's for completions and for chat, and vLLM's dictionaries.

The engine sends ids and numbers; the text of each token is added here. An entry without logprobs stands for the first
token of a prompt, which nothing predicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tpdist.control.messages import TokenLogprobs

LEAST_LOGPROB = -9999.0
"""What -inf becomes in JSON, as in vLLM."""

PromptLogprobs = list[dict[int, dict[str, Any]] | None]


class Vocabulary(Protocol):
    """What this module needs of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str: ...


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability at one position, and its rank there: 1 is the most probable."""

    logprob: float
    rank: int
    decoded_token: str


def by_token(vocabulary: Vocabulary, entry: TokenLogprobs, *, most: int) -> dict[int, Logprob]:
    """The token that stands at a position, then the `most` most probable ones, by token id."""
    found: dict[int, Logprob] = {}
    ranks = (entry.rank, *range(1, most + 1))
    for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=False):
        found.setdefault(token_id, Logprob(logprob, rank, vocabulary.token_text(token_id)))
    return found


def prompt_by_token(
    vocabulary: Vocabulary, entries: Sequence[TokenLogprobs], *, most: int
) -> list[dict[int, Logprob] | None]:
    """vLLM's prompt_logprobs: `entries` begin with the second token, and the first has none."""
    return [None, *(by_token(vocabulary, entry, most=most) for entry in entries)]


def shown_prompt(vocabulary: Vocabulary, entries: Sequence[TokenLogprobs], *, most: int) -> PromptLogprobs:
    """vLLM's prompt_logprobs as JSON has them."""
    positions = prompt_by_token(vocabulary, entries, most=most)
    return [None if tokens is None else {key: _shown(value) for key, value in tokens.items()} for tokens in positions]


def completion_logprobs(
    vocabulary: Vocabulary, entries: Sequence[TokenLogprobs], offsets: Sequence[int], *, most: int
) -> dict[str, Any]:
    """The `logprobs` of a completion's choice. top_logprobs hold the token itself and the `most` most probable ones;
    of several that read the same, the first."""
    return {
        "text_offset": list(offsets),
        "token_logprobs": [finite(entry.logprobs[0]) if entry.logprobs else None for entry in entries],
        "tokens": [vocabulary.token_text(entry.token_ids[0]) for entry in entries],
        "top_logprobs": [_by_text(vocabulary, entry, most) if entry.logprobs else None for entry in entries],
    }


def chat_logprobs(vocabulary: Vocabulary, entries: Sequence[TokenLogprobs], *, most: int) -> dict[str, Any]:
    """The `logprobs` of a chat's choice: each token, and the `most` most probable ones in its place."""
    return {"content": [_chat_token(vocabulary, entry, most) for entry in entries], "refusal": None}


def finite(logprob: float) -> float:
    """A number that JSON can hold. (This order of arguments turns NaN into the least, too.)"""
    return max(LEAST_LOGPROB, logprob)


def _by_text(vocabulary: Vocabulary, entry: TokenLogprobs, most: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in list(zip(entry.token_ids, entry.logprobs, strict=True))[: most + 1]:
        found.setdefault(vocabulary.token_text(token_id), finite(logprob))
    return found


def _chat_token(vocabulary: Vocabulary, entry: TokenLogprobs, most: int) -> dict[str, Any]:
    token, *top = (
        {
            "token": vocabulary.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": list(vocabulary.token_bytes(token_id)),
        }
        for token_id, logprob in list(zip(entry.token_ids, entry.logprobs, strict=True))[: most + 1]
    )
    return {**token, "top_logprobs": top}


def _shown(found: Logprob) -> dict[str, Any]:
    return {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}
