"""/v1/completions in one process: shapes, choices, sampling, streams, aborts and failures."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from server_fakes import MODEL, FakeClient, app_for, call, http_client, small_tokenizer

from tpdist.control.messages import Generate
from tpdist.errors import RequestError
from tpdist.server import responses
from tpdist.server.tokenizer import Tokenizer

TEXT = "hello \U0001f600 world"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def client(tokenizer: Tokenizer) -> FakeClient:
    return FakeClient(lambda request: tokenizer.encode(TEXT, add_special_tokens=False))


@pytest.fixture
def app(client: FakeClient, tokenizer: Tokenizer) -> FastAPI:
    return app_for(client, tokenizer)


def complete(app: FastAPI, **body: Any) -> httpx.Response:
    return call(app, "POST", "/v1/completions", json={"model": MODEL, "max_tokens": 64, **body})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ended as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_completion_has_openais_shape(app: FastAPI, tokenizer: Tokenizer) -> None:
    body = complete(app, prompt="the quick").json()
    responses.CompletionResponse.model_validate(body)
    num_prompt = len(tokenizer.encode("the quick", add_special_tokens=True))
    num_answer = len(tokenizer.encode(TEXT, add_special_tokens=False)) + 1
    assert body["choices"] == [
        {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_sixteen_tokens_are_made_when_nothing_is_said(app: FastAPI, client: FakeClient) -> None:
    call(app, "POST", "/v1/completions", json={"model": MODEL, "prompt": "x"})
    assert client.requests[0].sampling.max_tokens == 16


def test_the_default_shrinks_to_the_room_that_is_left(app: FastAPI, client: FakeClient) -> None:
    body = {"model": MODEL, "prompt": [5] * 120}
    assert call(app, "POST", "/v1/completions", json=body).status_code == 200
    assert client.requests[0].sampling.max_tokens == 8


def test_all_sampling_parameters_reach_the_engine(app: FastAPI, client: FakeClient) -> None:
    chosen = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": -0.5,
        "presence_penalty": 2,
        "include_stop_str_in_output": True,
        "min_tokens": 2,
        "seed": 7,
        "stop": "zzz",
        "stop_token_ids": [9],
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    assert complete(app, prompt="x", logit_bias={"5": 1, "0": -100}, priority=-3, **chosen).status_code == 200
    assert client.requests[0].priority == -3
    sampling = client.requests[0].sampling
    assert sampling.logit_bias == {5: 1.0, 0: -100.0}
    expected = {**chosen, "top_k": 0, "stop": ("zzz",), "stop_token_ids": (9,), "max_tokens": 64}
    assert {name: getattr(sampling, name) for name in expected} == expected
    assert client.requests[0].eos_token_ids == (0,)


def test_null_means_the_default(app: FastAPI, client: FakeClient) -> None:
    fields = ("temperature", "top_p", "n", "best_of", "seed", "stop", "stream", "stream_options", "logprobs", "echo")
    fields += ("user", "logit_bias", "frequency_penalty", "prompt_logprobs", "include_stop_str_in_output", "priority")
    assert complete(app, prompt="x", **dict.fromkeys(fields)).status_code == 200
    assert client.requests[0].sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [([5, 6], [(5, 6)]), ([[5, 6], [7]], [(5, 6), (7,)]), ([[5]], [(5,)])],
)
def test_prompts_of_token_ids_go_to_the_engine_as_they_are(
    app: FastAPI, client: FakeClient, prompt: object, expected: object
) -> None:
    assert complete(app, prompt=prompt).status_code == 200
    assert [request.prompt_token_ids for request in client.requests] == expected


def test_choices_come_in_the_order_of_prompts_then_answers(tokenizer: Tokenizer) -> None:
    def echo(request: Generate) -> list[int]:
        return [*request.prompt_token_ids, 50 + (request.sampling.seed or 0)]

    client = FakeClient(echo)
    body = complete(app_for(client, tokenizer), prompt=["one", "two"], n=2, seed=3, return_token_ids=True).json()
    choices = body["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["token_ids"][-2] for choice in choices] == [53, 54, 53, 54]
    assert [choice["text"][:3] for choice in choices] == ["one", "one", "two", "two"]
    assert len({request.request_id for request in client.requests}) == 4
    assert body["usage"]["prompt_tokens"] == len(tokenizer.encode("onetwo", add_special_tokens=False))


def test_token_ids_are_returned_when_asked_for(app: FastAPI, tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode(TEXT, add_special_tokens=False), 0]
    assert complete(app, prompt="x", return_token_ids=True).json()["choices"][0]["token_ids"] == tokens
    chunks = events(complete(app, prompt="x", return_token_ids=True, stream=True))
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == tokens


def test_a_stream_adds_up_to_the_whole_answer(app: FastAPI) -> None:
    chunks = events(complete(app, prompt="x", stream=True))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == TEXT
    assert not any("\ufffd" in choice["text"] for choice in choices)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_a_stream_of_several_choices_ends_each_of_them(app: FastAPI) -> None:
    chunks = events(complete(app, prompt=["x", "y"], n=2, stream=True))
    texts = dict.fromkeys(range(4), "")
    reasons = dict.fromkeys(range(4), "")
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] += choice["finish_reason"] or ""
    assert set(texts.values()) == {TEXT}
    assert set(reasons.values()) == {"stop"}


def test_usage_comes_last_with_no_choices_when_asked_for(app: FastAPI) -> None:
    chunks = events(complete(app, prompt="x", stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == complete(app, prompt="x").json()["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_a_stop_string_across_tokens_cuts_the_text_and_aborts_the_engine(app: FastAPI, client: FakeClient) -> None:
    body = complete(app, prompt="x", stop=["never", "o \U0001f600 w"]).json()
    assert body["choices"][0]["text"] == "hell"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert client.aborted == [client.requests[0].request_id]


def test_a_stop_string_never_shows_in_a_stream(app: FastAPI, client: FakeClient) -> None:
    chunks = events(complete(app, prompt="x", stop="o \U0001f600 w", stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hell"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(client.aborted) == 1


def test_a_finished_request_is_not_aborted(app: FastAPI, client: FakeClient) -> None:
    complete(app, prompt=["x", "y"])
    events(complete(app, prompt="x", stream=True))
    assert client.aborted == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_lost_before_its_first_token_is_503(tokenizer: Tokenizer, stream: bool) -> None:
    client = FakeClient(lambda request: [50], fail_after=0)
    response = complete(app_for(client, tokenizer), prompt="x", stream=stream)
    assert response.status_code == 503
    assert response.json()["error"] == {
        "message": "rank 1 was lost",
        "type": "service_unavailable",
        "param": None,
        "code": None,
    }


def test_the_engines_own_refusal_is_400(tokenizer: Tokenizer) -> None:
    refusal = RequestError("too long for the cache", param="prompt")
    client = FakeClient(lambda request: [50], fail_after=0, failure=refusal)
    response = complete(app_for(client, tokenizer), prompt="x", stream=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_a_request_lost_midway_is_503_or_an_error_event(tokenizer: Tokenizer) -> None:
    client = FakeClient(lambda request: [50, 51, 52], fail_after=2)
    app = app_for(client, tokenizer)
    assert complete(app, prompt="x").status_code == 503
    response = complete(app, prompt="x", stream=True)
    assert response.status_code == 200
    *chunks, last, end = response.text.split("\n\n")
    assert len(chunks) == 2
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "rank 1 was lost"
    assert end == ""


def test_one_lost_choice_aborts_the_others(tokenizer: Tokenizer) -> None:
    client = FakeClient(lambda request: [50] * (2 if request.prompt_token_ids == (5,) else 40), fail_after=20)
    response = complete(app_for(client, tokenizer), prompt=[[6], [6], [6]])
    assert response.status_code == 503
    assert len(client.aborted) == 3


def test_a_bug_is_500_without_its_details(tokenizer: Tokenizer) -> None:
    client = FakeClient(lambda request: [50, 51], fail_after=0, failure=ZeroDivisionError("secret"))
    response = complete(app_for(client, tokenizer), prompt="x")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "internal_server_error"


def test_an_answer_that_ends_without_a_reason_is_an_error(tokenizer: Tokenizer) -> None:
    client = FakeClient(lambda request: [])
    app = app_for(client, tokenizer, eos_token_ids=[])
    assert complete(app, prompt="x").status_code == 503


def test_the_cancelled_request_of_a_gone_client_aborts_all_its_sequences(tokenizer: Tokenizer) -> None:
    client = FakeClient(lambda request: [50] * 40, hang_after=2)
    app = app_for(client, tokenizer)

    async def leave(stream: bool) -> None:
        async with http_client(app) as http:
            body = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 30, "stream": stream}
            request = asyncio.create_task(http.post("/v1/completions", json=body))
            await client.hanging.wait()
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    for stream in (False, True):
        client.aborted.clear()
        client.hanging = asyncio.Event()
        asyncio.run(leave(stream))
        assert len(client.aborted) == 2
