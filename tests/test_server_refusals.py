"""Requests that must be refused: always OpenAI's error shape, the field by name, and never a 500."""

import json
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import MODEL, FakeClient, app_for, call, ready_state, small_tokenizer

from tpdist.errors import CheckpointError
from tpdist.server import responses
from tpdist.server.tokenizer import Tokenizer

PATHS = {
    "/v1/completions": {"model": MODEL, "prompt": "hi"},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def client() -> FakeClient:
    return FakeClient(lambda request: [50, 51])


@pytest.fixture(scope="module")
def app(client: FakeClient, tokenizer: Tokenizer) -> FastAPI:
    return app_for(client, tokenizer, max_body_bytes=100_000)


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    responses.ErrorResponse.model_validate(response.json())
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 2.1),
        ("frequency_penalty", "1"),
        ("presence_penalty", -3),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"5.0": 1}),
        ("logit_bias", {"\u0665": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"320": 1}),
        ("logit_bias", {str(token): 1 for token in range(1025)}),
        ("logit_bias", [5]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("structured_outputs", {"json": {}}),
        ("guided_json", {}),
        ("guided_regex", "a*"),
        ("guided_choice", ["a"]),
        ("guided_grammar", "x"),
        ("use_beam_search", True),
        ("include_stop_str_in_output", 1),
        ("logprobs", "yes"),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", True),
        ("priority", 1.5),
        ("priority", 2**31),
        ("temprature", 1),
        ("metadata", ["a"]),
        ("service_tier", "priority"),
        ("prompt_cache_key", 5),
        ("safety_identifier", 5),
        ("temperature", -1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("min_tokens", -1),
        ("min_tokens", 1000),
        ("seed", 2**63),
        ("seed", 10**100),
        ("n", 0),
        ("n", 10_000),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", 2**80),
        ("stop", ""),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stop", ["a"] * 100),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [320]),
        ("stop_token_ids", "5"),
        ("ignore_eos", 1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("user", 5),
    ],
)
def test_a_field_that_is_wrong_unknown_or_unsupported_is_named(
    app: FastAPI, client: FakeClient, path: str, field: str, value: object
) -> None:
    client.requests.clear()
    error = error_of(call(app, "POST", path, json={**PATHS[path], field: value}))
    assert error["param"] is not None
    assert error["param"].split("[")[0] == field
    assert field in error["message"]
    assert client.requests == []


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "suffix", "x"),
        ("/v1/completions", "structured_outputs", {"json": {}}),
        ("/v1/chat/completions", "response_format", {"type": "json_schema"}),
        ("/v1/chat/completions", "tools", [{"type": "function"}]),
        ("/v1/chat/completions", "tool_choice", "auto"),
        ("/v1/chat/completions", "functions", [{"name": "f"}]),
        ("/v1/chat/completions", "modalities", ["text", "audio"]),
        ("/v1/chat/completions", "audio", {"voice": "x"}),
        ("/v1/chat/completions", "reasoning_effort", "high"),
        ("/v1/chat/completions", "verbosity", "low"),
        ("/v1/chat/completions", "store", True),
    ],
)
def test_an_unsupported_field_of_one_endpoint_is_named(app: FastAPI, path: str, field: str, value: object) -> None:
    error = error_of(call(app, "POST", path, json={**PATHS[path], field: value}))
    assert (error["param"], "not supported" in error["message"]) == (field, True)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"logprobs": 21}, "logprobs"),
        ("/v1/completions", {"echo": 1}, "echo"),
        ("/v1/completions", {"best_of": 1, "n": 2}, "best_of"),
        ("/v1/completions", {"best_of": 129}, "best_of"),
        ("/v1/completions", {"best_of": 2, "stream": True}, "best_of"),
        ("/v1/completions", {"prompt": ["x"] * 100, "best_of": 100}, "prompt"),
        ("/v1/completions", {"max_tokens": 0, "echo": False}, "max_tokens"),
        ("/v1/completions", {"prompt": [5] * 128, "max_tokens": 0, "echo": True}, "prompt"),
        ("/v1/completions", {"n": 2, "seed": 2**63 - 1}, "seed"),
        ("/v1/chat/completions", {"logprobs": 1}, "logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ("/v1/chat/completions", {"best_of": 1}, "best_of"),
        ("/v1/chat/completions", {"echo": False}, "echo"),
        ("/v1/chat/completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (
            "/v1/completions",
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_named(
    app: FastAPI, client: FakeClient, path: str, fields: dict[str, Any], param: str
) -> None:
    client.requests.clear()
    error = error_of(call(app, "POST", path, json={**PATHS[path], **fields}))
    assert error["param"] == param
    assert param in error["message"]
    assert client.requests == []


OFF = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"echo": False, "logprobs": None, "best_of": 1, "suffix": "", **OFF}),
        ("/v1/completions", {"best_of": 2, **OFF, "n": 2}),
        ("/v1/chat/completions", {"logprobs": False, "tools": [], "tool_choice": "none", "top_logprobs": 0, **OFF}),
    ],
)
def test_values_that_mean_off_are_accepted(app: FastAPI, path: str, fields: dict[str, Any]) -> None:
    assert call(app, "POST", path, json={**PATHS[path], **fields}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tier", ["auto", "default", None])
def test_openais_fields_that_cannot_change_an_answer_are_accepted(app: FastAPI, path: str, tier: str | None) -> None:
    fields = {"metadata": {"a": "b"}, "service_tier": tier, "prompt_cache_key": "k", "safety_identifier": "s"}
    assert call(app, "POST", path, json={**PATHS[path], **fields}).status_code == 200
    assert call(app, "POST", path, json={**PATHS[path], **dict.fromkeys(fields)}).status_code == 200


def test_metadata_are_strings(app: FastAPI) -> None:
    body = {**PATHS["/v1/completions"], "metadata": {"a": 5}}
    assert error_of(call(app, "POST", "/v1/completions", json=body))["param"] == "metadata.a"


def test_a_misspelt_field_gets_the_nearest_name(app: FastAPI) -> None:
    error = error_of(call(app, "POST", "/v1/completions", json={**PATHS["/v1/completions"], "temprature": 1}))
    assert "did you mean temperature?" in error["message"]


@pytest.mark.parametrize(
    "prompt", [5, None, [], "", [[]], [["a"]], [1, "a"], [1.5], [True], {"a": 1}, [[1], []], [-1], [320], [10**30]]
)
def test_a_prompt_that_is_none_is_refused(app: FastAPI, prompt: object) -> None:
    for options in ({}, {"echo": True, "logprobs": 0}):
        body = {"model": MODEL, "prompt": prompt, **options}
        assert error_of(call(app, "POST", "/v1/completions", json=body))["param"] == "prompt"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "alien", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "audio", "text": "x"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].image_url"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)
def test_wrong_messages_are_named_exactly(app: FastAPI, messages: object, param: str) -> None:
    body = {"model": MODEL, "messages": messages}
    assert error_of(call(app, "POST", "/v1/chat/completions", json=body))["param"] == param


@pytest.mark.parametrize("path", [*PATHS, "/tokenize", "/detokenize", "/v1/cluster/drain"])
@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'"text"',
        b"5",
        b'{"model": NaN}',
        b'{"temperature": 1e999}',
        b'{"temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 50_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"\x00",
    ],
)
def test_a_body_that_is_not_a_json_object_is_400(app: FastAPI, path: str, content: bytes) -> None:
    error_of(call(app, "POST", path, content=content, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("path", PATHS)
def test_a_body_without_the_json_content_type_says_so(app: FastAPI, path: str) -> None:
    content = json.dumps(PATHS[path]).encode()
    for headers in ({}, {"Content-Type": "text/plain"}):
        assert "Content-Type" in error_of(call(app, "POST", path, content=content, headers=headers))["message"]
    assert "no body" in error_of(call(app, "POST", path))["message"]


def test_a_body_that_is_too_large_is_413(app: FastAPI) -> None:
    async def chunks() -> Any:
        for _ in range(30):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    for content in (b" " * 100_001, chunks()):
        error = error_of(call(app, "POST", "/v1/completions", content=content, headers=headers), 413)
        assert "100000 bytes" in error["message"]


@pytest.mark.parametrize("path", [*PATHS, "/tokenize", "/detokenize"])
def test_an_unknown_model_is_404(app: FastAPI, path: str) -> None:
    body = {**PATHS.get(path, {"tokens": [5]} if path == "/detokenize" else {"prompt": "x"}), "model": "gpt-9"}
    error = error_of(call(app, "POST", path, json=body), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert MODEL in error["message"]


@pytest.mark.parametrize("body", [{"model": MODEL, "input": "x"}, None])
def test_embeddings_are_refused_in_words(app: FastAPI, body: object) -> None:
    assert "embeddings are not supported" in error_of(call(app, "POST", "/v1/embeddings", json=body))["message"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/moderations", "/v1/images/generations", "/v1/audio/speech"])
def test_openais_other_endpoints_are_404(app: FastAPI, path: str) -> None:
    error = error_of(call(app, "POST", path, json={"model": MODEL, "input": "x"}), 404)
    assert (error["code"], path in error["message"]) == ("unknown_url", True)


def test_unknown_urls_and_wrong_methods_have_openais_error_shape(app: FastAPI) -> None:
    for path in ("/", "/v1", "/v1/nothing", "/livez/", "/v1/completions/"):
        assert path in error_of(call(app, "GET", path), 404)["message"]
    for method, path in (("GET", "/v1/completions"), ("POST", "/livez"), ("DELETE", "/v1/models")):
        response = call(app, method, path)
        assert method in error_of(response, 405)["message"]
        assert response.headers["allow"]


@pytest.mark.parametrize("state", ["starting", "draining", "recovering", "failed"])
def test_a_cluster_that_is_not_ready_refuses_with_its_reason(tokenizer: Tokenizer, state: str) -> None:
    client = FakeClient(lambda request: [50])
    client.current = ready_state(state=state, reason="rank 1 loads")
    for path, body in PATHS.items():
        error = error_of(call(app_for(client, tokenizer), "POST", path, json=body), 503)
        assert state in error["message"]
        assert "rank 1 loads" in error["message"]


def test_a_tokenizer_that_is_loading_or_broken_refuses_with_its_reason(client: FakeClient) -> None:
    future: Future[Tokenizer] = Future()
    app = app_for(client, future)
    body = PATHS["/v1/completions"]
    assert "loading" in error_of(call(app, "POST", "/v1/completions", json=body), 503)["message"]
    future.set_exception(CheckpointError("no tokenizer in /model"))
    assert "/model" in error_of(call(app, "POST", "/tokenize", json={"prompt": "x"}), 503)["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("model", "prompt", "messages", "stream", "stream_options", "n", "max_tokens", "stop", "logit_bias", "seed")
FIELDS += ("best_of", "echo", "logprobs", "top_logprobs", "prompt_logprobs", "priority", "presence_penalty")


@pytest.mark.slow
@given(path=st.sampled_from(list(PATHS)), fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
@settings(max_examples=200, deadline=None)
def test_no_json_object_makes_the_server_fail(app: FastAPI, path: str, fields: dict[str, Any]) -> None:
    try:
        content = json.dumps({**PATHS[path], **fields}).encode()
    except UnicodeEncodeError:
        return
    response = call(app, "POST", path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
