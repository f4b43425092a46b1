"""n, best_of, usage, stop reasons: what makes several sequences of a prompt into the choices of one answer."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from server_fakes import MODEL, FakeClient, app_for, call, small_tokenizer

from tpdist.control.messages import Generate, TokenLogprobs, TokenOutput
from tpdist.errors import RequestError
from tpdist.sampling_params import MAX_SEED, SamplingParams
from tpdist.server.answers import best_answers, cumulative_logprob, join, read_pieces, split_answers
from tpdist.server.text import Piece, TextReader
from tpdist.server.tokenizer import Tokenizer

END = 0
SEED = 10


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def by_seed(request: Generate) -> list[int]:
    """Answer i is token 100 - 30 i (the less its id, the more probable), i + 1 times."""
    answer = (request.sampling.seed or 0) - SEED
    return [100 - 30 * answer] * (answer + 1)


@pytest.fixture
def client() -> FakeClient:
    return FakeClient(by_seed)


@pytest.fixture
def app(client: FakeClient, tokenizer: Tokenizer) -> FastAPI:
    return app_for(client, tokenizer, eos_token_ids=[END])


def complete(app: FastAPI, **body: Any) -> httpx.Response:
    fields = {"model": MODEL, "prompt": [5, 6], "max_tokens": 64, "seed": SEED, "return_token_ids": True}
    return call(app, "POST", "/v1/completions", json={**fields, **body})


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    return [json.loads(line) for line in lines[:-2]]


def test_the_best_of_several_answers_are_returned_best_first_and_all_are_counted(
    app: FastAPI, client: FakeClient
) -> None:
    body = complete(app, n=2, best_of=4).json()
    assert [choice["token_ids"] for choice in body["choices"]] == [[10] * 4 + [END], [40] * 3 + [END]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 2 + 3 + 4 + 5
    assert body["usage"]["prompt_tokens"] == 2
    assert {choice["logprobs"] for choice in body["choices"]} == {None}
    assert [request.sampling.seed for request in client.requests] == [SEED, SEED + 1, SEED + 2, SEED + 3]
    assert {request.sampling.logprobs for request in client.requests} == {0}


def test_each_prompt_has_its_own_best_answer(tokenizer: Tokenizer) -> None:
    client = FakeClient(lambda request: [request.prompt_token_ids[0] + by_seed(request)[0]])
    app = app_for(client, tokenizer)
    choices = complete(app, prompt=[[5], [6], [7]], best_of=3, echo=True, logprobs=1).json()["choices"]
    assert [choice["token_ids"] for choice in choices] == [[45, END], [46, END], [47, END]]
    assert [choice["logprobs"]["token_logprobs"][0] for choice in choices] == [None] * 3
    assert [choice["text"] for choice in choices] == [tokenizer.decode([5 + i, 45 + i]) for i in range(3)]


def test_best_of_that_equals_n_chooses_nothing_and_may_be_streamed(app: FastAPI, client: FakeClient) -> None:
    choices = complete(app, n=2, best_of=2).json()["choices"]
    assert [choice["token_ids"][0] for choice in choices] == [100, 70]
    assert {request.sampling.logprobs for request in client.requests} == {None}
    assert complete(app, n=2, best_of=2, stream=True).status_code == 200


def split(**sampling: Any) -> list[Generate]:
    return split_answers(
        Generate(request_id="r", prompt_token_ids=(5,), sampling=SamplingParams(**sampling), priority=2)
    )


def test_each_answer_is_a_request_of_its_own() -> None:
    requests = split(n=2, best_of=3, seed=4, logprobs=5)
    assert [request.request_id for request in requests] == ["r-0", "r-1", "r-2"]
    assert [request.sampling for request in requests] == [SamplingParams(seed=4 + i, logprobs=5) for i in range(3)]
    assert {request.priority for request in requests} == {2}


def test_the_first_answer_alone_scores_the_prompt() -> None:
    assert [request.sampling.prompt_logprobs for request in split(n=2, best_of=3, prompt_logprobs=4)] == [4, None, None]
    assert [request.sampling.prompt_logprobs for request in split(prompt_logprobs=0)] == [0]


def test_answers_without_a_seed_are_left_to_the_head() -> None:
    assert [request.sampling for request in split(n=3)] == [SamplingParams()] * 3


def test_a_seed_that_has_no_successor_is_refused() -> None:
    assert len(split(n=1, seed=MAX_SEED)) == 1
    with pytest.raises(RequestError, match="seed"):
        split(n=2, seed=MAX_SEED)


def scored(*logprobs: float) -> Piece:
    entries = tuple(TokenLogprobs((9,), (logprob,), 1) for logprob in logprobs)
    return Piece(index=0, text="", token_ids=(9,) * len(entries), logprobs=entries)


def test_answers_are_compared_by_the_mean_of_their_tokens() -> None:
    long, short, worst = scored(*[-1.0] * 10), scored(-1.5), scored(-1.0, float("-inf"))
    assert best_answers([worst, short, long], n=2) == [long, short]
    assert best_answers([worst, short, long], n=3) == [worst, short, long]
    assert cumulative_logprob(long) == -10.0
    same = [scored(-1.0, -1.0), scored(-1.0)]
    assert best_answers(same, n=1) == same[:1]


def test_pieces_join_to_the_answer_that_ends_as_the_last() -> None:
    pieces = [
        Piece(index=3, text="a", token_ids=(1,), offsets=(0,), num_cached_tokens=16),
        Piece(index=3, text="b", token_ids=(2, 3), offsets=(1, 2), finish_reason="stop", stop_reason="c"),
    ]
    assert join(pieces) == Piece(
        index=3,
        text="ab",
        token_ids=(1, 2, 3),
        offsets=(0, 1, 2),
        num_cached_tokens=16,
        finish_reason="stop",
        stop_reason="c",
    )


def test_outputs_that_end_without_a_reason_are_an_error(tokenizer: Tokenizer) -> None:
    async def generate(request: Generate) -> AsyncGenerator[TokenOutput, None]:
        yield TokenOutput(request.request_id, (50,))

    async def read() -> None:
        request = Generate(request_id="r", prompt_token_ids=(5,), sampling=SamplingParams())
        async for piece in read_pieces(generate, request, TextReader(tokenizer, request)):
            assert piece.token_ids == (50,)

    with pytest.raises(RequestError, match="without an answer"):
        asyncio.run(read())


def test_what_was_found_in_the_prefix_cache_counts_once_for_each_prompt(tokenizer: Tokenizer) -> None:
    app = app_for(FakeClient(by_seed, num_cached_tokens=2), tokenizer)
    for options in ({}, {"prompt_logprobs": 0}):
        usage = complete(app, prompt=[[5, 6, 7], [8, 9, 10]], n=3, **options).json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
        assert usage["prompt_tokens"] == 6
    chunks = chunks_of(complete(app, n=2, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_every_chunk_tells_the_usage_so_far_if_asked_to(app: FastAPI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = chunks_of(complete(app, seed=SEED + 2, stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2}
    assert last["choices"] == []
    assert last["usage"] == chunks[-1]["usage"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, ("stop", None)),
        ({"max_tokens": 1}, ("length", None)),
        ({"stop_token_ids": [END]}, ("stop", None)),
        ({"stop_token_ids": [END], "ignore_eos": True}, ("stop", END)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_tells_what_stopped_it(app: FastAPI, options: dict[str, Any], reason: object, stream: bool) -> None:
    response = complete(app, stream=stream, **options)
    choice = chunks_of(response)[-1]["choices"][0] if stream else response.json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == reason
