"""Three nodes, three ranks over four KV heads: every endpoint gives the answers of transformers, to any client."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoints import reference_tokens

from e2e.clients import Stream, complete, completed_tokens, model_name, openai_client
from e2e.cluster import NodeProcess, Processes

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_TOKENS = 12
BLOCK = 16
PROMPTS = [
    [(7 * index + length) % 256 for index in range(length)] for length in (1, 2, BLOCK, BLOCK + 1, 3 * BLOCK, 75)
]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What transformers continues each prompt with."""
    return reference_tokens(model, PROMPTS, NUM_TOKENS)


def test_prompts_of_any_length_continue_as_in_transformers(each_node: NodeProcess, expected: list[list[int]]) -> None:
    assert [completed_tokens(each_node, prompt, NUM_TOKENS) for prompt in PROMPTS] == expected


def test_a_prompt_that_takes_several_steps_continues_as_in_transformers(each_node: NodeProcess, model: Path) -> None:
    """The scheduler gives it to the ranks in chunks of at most max_num_batched_tokens, 2048."""
    prompt = [(13 * index) % 251 for index in range(2500)]
    assert completed_tokens(each_node, prompt, 2) == reference_tokens(model, [prompt], 2)[0]


def test_concurrent_requests_on_all_nodes_do_not_disturb_each_other(
    three_nodes: Processes, expected: list[list[int]]
) -> None:
    pairs = [(node, prompt) for prompt in PROMPTS for node in three_nodes.nodes]
    with ThreadPoolExecutor(len(pairs)) as pool:
        answers = list(pool.map(lambda pair: completed_tokens(*pair, NUM_TOKENS), pairs))
    assert answers == [tokens for tokens in expected for _ in three_nodes.nodes]


def test_one_request_with_many_prompts_answers_them_in_order(each_node: NodeProcess, expected: list[list[int]]) -> None:
    body = complete(each_node, PROMPTS, max_tokens=NUM_TOKENS)
    assert [choice["token_ids"] for choice in body["choices"]] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(PROMPTS)))
    num_prompt_tokens, num_tokens = sum(map(len, PROMPTS)), NUM_TOKENS * len(PROMPTS)
    usage = body["usage"]
    assert usage.pop("prompt_tokens_details")["cached_tokens"] < num_prompt_tokens
    assert usage == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def test_a_stream_carries_the_same_tokens(each_node: NodeProcess, expected: list[list[int]]) -> None:
    stream = Stream(each_node, PROMPTS[-1], max_tokens=NUM_TOKENS).finish()
    assert stream.token_ids == expected[-1]
    assert stream.done
    assert stream.events[-1]["choices"][0]["finish_reason"] == "length"


def test_text_prompts_are_their_tokens(each_node: NodeProcess, model: Path) -> None:
    token_ids = tokens_of(each_node, "Hello, world")
    assert (
        complete(each_node, "Hello, world", max_tokens=NUM_TOKENS)["choices"][0]["token_ids"]
        == reference_tokens(model, [token_ids], NUM_TOKENS)[0]
    )


def test_the_openai_client_completes(each_node: NodeProcess) -> None:
    with openai_client(each_node) as client:
        name = client.models.list().data[0].id
        whole = client.completions.create(model=name, prompt="one two", max_tokens=8, temperature=0)
        pieces = client.completions.create(model=name, prompt="one two", max_tokens=8, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 8


def test_the_openai_client_chats(each_node: NodeProcess) -> None:
    with openai_client(each_node) as client:
        chat = client.chat.completions
        name = client.models.list().data[0].id
        whole = chat.create(model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=8, temperature=0)
        stream = chat.create(
            model=name,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == whole.choices[0].message.role == "assistant"
    counted = {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert chunks[-1].usage.model_dump(include=counted) == whole.usage.model_dump(include=counted)


def test_a_chat_is_its_template_completed(each_node: NodeProcess) -> None:
    name = model_name(each_node)
    messages = [{"role": "user", "content": "hi"}]
    prompt = each_node.post("/tokenize", {"messages": messages}).json()["tokens"]
    body = {"model": name, "messages": messages, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    answer = each_node.post("/v1/chat/completions", {**body, "ignore_eos": True}).json()
    assert answer["choices"][0]["token_ids"] == completed_tokens(each_node, prompt, 8)
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_n_answers_with_a_seed_can_be_drawn_one_by_one(each_node: NodeProcess, three_nodes: Processes) -> None:
    options = {"max_tokens": 8, "temperature": 1.0, "seed": 5}
    together = complete(each_node, PROMPTS[1], n=3, **options)["choices"]
    assert [choice["index"] for choice in together] == [0, 1, 2]
    alone = [
        complete(node, PROMPTS[1], **{**options, "seed": 5 + answer})["choices"][0]["token_ids"]
        for answer, node in enumerate(three_nodes.nodes)
    ]
    assert [choice["token_ids"] for choice in together] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_a_stop_string_cuts_the_text_and_frees_the_blocks(each_node: NodeProcess) -> None:
    text = complete(each_node, PROMPTS[2], max_tokens=NUM_TOKENS)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:2]
    choice = complete(each_node, PROMPTS[2], max_tokens=3000, stop=stop)["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert not wait_until_idle(each_node)


def test_a_stop_token_ends_the_answer_and_is_reported(each_node: NodeProcess, expected: list[list[int]]) -> None:
    stop = expected[0][4]
    first = expected[0].index(stop)
    choice = complete(each_node, PROMPTS[0], max_tokens=NUM_TOKENS, stop_token_ids=[stop])["choices"][0]
    assert choice["token_ids"] == expected[0][: first + 1]
    assert choice["finish_reason"] == "stop"


def test_a_prompt_that_is_too_long_is_a_400_with_the_numbers(each_node: NodeProcess) -> None:
    body = {"model": model_name(each_node), "prompt": [1] * 5000, "max_tokens": 1}
    response = each_node.post("/v1/completions", body)
    assert response.status_code == 400
    assert "5000" in response.json()["error"]["message"]
    assert "4096" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"model": 5}',
        b'{"prompt": "x"}',
        b'{"model": "MODEL", "prompt": "x", "no_such_field": 1}',
        b'{"model": "MODEL", "prompt": "x", "temperature": -1}',
        b'{"model": "MODEL", "prompt": [1, 300]}',
        b'{"model": "MODEL", "prompt": []}',
        b'{"model": "MODEL", "prompt": "x", "max_tokens": "many"}',
        b'{"model": "MODEL", "prompt": "x", "logprobs": 21}',
    ],
)
def test_a_body_that_makes_no_sense_is_a_400_in_openais_shape(three_nodes: Processes, model: Path, body: bytes) -> None:
    for node in three_nodes.nodes:
        response = node.post_bytes("/v1/completions", body.replace(b"MODEL", str(model).encode()))
        assert response.status_code == 400
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"


def test_tokenize_and_detokenize_undo_each_other(each_node: NodeProcess) -> None:
    text = "Grüße, 世界!\n"
    tokens = tokens_of(each_node, text)
    assert each_node.post("/detokenize", {"tokens": tokens}).json()["prompt"] == text


def test_models_names_the_model_and_its_context(each_node: NodeProcess, model: Path) -> None:
    body = each_node.get("/v1/models").json()
    assert body["object"] == "list"
    assert [(entry["id"], entry["max_model_len"]) for entry in body["data"]] == [(str(model), 4096)]


def test_cluster_has_the_documented_shape(each_node: NodeProcess) -> None:
    body = each_node.cluster()
    assert set(body) == {"state", "epoch", "phase", "nodes", "plan", "restarts"}
    assert (body["state"], body["phase"], body["epoch"], body["restarts"]) == ("ready", "ready", 1, [])
    assert [(node["node_id"], node["role"], node["state"]) for node in body["nodes"]] == [
        ("head", "head", "ready"),
        ("worker-0", "worker", "ready"),
        ("worker-1", "worker", "ready"),
    ]
    node_keys = {"node_id", "role", "host", "pid", "state", "last_seen_s", "ranks"}
    rank_keys = {"rank", "local_rank", "pid", "device", "state", "step", "weight_bytes", "kv_blocks"}
    assert all(set(node) == node_keys for node in body["nodes"])
    ranks = [rank for node in body["nodes"] for rank in node["ranks"]]
    assert all(set(rank) == rank_keys for rank in ranks)
    assert [(rank["rank"], rank["local_rank"]) for rank in ranks] == [(0, 0), (1, 0), (2, 0)]
    assert len({rank["kv_blocks"] for rank in ranks}) == 1


def test_ranks_share_four_key_value_heads_unevenly(each_node: NodeProcess) -> None:
    plan = each_node.cluster()["plan"]
    assert plan["tensor_parallel_size"] == 3
    assert [rank["key_value_heads"] for rank in plan["ranks"]] == [[0, 2], [2, 3], [3, 4]]


def test_metrics_count_tokens_of_this_node(each_node: NodeProcess) -> None:
    before = each_node.metric("tpdist_generation_tokens_total")
    completed_tokens(each_node, PROMPTS[0], NUM_TOKENS)
    assert each_node.metric("tpdist_generation_tokens_total") == before + NUM_TOKENS
    assert each_node.metric("tpdist_ranks_ready") == each_node.metric("tpdist_ranks_expected") == 3


def test_the_api_describes_itself(each_node: NodeProcess) -> None:
    paths = each_node.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/cluster", "/readyz"} <= set(paths)
    assert each_node.get("/docs").status_code == 200
    assert each_node.get("/readyz").json()["state"] == "ready"


def test_a_client_that_leaves_frees_its_blocks(each_node: NodeProcess) -> None:
    stream = Stream(each_node, PROMPTS[0], max_tokens=4000).wait_first()
    each_node.wait_until(lambda: each_node.metric("tpdist_kv_cache_usage_perc") > 0, "shows no use", timeout_s=10)
    stream.leave()
    assert not stream.done
    assert not wait_until_idle(each_node)


def wait_until_idle(node: NodeProcess) -> float:
    """Wait until the engine has nothing to do; returns the part of the KV cache that is in use then."""
    node.wait_until(lambda: node.metric("tpdist_num_requests_running") == 0, "stays busy", timeout_s=10)
    return node.metric("tpdist_kv_cache_usage_perc")


def tokens_of(node: NodeProcess, text: str) -> Sequence[int]:
    tokens: list[int] = node.post("/tokenize", {"prompt": text}).json()["tokens"]
    return tokens
