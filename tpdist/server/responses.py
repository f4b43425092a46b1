"""The bodies of answers, for /openapi.json only.

Answers are written as plain dicts (a stream of tokens leaves no time for validation); a test holds them against these
models.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Answer):
    error: ErrorDetail


class PromptTokensDetails(Answer):
    """`cached_tokens`: how much of the prompts was found in the prefix cache."""

    cached_tokens: int


class Usage(Answer):
    """`completion_tokens` counts all that was generated, and so what best_of left out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(Answer):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(Answer):
    """`text_offset` is where in the text each token begins. The first token of a prompt has no logprobs."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answer):
    """`stop_reason` is the stop string or the one of stop_token_ids that ended the answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class TopLogprob(Answer):
    """`bytes` are exact also for a token that is a part of a character only."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatChoice(Answer):
    """`stop_reason` is the stop string or the one of stop_token_ids that ended the answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatResponse(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class TokenizeResponse(Answer):
    """`max_model_len` is null until all ranks are ready."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(Answer):
    prompt: str


class Liveness(Answer):
    status: Literal["alive"]


class Readiness(Answer):
    """`state` is starting, ready, draining, recovering or failed; `reason` says why it is not ready."""

    state: str
    reason: str
    epoch: int
    phase: str


class Rank(Answer):
    rank: int
    local_rank: int
    pid: int
    device: str
    state: str
    step: int
    weight_bytes: int
    kv_blocks: int


class Node(Answer):
    node_id: str
    role: str
    host: str
    pid: int
    state: str
    last_seen_s: float
    ranks: list[Rank]


class Restart(Answer):
    epoch: int
    cause: str


class Cluster(Answer):
    state: str
    epoch: int
    phase: str
    nodes: list[Node]
    plan: dict[str, Any]
    restarts: list[Restart]


class DrainAccepted(Answer):
    state: Literal["draining"]


_MEANINGS = {
    400: "The request is wrong; the message and param say what.",
    401: "The API key is missing or wrong.",
    403: "This is not allowed to this client.",
    404: "There is no such model.",
    413: "The body is too large.",
    503: "The cluster cannot serve this now; the message says why.",
}


def generation_responses() -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of an endpoint that may stream."""
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    answer = {
        "description": "One object; with `stream`, events `data: CHUNK` in OpenAI's shape, the last `data: [DONE]`.",
        "content": stream,
    }
    return {200: answer, **error_responses(400, 401, 404, 413, 503)}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of these error statuses, and of any other: all have the same shape."""
    documented: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in statuses
    }
    documented["default"] = {"model": ErrorResponse, "description": "Any other error."}
    return documented
