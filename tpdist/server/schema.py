"""The bodies of requests, in OpenAI's shape with vLLM's common extensions.

Every field that a client may send stands here. A field that this server cannot honour is declared `Annotated[Any,
Off(...)]`: values that mean "off" are accepted, anything else is refused by name. Any other field is unknown and
refused too. Says nothing of the model: limits that depend on it are checked in generation.py.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from tpdist.sampling_params import MAX_SEED, SamplingParams
from tpdist.server.fields import MAX_CHOICES, MAX_INT, Int, Off, PositiveInt, PromptField, StopField, Strict


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Off(False)] = None
    continuous_usage_stats: Annotated[Any, Off(False)] = None


class GenerationRequest(Strict):
    """What completions and chat have in common. `PROMPT_FIELD` names the field that holds the prompt."""

    PROMPT_FIELD: ClassVar[str]
    DEFAULT_TOKENS: ClassVar[int | None] = None

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, description="Accepted; has no effect.")
    n: Annotated[int, Field(ge=1, le=128)] | None = Field(
        None, description="Answers for each prompt. With a seed, answer i is drawn with seed + i."
    )
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = Field(None, description="0 or -1: off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Int | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: StopField = ()
    stop_token_ids: Annotated[list[Int], Field(max_length=128, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = Field(None, description="Add token_ids to each choice.")

    frequency_penalty: Annotated[Any, Off(0)] = None
    presence_penalty: Annotated[Any, Off(0)] = None
    logit_bias: Annotated[Any, Off({})] = None
    response_format: Annotated[Any, Off({"type": "text"})] = None
    include_stop_str_in_output: Annotated[Any, Off(False)] = None
    use_beam_search: Annotated[Any, Off(False)] = None
    prompt_logprobs: Annotated[Any, Off()] = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value", "may only be set with stream", {"field": "stream_options"})
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, if the client said so; otherwise DEFAULT_TOKENS, or all that the context holds."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, *, max_tokens: int, answer: int) -> SamplingParams:
        """The parameters of answer number `answer` to one prompt. Raises RequestError for values out of range."""
        chosen = {name: getattr(self, name) for name in _SAMPLING_FIELDS if getattr(self, name) is not None}
        if self.seed is not None:
            chosen["seed"] = self.seed + answer
        return SamplingParams(max_tokens=max_tokens, **chosen)


_SAMPLING_FIELDS = tuple(name for name in SamplingParams.__struct_fields__ if name != "max_tokens")


class CompletionRequest(GenerationRequest):
    PROMPT_FIELD: ClassVar[str] = "prompt"
    DEFAULT_TOKENS: ClassVar[int | None] = 16

    prompt: PromptField
    max_tokens: PositiveInt | None = Field(None, description="16 if left out.")
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="Only equal to n.")

    echo: Annotated[Any, Off(False)] = None
    logprobs: Annotated[Any, Off(False)] = None
    suffix: Annotated[Any, Off("")] = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @model_validator(mode="after")
    def _check_counts(self) -> "CompletionRequest":
        answers = self.n or 1
        if self.best_of not in (None, answers):
            raise PydanticCustomError("unsupported", "is not supported unless it equals n", {"field": "best_of"})
        if len(self.prompt) * answers > MAX_CHOICES:
            raise PydanticCustomError(
                "prompt", "times n may give at most {most} choices", {"field": "prompt", "most": MAX_CHOICES}
            )
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """`developer` is passed to the chat template as `system`. Several text parts are joined by newlines."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None

    refusal: Annotated[Any, Off()] = None
    annotations: Annotated[Any, Off([])] = None
    audio: Annotated[Any, Off()] = None
    function_call: Annotated[Any, Off()] = None
    tool_calls: Annotated[Any, Off([])] = None

    @model_validator(mode="after")
    def _content_is_needed(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "is required", {"field": "content"})
        return self

    def for_template(self) -> dict[str, str]:
        content = self.content or ""
        message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content if isinstance(content, str) else "\n".join(part.text for part in content),
        }
        return message if self.name is None else {**message, "name": self.name}


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class ChatRequest(GenerationRequest):
    PROMPT_FIELD: ClassVar[str] = "messages"

    messages: Messages
    max_completion_tokens: PositiveInt | None = Field(None, description="The rest of the context if left out.")
    max_tokens: PositiveInt | None = Field(None, description="Older name of max_completion_tokens.")

    logprobs: Annotated[Any, Off(False)] = None
    top_logprobs: Annotated[Any, Off(0)] = None
    tools: Annotated[Any, Off([])] = None
    tool_choice: Annotated[Any, Off("none")] = None
    parallel_tool_calls: Annotated[Any, Off(False)] = None
    functions: Annotated[Any, Off([])] = None
    function_call: Annotated[Any, Off("none")] = None
    modalities: Annotated[Any, Off(["text"])] = None
    audio: Annotated[Any, Off()] = None
    prediction: Annotated[Any, Off()] = None
    reasoning_effort: Annotated[Any, Off()] = None
    store: Annotated[Any, Off(False)] = None
    web_search_options: Annotated[Any, Off()] = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise PydanticCustomError("value", "differs from max_completion_tokens; set one", {"field": "max_tokens"})
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TokenizeRequest(Strict):
    """Either `prompt` or `messages`. Special tokens are added to a prompt, as for a completion; a chat template
    brings its own."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_input(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("value", "or messages is required, and not both", {"field": "prompt"})
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[Int], Field(fail_fast=True)]


class DrainBody(Strict):
    """Why, and whether to wait for the requests that run."""

    reason: Annotated[str, Field(max_length=1000)] = "asked over HTTP"
    immediate: bool = False
