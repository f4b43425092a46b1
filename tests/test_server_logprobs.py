"""Log-probabilities, prompt_logprobs and echo over HTTP: exact shapes, and streams that add up to whole answers."""

import asyncio
import json
import math
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from server_fakes import MODEL, VOCAB_SIZE, FakeClient, app_for, call, logprobs_at, small_tokenizer

from tpdist.control.messages import Generate, TokenLogprobs, TokenOutput
from tpdist.server import responses
from tpdist.server.echo import make_echo
from tpdist.server.logprobs import LEAST_LOGPROB, by_token, chat_logprobs, completion_logprobs
from tpdist.server.tokenizer import Tokenizer

PROMPT = "the \U0001f600 fox"
TEXT = "hello \U0001f600 world"
END = 0
HALF = "\ufffd"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def client(tokenizer: Tokenizer) -> FakeClient:
    return FakeClient(lambda request: tokenizer.encode(TEXT, add_special_tokens=False), per_step=2)


@pytest.fixture
def app(client: FakeClient, tokenizer: Tokenizer) -> FastAPI:
    return app_for(client, tokenizer)


@pytest.fixture
def tokens(tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode(TEXT, add_special_tokens=False), END]


@pytest.fixture
def prompt_tokens(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(PROMPT, add_special_tokens=True)


def complete(app: FastAPI, **body: Any) -> httpx.Response:
    return call(app, "POST", "/v1/completions", json={"model": MODEL, "prompt": PROMPT, "max_tokens": 64, **body})


def chat(app: FastAPI, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "hi"}]
    return call(app, "POST", "/v1/chat/completions", json={"model": MODEL, "messages": messages, **body})


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    assert lines[-2:] == ["[DONE]", ""]
    return [json.loads(line) for line in lines[:-2]]


def own(tokens: Sequence[int]) -> list[float]:
    return [-1.0 - token / 1000 for token in tokens]


def texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in tokens]


def test_a_completions_logprobs_have_openais_shape(app: FastAPI, tokenizer: Tokenizer, tokens: list[int]) -> None:
    body = complete(app, logprobs=2).json()
    responses.CompletionResponse.model_validate(body)
    found = body["choices"][0]["logprobs"]
    assert set(found) == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert found["tokens"] == texts(tokenizer, tokens)
    assert found["token_logprobs"] == own(tokens)
    for token, top in zip(tokens, found["top_logprobs"], strict=True):
        other = tokenizer.decode([(token + 1) % VOCAB_SIZE])
        assert top == {other: -0.5, tokenizer.decode([token]): -1.0 - token / 1000}


def test_a_tokens_offset_is_where_it_begins_in_the_text(app: FastAPI, tokens: list[int]) -> None:
    choice = complete(app, logprobs=0).json()["choices"][0]
    text, found = choice["text"], choice["logprobs"]
    assert text == TEXT
    assert HALF in found["tokens"], "the smiley is several tokens"
    for offset, token in zip(found["text_offset"][:-1], found["tokens"][:-1], strict=True):
        assert text[offset:].startswith("\U0001f600" if HALF in token else token)
    assert found["text_offset"][-1] == len(text), "the end of text stands after it"


def test_logprobs_of_zero_are_of_the_tokens_alone(app: FastAPI, tokenizer: Tokenizer, tokens: list[int]) -> None:
    found = complete(app, logprobs=0).json()["choices"][0]["logprobs"]
    pairs = zip(texts(tokenizer, tokens), own(tokens), strict=True)
    assert found["top_logprobs"] == [{text: logprob} for text, logprob in pairs]


def test_what_is_impossible_is_a_number_in_json(app: FastAPI) -> None:
    found = complete(app, logprobs=5).json()["choices"][0]["logprobs"]
    assert min(found["top_logprobs"][0].values()) == LEAST_LOGPROB == -9999.0
    content = chat(app, logprobs=True, top_logprobs=20).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"][-1]["logprob"] == -9999.0
    assert len(content[0]["top_logprobs"]) == 20


def test_a_number_that_is_none_is_the_least(tokenizer: Tokenizer) -> None:
    entry = TokenLogprobs((50, 51), (math.nan, -math.inf), 1)
    assert chat_logprobs(tokenizer, [entry], most=1)["content"][0]["logprob"] == LEAST_LOGPROB
    assert completion_logprobs(tokenizer, [entry], [0], most=1)["token_logprobs"] == [LEAST_LOGPROB]


def test_of_tokens_that_read_the_same_the_first_counts(tokenizer: Tokenizer) -> None:
    halves = [token for token in range(2, VOCAB_SIZE) if tokenizer.token_text(token) == HALF][:3]
    entry = TokenLogprobs((halves[0], *halves[1:]), (-3.0, -1.0, -2.0), 4)
    assert completion_logprobs(tokenizer, [entry], [0], most=2)["top_logprobs"] == [{HALF: -3.0}]


def test_a_chats_logprobs_have_openais_shape(app: FastAPI, tokenizer: Tokenizer, tokens: list[int]) -> None:
    body = chat(app, logprobs=True, top_logprobs=2).json()
    responses.ChatResponse.model_validate(body)
    found = body["choices"][0]["logprobs"]
    assert found["refusal"] is None
    assert [entry["token"] for entry in found["content"]] == texts(tokenizer, tokens)
    assert [entry["logprob"] for entry in found["content"]] == own(tokens)
    assert b"".join(bytes(entry["bytes"]) for entry in found["content"][:-1]) == TEXT.encode()
    for token, entry in zip(tokens, found["content"], strict=True):
        first, second = entry["top_logprobs"]
        assert first["token"] == tokenizer.decode([(token + 1) % VOCAB_SIZE])
        assert second == {name: entry[name] for name in ("token", "logprob", "bytes")}


def test_a_chat_may_want_the_logprobs_of_its_tokens_alone(app: FastAPI, client: FakeClient) -> None:
    content = chat(app, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert {len(entry["top_logprobs"]) for entry in content} == {0}
    assert client.requests[0].sampling.logprobs == 0
    assert chat(app, logprobs=False).json()["choices"][0]["logprobs"] is None
    assert client.requests[1].sampling.logprobs is None


def test_a_stop_string_keeps_the_logprobs_of_the_tokens_that_made_it(app: FastAPI, tokens: list[int]) -> None:
    choice = complete(app, logprobs=1, stop="o \U0001f600 w", return_token_ids=True).json()["choices"][0]
    assert choice["text"] == "hell"
    assert choice["stop_reason"] == "o \U0001f600 w"
    assert choice["token_ids"] == tokens[: len(choice["token_ids"])]
    assert choice["logprobs"]["token_logprobs"] == own(choice["token_ids"])


def added(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The lists of several logprobs objects, one after the other."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, values in (part or {}).items():
            whole[name] = (whole.get(name) or []) + values if values is not None else None
    return whole or None


def added_choices(chunks: Sequence[dict[str, Any]], num_choices: int) -> list[dict[str, Any]]:
    choices = [
        [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i] for i in range(num_choices)
    ]
    return [
        {
            "index": index,
            "text": "".join(part["text"] if "text" in part else part["delta"].get("content", "") for part in parts),
            "logprobs": added([part["logprobs"] for part in parts]),
            "finish_reason": parts[-1]["finish_reason"],
            "stop_reason": parts[-1]["stop_reason"],
            "token_ids": [token for part in parts for token in part.get("token_ids", ())],
        }
        for index, parts in enumerate(choices)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 3},
        {"logprobs": 0, "stop": "world"},
        {"logprobs": 1, "stop": "o \U0001f600", "include_stop_str_in_output": True},
        {"logprobs": 2, "n": 3, "seed": 1},
        {"echo": True},
        {"echo": True, "logprobs": 1, "n": 2},
        {"echo": True, "logprobs": 1, "n": 2, "prompt": [[5, 6, 7], [9]]},
        {"echo": True, "logprobs": 1, "n": 2, "max_tokens": 0},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "max_tokens": 0},
        {"echo": True, "logprobs": 1, "prompt": [[5, 6, 7], [9]]},
        {"echo": True, "logprobs": 1, "prompt": [[9]], "max_tokens": 0},
    ],
)
def test_the_chunks_of_a_completion_add_up_to_the_whole(app: FastAPI, options: dict[str, Any]) -> None:
    whole = complete(app, return_token_ids=True, **options).json()
    usage = {"stream_options": {"include_usage": True}}
    *chunks, last = chunks_of(complete(app, return_token_ids=True, stream=True, **usage, **options))
    assert added_choices(chunks, len(whole["choices"])) == whole["choices"]
    assert last["usage"] == whole["usage"]


@pytest.mark.parametrize("options", [{"logprobs": True}, {"logprobs": True, "top_logprobs": 3, "n": 2}])
def test_the_chunks_of_a_chat_add_up_to_the_whole(app: FastAPI, options: dict[str, Any]) -> None:
    whole = chat(app, **options).json()
    found = added_choices(chunks_of(chat(app, stream=True, **options)), len(whole["choices"]))
    assert [choice["logprobs"] for choice in found] == [choice["logprobs"] for choice in whole["choices"]]
    assert [choice["text"] for choice in found] == [choice["message"]["content"] for choice in whole["choices"]]


def test_an_echoed_prompt_begins_the_text_and_its_logprobs(
    app: FastAPI, client: FakeClient, prompt_tokens: list[int], tokens: list[int]
) -> None:
    body = complete(app, echo=True, logprobs=1).json()
    responses.CompletionResponse.model_validate(body)
    choice = body["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == PROMPT + TEXT
    assert found["token_logprobs"] == [None, *own(prompt_tokens[1:]), *own(tokens)]
    assert found["top_logprobs"][0] is None
    assert len(found["tokens"]) == len(found["text_offset"]) == len(prompt_tokens) + len(tokens)
    assert found["text_offset"][len(prompt_tokens)] == len(PROMPT)
    for offset, token in zip(found["text_offset"][:-1], found["tokens"][:-1], strict=True):
        assert choice["text"][offset:].startswith("\U0001f600" if HALF in token else token)
    assert client.requests[0].sampling.prompt_logprobs == 1


class FirstAnswerLast(FakeClient):
    """Answer 0 of a prompt waits until answer 1 is complete."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(lambda request: tokens)
        self._complete = asyncio.Event()

    async def generate(self, request: Generate) -> AsyncGenerator[TokenOutput, None]:
        if request.request_id.endswith("-0"):
            await self._complete.wait()
        async with aclosing(super().generate(request)) as outputs:
            async for output in outputs:
                if output.finish_reason is not None:
                    self._complete.set()
                yield output


@pytest.mark.parametrize("options", [{}, {"max_tokens": 0}])
def test_an_answer_that_overtakes_the_first_waits_for_its_prompts_logprobs(
    tokenizer: Tokenizer, prompt_tokens: list[int], tokens: list[int], options: dict[str, Any]
) -> None:
    app = app_for(FirstAnswerLast(tokens[:-1]), tokenizer)
    chunks = chunks_of(complete(app, echo=True, logprobs=1, n=2, stream=True, **options))
    made = [] if options else own(tokens)
    for choice in added_choices(chunks, 2):
        assert choice["logprobs"]["token_logprobs"] == [None, *own(prompt_tokens[1:]), *made]


@pytest.mark.parametrize(
    "options", [{"echo": True, "logprobs": 1}, {"prompt_logprobs": 1}, {"prompt_logprobs": 0, "best_of": 3, "n": 2}]
)
def test_a_prompt_is_scored_once_for_all_of_its_answers(
    app: FastAPI, client: FakeClient, prompt_tokens: list[int], options: dict[str, Any]
) -> None:
    body = complete(app, prompt=[prompt_tokens, prompt_tokens[:4]], **{"n": 3, **options}).json()
    asked = [request.sampling.prompt_logprobs for request in client.requests]
    most = options.get("prompt_logprobs", 1)
    assert asked == [most, None, None] * 2
    for index, choice in enumerate(body["choices"]):
        scored = prompt_tokens if index < len(body["choices"]) // 2 else prompt_tokens[:4]
        if "echo" in options:
            assert choice["logprobs"]["token_logprobs"][: len(scored)] == [None, *own(scored[1:])]
        else:
            assert [next(iter(entry)) for entry in choice["prompt_logprobs"][1:]] == list(map(str, scored[1:]))


@pytest.mark.parametrize(
    "options", [{"echo": True, "logprobs": 1}, {"echo": True, "logprobs": 1, "stream": True}, {"prompt_logprobs": 1}]
)
def test_a_prompts_logprobs_are_not_shaped_on_the_event_loops_thread(
    app: FastAPI, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    threads = []
    original = tokenizer.token_text

    def token_text(token_id: int) -> str:
        threads.append(threading.current_thread())
        return original(token_id)

    monkeypatch.setattr(tokenizer, "token_text", token_text)
    assert complete(app, **{"echo": True, "max_tokens": 0, "n": 2, **options}).status_code == 200
    assert threads
    assert threading.current_thread() not in threads


def test_an_echo_without_logprobs_asks_for_none(app: FastAPI, client: FakeClient) -> None:
    choice = complete(app, echo=True, return_token_ids=True).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]) == (PROMPT + TEXT, None)
    assert client.requests[0].sampling.prompt_logprobs is None


def test_an_echo_of_token_ids_is_their_text(app: FastAPI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|start|>the fox", add_special_tokens=False)
    choice = complete(app, prompt=ids, echo=True, logprobs=0).json()["choices"][0]
    assert choice["text"] == "<|start|>the fox" + TEXT
    assert choice["logprobs"]["text_offset"][:2] == [0, len("<|start|>")]


def test_a_prompt_that_is_a_part_of_its_own_beginning_of_text_has_the_offsets_of_its_tokens(
    tokenizer: Tokenizer,
) -> None:
    start, *_ = tokenizer.encode("<|start|>", add_special_tokens=False)
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "start"]
    assert make_echo(tokenizer, "start", (start, *letters)).offsets == (0, 0, 1, 2, 3, 4)
    assert make_echo(tokenizer, "other", (start, *letters)).offsets == (0, 5, 5, 5, 5, 5), "text that is not there"


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_of_no_tokens_scores_the_prompt_and_generates_nothing(
    app: FastAPI, client: FakeClient, prompt_tokens: list[int], stream: bool
) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    response = complete(app, echo=True, logprobs=1, max_tokens=0, return_token_ids=True, stream=stream, **options)
    if stream:
        *chunks, last = chunks_of(response)
        choice, usage = added_choices(chunks, 1)[0], last["usage"]
    else:
        choice, usage = response.json()["choices"][0], response.json()["usage"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == (PROMPT, "length", [])
    assert choice["logprobs"]["token_logprobs"] == [None, *own(prompt_tokens[1:])]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (0, len(prompt_tokens))
    assert client.requests[0].sampling.max_tokens == 1


def test_the_prompts_logprobs_have_vllms_shape(app: FastAPI, tokenizer: Tokenizer, prompt_tokens: list[int]) -> None:
    body = complete(app, prompt_logprobs=1, n=2).json()
    responses.CompletionResponse.model_validate(body)
    first, *rest = body["choices"][0]["prompt_logprobs"]
    assert first is None
    for token, entry in zip(prompt_tokens[1:], rest, strict=True):
        other = (token + 1) % VOCAB_SIZE
        own_entry = {"logprob": -1.0 - token / 1000, "rank": 2, "decoded_token": tokenizer.decode([token])}
        top_entry = {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.decode([other])}
        assert list(entry.items()) == [(str(token), own_entry), (str(other), top_entry)]
    assert body["choices"][1]["prompt_logprobs"] == body["choices"][0]["prompt_logprobs"]
    assert body["choices"][0]["logprobs"] is None


def test_a_chats_prompt_logprobs_stand_beside_its_choices(app: FastAPI, client: FakeClient) -> None:
    body = chat(app, prompt_logprobs=5).json()
    responses.ChatResponse.model_validate(body)
    prompt = client.requests[0].prompt_token_ids
    assert [next(iter(entry)) for entry in body["prompt_logprobs"][1:]] == [str(token) for token in prompt[1:]]
    assert min(value["logprob"] for value in body["prompt_logprobs"][1].values()) == LEAST_LOGPROB
    assert "prompt_logprobs" not in chat(app).json()


def test_echo_and_prompt_logprobs_each_show_as_many_as_they_were_asked_for(app: FastAPI, client: FakeClient) -> None:
    choice = complete(app, prompt_logprobs=3, logprobs=1, echo=True).json()["choices"][0]
    assert client.requests[0].sampling.prompt_logprobs == 3
    assert {len(entry) for entry in choice["prompt_logprobs"][1:]} == {3}
    assert max(len(entry) for entry in choice["logprobs"]["top_logprobs"][1:]) == 2


def test_ranks_are_those_of_the_position(tokenizer: Tokenizer) -> None:
    found = by_token(tokenizer, logprobs_at(50, 3), most=3)
    assert {token: entry.rank for token, entry in found.items()} == {50: 2, 51: 1, 52: 3}
    assert list(found) == [50, 51, 52]
    assert by_token(tokenizer, logprobs_at(50, 3), most=0) == {50: found[50]}
