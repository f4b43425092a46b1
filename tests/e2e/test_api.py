"""The OpenAI client's full surface against a head and a worker: every option has the effect that it has elsewhere.

The numbers are held against transformers' own, in float32. The client talks to the worker, so that all that it asks
for and all that it gets travels between the nodes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from e2e.clients import openai_client
from e2e.cluster import NodeProcess, Processes, two_nodes
from tpdist import builtin

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

QUESTION = "123+456="
ANSWER = "579"
CHAT = [{"role": "user", "content": QUESTION}]
BLOCK = 4
CLOSE = 1e-3
"""Sums over two ranks and over one differ in the last bits; log-probabilities reach about -30 here."""


@pytest.fixture(scope="module")
def worker() -> Iterator[NodeProcess]:
    with Processes() as processes:
        _, node = two_nodes(processes, builtin.path(), TPDIST_DTYPE="float32", TPDIST_BLOCK_SIZE=BLOCK)
        yield node
        processes.stop()


@pytest.fixture(scope="module")
def client(worker: NodeProcess) -> Iterator[openai.OpenAI]:
    with openai_client(worker) as opened:
        yield opened


@pytest.fixture(scope="module")
def name(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(builtin.path())


class Reference:
    """The same model in transformers."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(builtin.path(), dtype=torch.float32)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """What follows each token: [num_tokens, vocab_size]."""
        with torch.no_grad():
            logits: torch.Tensor = self._model(torch.tensor([tokens])).logits[0]
        return logits

    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        return self.logits(tokens).log_softmax(dim=-1)

    def own(self, tokens: Sequence[int], start: int) -> list[float]:
        """The log-probabilities of tokens[start:]."""
        found = self.logprobs(tokens)
        return [found[position - 1, tokens[position]].item() for position in range(start, len(tokens))]

    def penalised(self, prompt: Sequence[int], num_tokens: int, *, frequency: float, presence: float) -> list[int]:
        """Greedy tokens, each less likely the more often it was there."""
        made: list[int] = []
        for _ in range(num_tokens):
            logits = self.logits([*prompt, *made])[-1]
            for token in set(made):
                logits[token] -= frequency * made.count(token) + presence
            made.append(int(logits.argmax()))
        return made


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def prompt(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    ids: list[int] = tokenizer(QUESTION)["input_ids"]
    return ids


def token_ids(choice: Any) -> list[int]:
    ids: list[int] = choice.model_extra["token_ids"]
    return ids


def test_a_completions_logprobs_are_transformers(
    client: openai.OpenAI, name: str, reference: Reference, prompt: list[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = client.completions.create(
        model=name, prompt=QUESTION, temperature=0, logprobs=3, extra_body={"return_token_ids": True}
    )
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (ANSWER, "stop")
    tokens = token_ids(choice)
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [*ANSWER, "<eos>"] == [tokenizer.decode([token]) for token in tokens]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert choice.logprobs.token_logprobs == pytest.approx(reference.own(prompt + tokens, len(prompt)), abs=CLOSE)
    expected = reference.logprobs(prompt + tokens)[len(prompt) - 1 : -1].topk(3)
    assert choice.logprobs.top_logprobs is not None
    for found, values, ids in zip(choice.logprobs.top_logprobs, expected.values, expected.indices, strict=True):
        assert list(found) == [tokenizer.decode([token]) for token in ids]
        assert list(found.values()) == pytest.approx(values.tolist(), abs=CLOSE)


def test_a_chats_logprobs_are_those_of_the_completion(client: openai.OpenAI, name: str) -> None:
    completion = client.completions.create(model=name, prompt=QUESTION, temperature=0, logprobs=0).choices[0]
    chat = client.chat.completions.create(model=name, messages=CHAT, temperature=0, logprobs=True, top_logprobs=2)
    assert chat.choices[0].logprobs is not None
    assert completion.logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert [entry.token for entry in content] == completion.logprobs.tokens
    assert [entry.logprob for entry in content] == pytest.approx(completion.logprobs.token_logprobs, abs=CLOSE)
    assert [bytes(entry.bytes or ()).decode() for entry in content] == completion.logprobs.tokens
    assert [entry.top_logprobs[0].token for entry in content] == completion.logprobs.tokens
    assert {len(entry.top_logprobs) for entry in content} == {2}


def test_streamed_logprobs_add_up_to_the_whole_and_the_last_chunk_has_the_usage(
    client: openai.OpenAI, name: str
) -> None:
    options: dict[str, Any] = {"model": name, "messages": CHAT, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    found = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or ()]
    assert whole.choices[0].logprobs is not None
    assert [entry.token for entry in found] == [entry.token for entry in whole.choices[0].logprobs.content or ()]
    assert last.usage is not None
    assert whole.usage is not None
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (9, 4)
    assert whole.usage.total_tokens == last.usage.total_tokens == 13


def test_an_echo_of_no_tokens_scores_the_prompt_as_transformers_does(
    client: openai.OpenAI, name: str, reference: Reference, prompt: list[int]
) -> None:
    answer = client.completions.create(model=name, prompt=QUESTION + ANSWER, max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == QUESTION + ANSWER
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    first, *rest = choice.logprobs.token_logprobs
    assert first is None
    tokens = prompt + [4 + int(digit) for digit in ANSWER]
    assert rest == pytest.approx(reference.own(tokens, 1), abs=CLOSE)
    assert choice.logprobs.text_offset == [0, *range(len(QUESTION + ANSWER))]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_begins_the_text(client: openai.OpenAI, name: str, stream: bool) -> None:
    options: dict[str, Any] = {"model": name, "prompt": QUESTION, "temperature": 0, "echo": True, "logprobs": 0}
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    else:
        choices = [client.completions.create(**options).choices[0]]
    assert "".join(choice.text for choice in choices) == QUESTION + ANSWER
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens or ()]
    assert tokens == ["<bos>", *QUESTION, *ANSWER, "<eos>"]


def test_the_prompts_logprobs_have_ids_ranks_and_texts(
    client: openai.OpenAI, name: str, reference: Reference, prompt: list[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = client.completions.create(model=name, prompt=QUESTION, extra_body={"prompt_logprobs": 2})
    first, *rest = (answer.choices[0].model_extra or {})["prompt_logprobs"]
    assert first is None
    expected = reference.logprobs(prompt)
    for position, (token, entry) in enumerate(zip(prompt[1:], rest, strict=True)):
        own = entry[str(token)]
        assert own["logprob"] == pytest.approx(expected[position, token].item(), abs=CLOSE)
        assert own["rank"] == 1 + int((expected[position] > expected[position, token]).sum())
        assert own["decoded_token"] == tokenizer.decode([token])
        assert {1, 2} <= {value["rank"] for value in entry.values()}


RANDOM: dict[str, Any] = {"temperature": 5, "max_tokens": 12, "seed": 7}


def draws(client: openai.OpenAI, name: str, **options: Any) -> list[Any]:
    extra = {"return_token_ids": True, "ignore_eos": True}
    return client.completions.create(model=name, prompt=QUESTION, extra_body=extra, **{**RANDOM, **options}).choices


def test_n_answers_with_a_seed_are_those_of_the_seeds_that_follow(client: openai.OpenAI, name: str) -> None:
    together = [token_ids(choice) for choice in draws(client, name, n=4)]
    assert together == [token_ids(choice) for choice in draws(client, name, n=4)]
    assert together == [token_ids(draws(client, name, seed=7 + answer)[0]) for answer in range(4)]
    assert len({tuple(tokens) for tokens in together}) == 4


def test_the_best_of_several_answers_has_the_highest_mean(client: openai.OpenAI, name: str) -> None:
    candidates = draws(client, name, n=5, logprobs=0)
    order = sorted(candidates, key=lambda choice: sum(choice.logprobs.token_logprobs), reverse=True)
    answer = client.completions.create(
        model=name, prompt=QUESTION, n=2, best_of=5, **RANDOM, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    assert [token_ids(choice) for choice in answer.choices] == [token_ids(choice) for choice in order[:2]]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5 * 12


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"stop": "7"}, "5", "7"),
        ({"stop": ["x", "79"], "extra_body": {"include_stop_str_in_output": True}}, "579", "79"),
        ({"extra_body": {"stop_token_ids": [11]}}, "5", 11),
        ({"extra_body": {"stop_token_ids": [11], "include_stop_str_in_output": True}}, "57", 11),
        ({}, "579", None),
    ],
)
def test_what_stops_an_answer_is_told_and_shown_if_asked_for(
    client: openai.OpenAI, name: str, options: dict[str, Any], text: str, reason: str | int | None
) -> None:
    choice = client.completions.create(model=name, prompt=QUESTION, temperature=0, **options).choices[0]
    assert (choice.text, choice.finish_reason) == (text, "stop")
    assert (choice.model_extra or {})["stop_reason"] == reason


@pytest.mark.parametrize(("frequency", "presence"), [(2.0, 0.0), (0.0, 2.0), (1.5, -1.0)])
def test_penalties_count_the_tokens_of_the_answer(
    client: openai.OpenAI, name: str, reference: Reference, prompt: list[int], frequency: float, presence: float
) -> None:
    answer = client.completions.create(
        model=name,
        prompt=QUESTION,
        temperature=0,
        max_tokens=30,
        frequency_penalty=frequency,
        presence_penalty=presence,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    expected = reference.penalised(prompt, 30, frequency=frequency, presence=presence)
    assert token_ids(answer.choices[0]) == expected
    assert expected != reference.penalised(prompt, 30, frequency=0, presence=0)


def test_a_bias_forces_a_token_or_bans_it(client: openai.OpenAI, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    def text(**bias: int) -> str:
        ids = {str(tokenizer.convert_tokens_to_ids(token)): value for token, value in bias.items()}
        chat = client.chat.completions.create(
            model=name, messages=CHAT, temperature=0, max_tokens=6, logit_bias=ids, logprobs=True
        )
        return chat.choices[0].message.content or ""

    assert text(**{"8": 100}) == "888888"
    assert "5" not in text(**{"5": -100})
    assert len(text(**{"<eos>": -100})) == 6


def test_an_answer_is_as_long_as_min_tokens_says(client: openai.OpenAI, name: str) -> None:
    answer = client.completions.create(
        model=name, prompt=QUESTION, temperature=0, max_tokens=20, extra_body={"min_tokens": 8}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 8


def test_every_chunk_may_have_the_usage_so_far(client: openai.OpenAI, name: str) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(model=name, prompt=QUESTION, temperature=0, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_the_second_of_two_equal_prompts_is_found_in_the_cache(client: openai.OpenAI, name: str) -> None:
    prompt = [4 + (3 * index) % 10 for index in range(10 * BLOCK)]
    cached = []
    for _ in range(2):
        usage = client.completions.create(model=name, prompt=prompt, max_tokens=1).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 9 * BLOCK], "at least one token has to be computed"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "add"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, "response_format"),
        ({"extra_body": {"structured_outputs": {"json": {}}}}, "structured_outputs"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"16": 1}}, "logit_bias"),
    ],
)
def test_what_is_not_supported_is_a_400_that_says_so(
    client: openai.OpenAI, name: str, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=param) as caught:
        client.chat.completions.create(model=name, messages=CHAT, **options)
    assert caught.value.param == param


def test_embeddings_are_a_400_and_responses_a_404(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError, match="embeddings are not supported"):
        client.embeddings.create(model=name, input="x")
    with pytest.raises(openai.NotFoundError, match="/v1/responses"):
        client.responses.create(model=name, input="x")
