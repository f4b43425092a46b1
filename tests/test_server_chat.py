"""/v1/chat/completions in one process: the prompt from the template, shapes, chunks."""

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from server_fakes import MODEL, FakeClient, app_for, call, small_tokenizer

from tpdist.server import responses
from tpdist.server.tokenizer import Tokenizer

TEXT = "hello \U0001f600"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def client(tokenizer: Tokenizer) -> FakeClient:
    return FakeClient(lambda request: tokenizer.encode(TEXT, add_special_tokens=False))


@pytest.fixture
def app(client: FakeClient, tokenizer: Tokenizer) -> FastAPI:
    return app_for(client, tokenizer)


def chat(app: FastAPI, **body: Any) -> httpx.Response:
    return call(app, "POST", "/v1/chat/completions", json={"model": MODEL, "messages": HI, **body})


def test_a_chat_answer_has_openais_shape(app: FastAPI) -> None:
    body = chat(app).json()
    responses.ChatResponse.model_validate(body)
    message = {"role": "assistant", "content": TEXT, "refusal": None}
    assert body["choices"] == [
        {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]


def test_the_prompt_is_what_the_template_writes_with_no_second_bos(
    app: FastAPI, client: FakeClient, tokenizer: Tokenizer
) -> None:
    chat(app, messages=[{"role": "developer", "content": "be brief"}, *HI])
    prompt = client.requests[0].prompt_token_ids
    assert tokenizer.decode(prompt) == "<|start|>system: be brief\n<|start|>user: hi\n<|start|>assistant: "
    assert prompt[0] == 1


def test_text_parts_are_joined_and_an_assistants_echo_is_accepted(
    app: FastAPI, client: FakeClient, tokenizer: Tokenizer
) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    echo = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []}
    assert chat(app, messages=[{"role": "user", "content": parts}, echo, *HI]).status_code == 200
    assert "user: a\nb\n" in tokenizer.decode(client.requests[0].prompt_token_ids)


def test_an_answer_may_fill_the_rest_of_the_context(app: FastAPI, client: FakeClient) -> None:
    chat(app)
    request = client.requests[0]
    assert request.sampling.max_tokens == 128 - len(request.prompt_token_ids)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit_work(app: FastAPI, client: FakeClient, name: str) -> None:
    body = chat(app, **{name: 3}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3


def test_two_different_limits_are_refused(app: FastAPI) -> None:
    response = chat(app, max_tokens=3, max_completion_tokens=4)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"


def test_a_chat_stream_opens_with_the_role_and_ends_with_the_reason(app: FastAPI) -> None:
    response = chat(app, stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    *chunks, usage = [json.loads(line) for line in lines[:-1]]
    assert {chunk["object"] for chunk in [*chunks, usage]} == {"chat.completion.chunk"}
    first, *rest = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in rest) == TEXT
    assert [choice["finish_reason"] for choice in (first, *rest)] == [None] * len(rest) + ["stop"]
    assert usage["choices"] == []
    assert usage["usage"] == chat(app).json()["usage"]


def test_messages_that_the_template_refuses_are_400(app: FastAPI) -> None:
    response = chat(app, messages=[{"role": "user", "content": "refuse"}])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


def test_a_model_without_a_template_says_what_to_do(
    client: FakeClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bare = small_tokenizer(tmp_path_factory.mktemp("bare"), chat_template=None)
    response = chat(app_for(client, bare))
    assert response.status_code == 400
    assert "--chat-template" in response.json()["error"]["message"]
