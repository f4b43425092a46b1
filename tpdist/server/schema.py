"""The bodies of requests, in OpenAI's shape with vLLM's common extensions.

Every field that a client may send stands here. A field that this server cannot honour is declared `Annotated[Any,
Off(...)]`: values that mean "off" are accepted, anything else is refused by name. Any other field is unknown and
refused too. Says nothing of the model: limits that depend on it are checked in generation.py.
"""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from tpdist.sampling_params import MAX_ANSWERS, MAX_LOGPROBS, MAX_SEED, SamplingParams
from tpdist.server.fields import (
    MAX_CHOICES,
    MAX_INT,
    BiasField,
    Int,
    Off,
    PositiveInt,
    PromptField,
    StopField,
    Strict,
)

Count = Annotated[int, Field(ge=1, le=MAX_ANSWERS)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NoEffect = Field(description="Accepted; has no effect.")


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: the usage so far, in all chunks."
    )
    include_obfuscation: Annotated[Any, Off(False)] = None

    @model_validator(mode="after")
    def _continuous_usage_is_usage(self) -> "StreamOptions":
        if self.continuous_usage_stats and not self.include_usage:
            raise PydanticCustomError("value", "needs include_usage", {"field": "continuous_usage_stats"})
        return self


class GenerationRequest(Strict):
    """What completions and chat have in common. `PROMPT_FIELD` names the field that holds the prompt."""

    PROMPT_FIELD: ClassVar[str]
    DEFAULT_TOKENS: ClassVar[int | None] = None

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: Annotated[str | None, NoEffect] = None
    metadata: Annotated[dict[str, str] | None, NoEffect] = None
    service_tier: Annotated[Literal["auto", "default"] | None, NoEffect] = None
    prompt_cache_key: Annotated[str | None, NoEffect] = None
    safety_identifier: Annotated[str | None, NoEffect] = None
    n: Count | None = Field(None, description="Answers for each prompt. With a seed, answer i is drawn with seed + i.")
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = Field(None, description="0 or -1: off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: BiasField = Field(None, description="Added to the logits of tokens, by id.")
    min_tokens: Int | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: StopField = ()
    include_stop_str_in_output: bool | None = Field(None, description="Keep what ended an answer in its text.")
    stop_token_ids: Annotated[list[Int], Field(max_length=128, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: NumLogprobs | None = Field(
        None, description="Log-probabilities of the prompt's tokens, and of this many others. Not with stream."
    )
    priority: Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)] | None = Field(
        None, description="Lower is served first; 0 if left out."
    )
    return_token_ids: bool | None = Field(None, description="Add token_ids to each choice.")

    response_format: Annotated[Any, Off({"type": "text"})] = None
    structured_outputs: Annotated[Any, Off()] = None
    guided_json: Annotated[Any, Off()] = None
    guided_regex: Annotated[Any, Off()] = None
    guided_choice: Annotated[Any, Off()] = None
    guided_grammar: Annotated[Any, Off()] = None
    use_beam_search: Annotated[Any, Off(False)] = None

    @model_validator(mode="after")
    def _check_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value", "may only be set with stream", {"field": "stream_options"})
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError("value", "is not possible with stream", {"field": "prompt_logprobs"})
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, if the client said so; otherwise DEFAULT_TOKENS, or all that the context holds."""
        raise NotImplementedError

    @property
    def prompt_only(self) -> bool:
        """Nothing is to be generated."""
        return False

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most probable tokens the client wants to see in the place of each; None: no logprobs."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    def sampling(self, *, max_tokens: int) -> SamplingParams:
        """The parameters of all answers to one prompt. Raises RequestError for values out of range."""
        chosen = {name: getattr(self, name) for name in _SAMPLING_FIELDS if getattr(self, name) is not None}
        return SamplingParams(
            max_tokens=max_tokens, logprobs=self.num_logprobs, prompt_logprobs=self.num_prompt_logprobs, **chosen
        )


_SAMPLING_FIELDS = tuple({*SamplingParams.__struct_fields__} & {*GenerationRequest.model_fields} - {"prompt_logprobs"})


class CompletionRequest(GenerationRequest):
    PROMPT_FIELD: ClassVar[str] = "prompt"
    DEFAULT_TOKENS: ClassVar[int | None] = 16

    prompt: PromptField
    max_tokens: Int | None = Field(None, description="16 if left out. 0 only with echo.")
    best_of: Count | None = Field(
        None, description="Generate so many, return the n of the highest mean log-probability. Not with stream."
    )
    echo: bool | None = Field(None, description="Begin each text with its prompt; logprobs then cover it.")
    logprobs: NumLogprobs | None = Field(
        None, description="Log-probabilities of the tokens, and of this many of the most probable in their places."
    )

    suffix: Annotated[Any, Off("")] = None

    @property
    def token_limit(self) -> int | None:
        return 1 if self.prompt_only else self.max_tokens

    @property
    def prompt_only(self) -> bool:
        return self.max_tokens == 0

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in asked if count is not None), default=None)

    def sampling(self, *, max_tokens: int) -> SamplingParams:
        return msgspec.structs.replace(super().sampling(max_tokens=max_tokens), best_of=self.best_of)

    @model_validator(mode="after")
    def _check_counts(self) -> "CompletionRequest":
        answers = self.n or 1
        best_of = self.best_of or answers
        if self.stream and best_of > answers:
            raise PydanticCustomError("value", "is not possible with stream unless it equals n", {"field": "best_of"})
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("value", "must be at least 1 without echo", {"field": "max_tokens"})
        if self.max_tokens == 0 and self.min_tokens:
            least = {"field": "min_tokens", "least": self.min_tokens}
            raise PydanticCustomError("value", "is {least}, but must be at most max_tokens=0", least)
        if len(self.prompt) * max(best_of, answers) > MAX_CHOICES:
            raise PydanticCustomError(
                "prompt", "times n or best_of may give at most {most}", {"field": "prompt", "most": MAX_CHOICES}
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

    logprobs: bool | None = Field(None, description="Return the log-probabilities of the tokens.")
    top_logprobs: NumLogprobs | None = Field(
        None, description="With logprobs: and of this many of the most probable tokens in their places."
    )

    tools: Annotated[Any, Off([])] = None
    tool_choice: Annotated[Any, Off("none")] = None
    parallel_tool_calls: Annotated[Any, Off(False)] = None
    functions: Annotated[Any, Off([])] = None
    function_call: Annotated[Any, Off("none")] = None
    modalities: Annotated[Any, Off(["text"])] = None
    audio: Annotated[Any, Off()] = None
    prediction: Annotated[Any, Off()] = None
    reasoning_effort: Annotated[Any, Off()] = None
    verbosity: Annotated[Any, Off()] = None
    store: Annotated[Any, Off(False)] = None
    web_search_options: Annotated[Any, Off()] = None

    @model_validator(mode="after")
    def _top_logprobs_are_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("value", "needs logprobs", {"field": "top_logprobs"})
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise PydanticCustomError("value", "differs from max_completion_tokens; set one", {"field": "max_tokens"})
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


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
