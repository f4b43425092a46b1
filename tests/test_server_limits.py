"""Requests that ask for too much: of the context, of the cache, or of one answer. The numbers are told."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from server_fakes import MODEL, FakeClient, app_for, call, small_tokenizer

from tpdist.server import responses


@pytest.fixture(scope="module")
def client() -> FakeClient:
    return FakeClient(lambda request: [50, 51])


@pytest.fixture(scope="module")
def app(client: FakeClient, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return app_for(client, small_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    responses.ErrorResponse.model_validate(response.json())
    error: dict[str, Any] = response.json()["error"]
    return error


def test_a_prompt_that_is_too_long_is_told_in_numbers(app: FastAPI) -> None:
    for body in ({"prompt": [5] * 128}, {"prompt": [5] * 100, "max_tokens": 29}):
        error = error_of(call(app, "POST", "/v1/completions", json={"model": MODEL, **body}))
        assert error["code"] == "context_length_exceeded"
        assert "129" in error["message"]
        assert "128" in error["message"]
    body = {"model": MODEL, "prompt": [5] * 100, "max_tokens": 28}
    assert call(app, "POST", "/v1/completions", json=body).status_code == 200


def test_a_prompt_that_is_only_scored_needs_room_for_one_token_more(app: FastAPI) -> None:
    body = {"model": MODEL, "prompt": [5] * 128, "max_tokens": 0, "echo": True}
    error = error_of(call(app, "POST", "/v1/completions", json=body))
    assert error["code"] == "context_length_exceeded"
    assert "scoring it needs room for one token more" in error["message"]
    assert "asked for" not in error["message"]
    assert call(app, "POST", "/v1/completions", json={**body, "prompt": [5] * 127}).status_code == 200


@pytest.mark.parametrize("min_tokens", [1, 5])
def test_tokens_that_are_to_be_made_where_none_may_be_are_refused(app: FastAPI, min_tokens: int) -> None:
    body = {"model": MODEL, "prompt": [5], "max_tokens": 0, "echo": True, "min_tokens": min_tokens}
    error = error_of(call(app, "POST", "/v1/completions", json=body))
    assert error["param"] == "min_tokens"
    assert error["message"] == f"min_tokens is {min_tokens}, but must be at most max_tokens=0"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 20}, "prompt_logprobs"),
        ({"logprobs": 20, "echo": True}, "logprobs"),
        ({"logprobs": 0, "echo": True, "prompt_logprobs": 20, "stream": False}, "prompt_logprobs"),
        ({"logprobs": 20, "echo": True, "stream": True}, "logprobs"),
    ],
)
def test_too_many_log_probabilities_of_prompts_are_told_in_numbers(
    app: FastAPI, client: FakeClient, fields: dict[str, Any], param: str
) -> None:
    client.requests.clear()
    body = {"model": MODEL, "max_tokens": 1, **fields}
    for prompts in ({"prompt": [[5] * 100] * 240}, {"prompt": [[5] * 100] * 24, "n": 10}):
        error = error_of(call(app, "POST", "/v1/completions", json={**body, **prompts}))
        assert error["param"] == param
        assert "504000" in error["message"]
        assert "500000" in error["message"]
    assert client.requests == []


def test_log_probabilities_of_the_answers_alone_have_no_such_limit(app: FastAPI) -> None:
    body = {"model": MODEL, "prompt": [[5] * 100] * 24, "n": 10, "max_tokens": 1, "logprobs": 20}
    assert call(app, "POST", "/v1/completions", json=body).status_code == 200


def test_too_many_choices_are_refused(app: FastAPI) -> None:
    body = {"model": MODEL, "prompt": ["x"] * 100, "n": 100}
    assert error_of(call(app, "POST", "/v1/completions", json=body))["param"] == "prompt"
