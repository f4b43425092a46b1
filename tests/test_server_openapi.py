"""The OpenAPI document says what the server does: a look at it, and requests made up from it."""

from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from server_fakes import FakeClient, app_for, call, small_tokenizer

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
    assert fields["echo"]["enum"] == [None, False]
    assert "Not supported" in fields["echo"]["description"]
    assert "seed + i" in fields["n"]["description"]


@pytest.mark.slow
def test_requests_made_up_from_the_document_never_break_the_server(app: FastAPI) -> None:
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    for operation in document.get_all_operations():
        _try(operation.ok())


def _try(operation: Any) -> None:
    @given(case=operation.as_strategy())
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    def answers(case: Any) -> None:
        # A document cannot say all that makes a request valid: the vocabulary, the context, one field or the other.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    answers()
