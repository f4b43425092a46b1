"""The OpenAPI document says what the server does: a look at it, and requests made up from it."""

from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance
from server_fakes import VOCAB_SIZE, FakeClient, app_for, call, small_tokenizer

from tpdist.server import responses

GENERATION = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    tokenizer = small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return app_for(FakeClient(lambda request: [50, 51]), tokenizer, model_names=["tiny"])


@pytest.fixture(scope="module")
def document(app: FastAPI) -> dict[str, Any]:
    body: dict[str, Any] = call(app, "GET", "/openapi.json").json()
    return body


def test_every_endpoint_of_the_contract_is_documented(app: FastAPI, document: dict[str, Any]) -> None:
    probes = {"/livez", "/readyz", "/health", "/metrics", "/v1/cluster", "/v1/models", "/v1/models/{model}"}
    posts = {*GENERATION, "/tokenize", "/detokenize", "/v1/cluster/drain"}
    assert set(document["paths"]) == probes | posts
    assert call(app, "GET", "/docs").status_code == 200


@pytest.mark.parametrize("path", GENERATION)
def test_generation_documents_its_errors_in_one_shape(document: dict[str, Any], path: str) -> None:
    documented = document["paths"][path]["post"]["responses"]
    assert set(documented) == {"200", "400", "401", "404", "413", "503", "default"}
    for status, entry in documented.items():
        expected = {"application/json", "text/event-stream"} if status == "200" else {"application/json"}
        assert set(entry["content"]) == expected
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_a_field_that_is_not_supported_says_so(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["suffix"]["enum"] == [None, ""]
    assert "Not supported" in fields["suffix"]["description"]
    assert "seed + i" in fields["n"]["description"]


COMMON = {
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "temperature": st.floats(0, 2),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.integers(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1).map(str), st.floats(-100, 100), max_size=3),
    "min_tokens": st.integers(0, 3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.sampled_from("eo wq"), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
    "include_stop_str_in_output": st.booleans(),
    "prompt_logprobs": st.integers(0, 20) | st.none(),
    "priority": st.integers(-5, 5),
    "return_token_ids": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}),
}
MIXES = {
    "/v1/completions": st.fixed_dictionaries(
        {"prompt": st.text(min_size=1, max_size=5) | st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=5)},
        optional={
            **COMMON,
            "best_of": st.integers(1, 4),
            "echo": st.booleans(),
            "logprobs": st.integers(0, 20) | st.none(),
            "max_tokens": st.integers(0, 5),
        },
    ),
    "/v1/chat/completions": st.fixed_dictionaries(
        {"messages": st.just([{"role": "user", "content": "hi"}])},
        optional={
            **COMMON,
            "logprobs": st.booleans(),
            "top_logprobs": st.integers(0, 20),
            "max_completion_tokens": st.integers(1, 5),
        },
    ),
}
BODIES = {"/v1/completions": responses.CompletionResponse, "/v1/chat/completions": responses.ChatResponse}


@pytest.mark.parametrize("path", GENERATION)
@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_any_mix_of_options_gives_a_documented_answer_or_names_what_does_not_fit(
    app: FastAPI, path: str, data: st.DataObject
) -> None:
    body = data.draw(MIXES[path])
    response = call(app, "POST", path, json={"model": "tiny", **body})
    if response.status_code == 400:
        param = responses.ErrorResponse.model_validate(response.json()).error.param
        assert param is not None
        assert param.split(".")[0] in body
        return
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in response.text
    else:
        answer = BODIES[path].model_validate(response.json())
        assert len(answer.choices) == body.get("n", 1)


@pytest.mark.slow
def test_requests_made_up_from_the_document_never_break_the_server(app: FastAPI) -> None:
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    for operation in document.get_all_operations():
        _try(operation.ok())


def _try(operation: Any) -> None:
    @given(case=operation.as_strategy())
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def answers(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # any other name would be all that is refused
        # A document cannot say all that makes a request valid: the vocabulary, the context, one field or the other.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    answers()
