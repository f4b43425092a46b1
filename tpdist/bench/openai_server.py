"""Any server with the OpenAI API as what is measured: tpdist, vLLM, llama.cpp, mistral.rs and others.

Tokens are counted by the ids that a server sends, else by the usage of its last chunk, else by the chunks.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tpdist.bench.events import EventParser
from tpdist.bench.http import Address, HttpAnswer, HttpError, requesting
from tpdist.bench.load import Answer
from tpdist.bench.prompts import Prompt
from tpdist.errors import JoinError, RequestError, SettingsError

MAX_SHOWN_CHARS = 300
UNAVAILABLE = 503


class OpenAIServer:
    """A Target behind a URL. `model` is the name that requests carry."""

    def __init__(self, address: Address, *, model: str, api_key: str | None) -> None:
        self._address = address
        self._model = model
        self._headers = _authorization(api_key)

    async def answer(self, prompt: Prompt, *, max_tokens: int, on_tokens: Callable[[int], None]) -> Answer:
        body = json.dumps(self._request(prompt, max_tokens)).encode()
        stream = _Stream(on_tokens)
        async with self._asking("/v1/completions", body) as http:
            await _check_stream(http)
            parser = EventParser()
            async with aclosing(http.chunks()) as chunks:
                async for chunk in chunks:
                    for data in parser.feed(chunk):
                        stream.take(data)
                    if stream.done:
                        break
        return stream.answer()

    def _request(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "min_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }

    @asynccontextmanager
    async def _asking(self, path: str, body: bytes) -> AsyncIterator[HttpAnswer]:
        """The answer's head; what goes wrong on the way becomes a RequestError."""
        try:
            async with requesting(self._address, path, headers=self._headers, body=body) as http:
                yield http
        except (OSError, HttpError) as error:
            raise RequestError(f"{type(error).__name__}: {error}", status=UNAVAILABLE) from error


class _Stream:
    """What the events of one answer have told so far."""

    def __init__(self, on_tokens: Callable[[int], None]) -> None:
        self.done = False
        self._on_tokens = on_tokens
        self._num_counted = 0
        self._counts_ids = False
        self._finished = False
        self._usage: dict[str, Any] = {}

    def take(self, data: str) -> None:
        """Read one event. Raises RequestError for one that says that the request failed."""
        if data.strip() == "[DONE]":
            self.done = True
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise RequestError(f"an event is no JSON: {data[:MAX_SHOWN_CHARS]}", status=UNAVAILABLE) from error
        if not isinstance(event, dict) or "error" in event or event.get("object") == "error":
            raise RequestError(f"the stream ended with an error: {_message(event)}", status=UNAVAILABLE)
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        token_ids = choice.get("token_ids")
        self._counts_ids = self._counts_ids or token_ids is not None
        count = len(token_ids) if token_ids is not None else bool(choice.get("text")) + 0
        self._finished = self._finished or choice.get("finish_reason") is not None
        if count:
            self._num_counted += count
            self._on_tokens(count)

    def answer(self) -> Answer:
        """Raises RequestError if the stream broke off."""
        if not self.done and not self._finished:
            message = f"the stream broke off after {self._num_counted} tokens, without [DONE]"
            raise RequestError(message, status=UNAVAILABLE)
        told = self._usage.get("completion_tokens")
        num_tokens = self._num_counted if self._counts_ids or not isinstance(told, int) else told
        details = self._usage.get("prompt_tokens_details") or {}
        return Answer(num_tokens=num_tokens, num_cached_tokens=details.get("cached_tokens"))


async def _check_stream(http: HttpAnswer) -> None:
    """Raise RequestError unless events follow."""
    if http.status != 200:
        body = await http.body()
        raise RequestError(f"HTTP {http.status}: {_message(_decode(body))}", status=http.status)
    kind = http.headers.get("content-type", "nothing")
    if not kind.startswith("text/event-stream"):
        raise RequestError(f"asked for a stream of events, the server sent {kind}", status=UNAVAILABLE)


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def _message(body: Any) -> str:
    """The text of an error, in whatever shape a server gives it."""
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if body.get(key)), json.dumps(body))
    return str(body)[:MAX_SHOWN_CHARS]


def _authorization(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


# -- before the load --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A server that answers, and the model of it that will be measured."""

    address: Address
    model: str


async def find_model(url: str, *, model: str | None, api_key: str | None, timeout_s: float) -> Found:
    """Ask a server for its models; without `model` its first is taken.

    Raises SettingsError (wrong URL, key or model), or JoinError when nobody answers."""
    address = Address.parse(url.rstrip("/").removesuffix("/v1"))
    names = _names(await _get(address, "/v1/models", api_key=api_key, timeout_s=timeout_s), address)
    if model is not None and model not in names:
        raise SettingsError(f"{address} has no model {model}; it has {', '.join(names)}")
    return Found(address, model or names[0])


async def _get(address: Address, path: str, *, api_key: str | None, timeout_s: float) -> Any:
    try:
        async with (
            asyncio.timeout(timeout_s),
            requesting(address, path, headers=_authorization(api_key)) as http,
        ):
            body = _decode(await http.body())
    except TimeoutError as error:
        raise JoinError(f"{address} did not answer within {timeout_s:g} s; is the model still loading?") from error
    except (OSError, HttpError) as error:
        raise JoinError(f"cannot reach {address}: {error}; is the server running there, on this port?") from error
    if http.status in (401, 403):
        hint = "set --api-key-file" if api_key is None else "the first key in --api-key-file is not its key"
        raise SettingsError(f"{address} answered {http.status}: {_message(body)}; {hint}")
    if http.status != 200:
        raise SettingsError(f"{address}{path} answered {http.status}: {_message(body)}; is this an OpenAI server?")
    return body


def _names(body: Any, address: Address) -> list[str]:
    data = body.get("data") if isinstance(body, dict) else None
    names = [each["id"] for each in data or () if isinstance(each, dict) and isinstance(each.get("id"), str)]
    if not names:
        raise SettingsError(f"{address}/v1/models names no model: is this an OpenAI server?")
    return names
