"""Probes, metrics, models, cluster, drain, tokenize: what operators and tools see. And who may see it."""

from concurrent.futures import Future
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import MODEL, FakeClient, app_for, call, ready_state, small_tokenizer

from tpdist.control.messages import EngineStats, RestartView
from tpdist.errors import CheckpointError
from tpdist.server import responses
from tpdist.server.tokenizer import Tokenizer

PROBES = ("/livez", "/readyz", "/health")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def client() -> FakeClient:
    return FakeClient(lambda request: [50, 51])


@pytest.fixture
def app(client: FakeClient, tokenizer: Tokenizer) -> FastAPI:
    return app_for(client, tokenizer)


def test_a_ready_node_says_so(app: FastAPI) -> None:
    for path in PROBES:
        assert call(app, "GET", path).status_code == 200
    assert call(app, "GET", "/readyz").json() == {"state": "ready", "reason": "", "epoch": 3, "phase": "ready"}


@pytest.mark.parametrize("path", [*PROBES, "/metrics", "/v1/models", "/v1/cluster"])
def test_what_can_be_read_can_be_asked_for_without_its_body(app: FastAPI, path: str) -> None:
    assert call(app, "HEAD", path).status_code == 200


@pytest.mark.parametrize("state", ["starting", "draining", "recovering", "failed"])
def test_a_node_that_is_not_ready_is_alive_and_gives_its_reason(app: FastAPI, client: FakeClient, state: str) -> None:
    client.current = ready_state(state=state, reason="rank 1 loads", phase="load")
    assert call(app, "GET", "/livez").status_code == 200
    for path in ("/readyz", "/health"):
        response = call(app, "GET", path)
        assert response.status_code == 503
        assert response.json() == {"state": state, "reason": "rank 1 loads", "epoch": 3, "phase": "load"}


def test_a_ready_cluster_without_known_limits_is_not_ready(app: FastAPI, client: FakeClient) -> None:
    client.current = ready_state(engine=None)
    assert call(app, "GET", "/readyz").status_code == 503


def test_a_node_whose_tokenizer_is_loading_is_not_ready(client: FakeClient, tokenizer: Tokenizer) -> None:
    future: Future[Tokenizer] = Future()
    app = app_for(client, future)
    response = call(app, "GET", "/readyz")
    assert response.status_code == 503
    assert response.json()["state"] == "starting"
    assert response.json()["reason"] == "the tokenizer is loading"
    future.set_result(tokenizer)
    assert call(app, "GET", "/readyz").status_code == 200


def test_a_node_whose_tokenizer_is_broken_says_why(client: FakeClient) -> None:
    future: Future[Tokenizer] = Future()
    future.set_exception(CheckpointError("no tokenizer in /model"))
    assert "/model" in call(app_for(client, future), "GET", "/readyz").json()["reason"]


def test_the_cluster_has_the_documented_shape(app: FastAPI) -> None:
    body = call(app, "GET", "/v1/cluster").json()
    responses.Cluster.model_validate(body)
    assert set(body) == {"state", "epoch", "phase", "nodes", "plan", "restarts"}
    assert body["nodes"][1]["ranks"][0] == {
        "rank": 1,
        "local_rank": 0,
        "pid": 101,
        "device": "cpu",
        "state": "ready",
        "step": 7,
        "weight_bytes": 1,
        "kv_blocks": 16,
    }
    assert body["restarts"] == [{"epoch": 2, "cause": "rank 1 on worker-0 was killed"}]


def test_all_names_of_the_model_are_listed(app: FastAPI) -> None:
    body = call(app, "GET", "/v1/models").json()
    responses.ModelList.model_validate(body)
    assert [model["id"] for model in body["data"]] == [MODEL, "alias"]
    assert call(app, "GET", "/v1/models/alias").json() == body["data"][1]
    assert call(app, "GET", "/v1/models/org/other").status_code == 404


def samples(app: FastAPI) -> dict[str, float]:
    text = call(app, "GET", "/metrics").text
    families = text_string_to_metric_families(text)
    return {
        sample.name
        + "".join(sample.labels.values() if "_bucket" not in sample.name else sample.labels["le"]): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize("options", [{"n": 3}, {"best_of": 3}, {"n": 3, "stream": True}])
def test_a_prompt_with_several_answers_counts_once(app: FastAPI, options: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": [[5, 6, 7], [8]], **options}
    assert call(app, "POST", "/v1/completions", json=body).status_code == 200
    assert samples(app)["tpdist_prompt_tokens_total"] == 4
    assert samples(app)["tpdist_request_success_totalstop"] == 6


def test_metrics_tell_of_the_cluster_and_of_finished_requests(app: FastAPI) -> None:
    body = {"model": MODEL, "prompt": [5, 6, 7]}
    assert call(app, "POST", "/v1/completions", json=body).status_code == 200
    assert call(app, "POST", "/v1/completions", json={**body, "max_tokens": 1}).status_code == 200
    found = samples(app)
    expected = {
        "tpdist_num_requests_running": 4,
        "tpdist_num_requests_waiting": 5,
        "tpdist_kv_cache_usage_perc": 0.25,
        "tpdist_num_preemptions_total": 6,
        "tpdist_cluster_epoch": 3,
        "tpdist_ranks_expected": 2,
        "tpdist_ranks_ready": 2,
        "tpdist_prompt_tokens_total": 6,
        "tpdist_generation_tokens_total": 4,
        "tpdist_request_success_totalstop": 1,
        "tpdist_request_success_totallength": 1,
        "tpdist_time_to_first_token_seconds_count": 2,
        "tpdist_inter_token_latency_seconds_count": 2,
        "tpdist_e2e_request_latency_seconds_count": 2,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_metrics_count_the_prompt_tokens_that_were_found_in_the_prefix_cache(app: FastAPI, client: FakeClient) -> None:
    client.current = ready_state(stats=EngineStats(prefix_cache_queries=30, prefix_cache_hits=12))
    found = samples(app)
    assert found["tpdist_prefix_cache_queries_total"] == 30
    assert found["tpdist_prefix_cache_hits_total"] == 12


def test_metrics_tell_of_each_rank_by_its_node(app: FastAPI) -> None:
    found = samples(app)
    expected = {
        "tpdist_rank_last_step_age_secondshead0": 1.5,
        "tpdist_rank_last_step_age_secondsworker-01": 1.5,
        "tpdist_weight_load_bytes_totalhead0": 2**20,
        "tpdist_weight_load_bytes_totalworker-01": 2**20 + 1,
        "tpdist_weight_load_secondsworker-01": 0.25,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_metrics_tell_why_epochs_ended_and_how_long_phases_took(app: FastAPI, client: FakeClient) -> None:
    restarts = (RestartView(epoch=3, cause="x", reason="rank_lost", age_s=97),)
    aborts = {"rank_lost": 2, "node_lost": 1}
    client.current = ready_state(restarts=restarts, aborts=aborts, startup_s={"register": 0.5, "load": 12}, retried=4)
    found = samples(app)
    expected = {
        "tpdist_epoch_aborts_totalrank_lost": 2,
        "tpdist_epoch_aborts_totalnode_lost": 1,
        "tpdist_last_epoch_abort_age_seconds": 97,
        "tpdist_startup_phase_secondsregister": 0.5,
        "tpdist_startup_phase_secondsload": 12,
        "tpdist_request_retries_total": 4,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_a_cluster_that_never_failed_has_no_age_of_a_failure(app: FastAPI, client: FakeClient) -> None:
    client.current = ready_state(restarts=())
    assert "tpdist_last_epoch_abort_age_seconds" not in samples(app)


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"echo": True, "max_tokens": 0, "logprobs": 0}])
def test_the_wait_of_a_sequence_is_counted_once_however_often_it_is_told(
    tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    app = app_for(FakeClient(lambda request: [50, 51, 52], queue_s=0.4), tokenizer)
    assert call(app, "POST", "/v1/completions", json={"model": MODEL, "prompt": [5, 6], **options}).status_code == 200
    found = samples(app)
    assert found["tpdist_request_queue_time_seconds_count"] == options.get("n", 1)
    assert found["tpdist_request_queue_time_seconds_sum"] == pytest.approx(0.4 * options.get("n", 1))
    assert found["tpdist_request_queue_time_seconds_bucket0.3"] == 0


def test_two_apps_in_one_process_count_for_themselves(app: FastAPI, tokenizer: Tokenizer) -> None:
    other = app_for(FakeClient(lambda request: [50]), tokenizer)
    call(app, "POST", "/v1/completions", json={"model": MODEL, "prompt": [5]})
    assert samples(other)["tpdist_prompt_tokens_total"] == 0


def test_lost_and_left_requests_are_counted_apart(tokenizer: Tokenizer) -> None:
    app = app_for(FakeClient(lambda request: [50, 51], fail_after=1), tokenizer)
    call(app, "POST", "/v1/completions", json={"model": MODEL, "prompt": [5]})
    assert samples(app)["tpdist_request_success_totalerror"] == 1


def test_text_is_tokenized_and_put_together_again(app: FastAPI, client: FakeClient, tokenizer: Tokenizer) -> None:
    text = "hello \U0001f600"
    body = call(app, "POST", "/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    responses.TokenizeResponse.model_validate(body)
    assert body["tokens"] == tokenizer.encode(text, add_special_tokens=True)
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 256)
    assert len(body["token_strs"]) == body["count"]
    assert call(app, "POST", "/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": text}


def test_a_conversation_is_tokenized_as_the_template_writes_it(app: FastAPI, tokenizer: Tokenizer) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    tokens = call(app, "POST", "/tokenize", json=body).json()["tokens"]
    assert tokenizer.decode(tokens) == "<|start|>user: hi\n"


def test_tokenize_works_while_the_cluster_starts(app: FastAPI, client: FakeClient) -> None:
    client.current = ready_state(state="starting", engine=None)
    body = call(app, "POST", "/tokenize", json={"prompt": "x"}).json()
    assert body["max_model_len"] is None


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, {"prompt": 5}])
def test_tokenize_wants_exactly_one_input(app: FastAPI, body: dict[str, Any]) -> None:
    assert call(app, "POST", "/tokenize", json=body).status_code == 400


@pytest.mark.parametrize("tokens", [[-1], [10**9], [2**40], ["a"], "a", None])
def test_detokenize_refuses_what_is_no_token(app: FastAPI, tokens: object) -> None:
    response = call(app, "POST", "/detokenize", json={"tokens": tokens})
    assert response.status_code == 400
    assert response.json()["error"]["param"].split("[")[0] == "tokens"


def test_drain_from_this_machine_needs_no_key(app: FastAPI, client: FakeClient) -> None:
    for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        response = call(app, "POST", "/v1/cluster/drain", address=address)
        assert (response.status_code, response.json()) == (202, {"state": "draining"})
    call(app, "POST", "/v1/cluster/drain", json={"reason": "upgrade", "immediate": True})
    assert [drain.immediate for drain in client.drains] == [False, False, False, True]
    assert client.drains[-1].reason == "upgrade"


def test_drain_from_elsewhere_or_from_a_web_page_is_forbidden_without_a_key(app: FastAPI, client: FakeClient) -> None:
    elsewhere = call(app, "POST", "/v1/cluster/drain", address="192.0.2.7")
    page = call(app, "POST", "/v1/cluster/drain", headers={"Origin": "http://evil.example"})
    for response in (elsewhere, page):
        assert response.status_code == 403
        assert "--api-key-file" in response.json()["error"]["message"]
    assert client.drains == []


def test_drain_with_a_key_works_from_anywhere(client: FakeClient, tokenizer: Tokenizer) -> None:
    app = app_for(client, tokenizer, api_keys=["secret"])
    assert call(app, "POST", "/v1/cluster/drain").status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert call(app, "POST", "/v1/cluster/drain", headers=headers, address="192.0.2.7").status_code == 202


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/completions", "/metrics", "/v1/cluster", "/docs", "/openapi.json", "/nothing", "/livez/"],
)
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer secre", "Bearer s\u00e9"]
)
def test_everything_but_the_probes_needs_a_key(
    client: FakeClient, tokenizer: Tokenizer, path: str, header: str | None
) -> None:
    app = app_for(client, tokenizer, api_keys=["secret", "other"])
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = call(app, "GET", path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_any_of_the_keys_opens_the_api_and_probes_need_none(client: FakeClient, tokenizer: Tokenizer) -> None:
    app = app_for(client, tokenizer, api_keys=["secret", "other"])
    for key in ("secret", "other"):
        assert call(app, "GET", "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for path in PROBES:
        assert call(app, "GET", path).status_code == 200
