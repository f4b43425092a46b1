"""`LLM` and `tpdist generate`: a model inside a program and on the terminal, with real ranks as child processes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, reference_tokens
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tpdist import LLM, SamplingParams
from tpdist.errors import CheckpointError, LostError, PlanError, RequestError, SettingsError

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("nothing_left_behind")]

NUM_TOKENS = 10
CONTEXT = 128
PROMPTS = [[9], [3, 1, 4, 1, 5], [(11 * index) % 256 for index in range(50)]]
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
SMALL = {"device": "cpu", "threads": 1, "kv_cache_memory_bytes": "4MiB"}
END_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("model"), tokenizer=True, num_hidden_layers=2, max_position_embeddings=CONTEXT
    )


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return reference_tokens(model, PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="module")
def two_ranks(model: Path) -> Iterator[LLM]:
    """One LLM for all tests that do not end it."""
    with LLM(model, tensor_parallel_size=2, **SMALL) as llm:
        yield llm


def tokens(llm: LLM, prompts: Any, sampling: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling)]


def test_one_rank_and_then_another_llm_equal_transformers(model: Path, expected: list[list[int]]) -> None:
    for _ in range(2):
        with LLM(model, **SMALL) as llm:
            assert tokens(llm, PROMPTS) == expected


def test_two_ranks_equal_transformers(two_ranks: LLM, expected: list[list[int]]) -> None:
    assert tokens(two_ranks, PROMPTS) == expected
    assert [tokens(two_ranks, prompt)[0] for prompt in PROMPTS] == expected


def test_strings_are_their_tokens(two_ranks: LLM, model: Path) -> None:
    texts = ["Hello", "Grüße, 世界"]
    outputs = two_ranks.generate(texts, GREEDY)
    assert [output.prompt for output in outputs] == texts
    ids = [output.prompt_token_ids for output in outputs]
    assert [output.outputs[0].token_ids for output in outputs] == reference_tokens(model, ids, NUM_TOKENS)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "length"]
    assert two_ranks.generate(texts[0], GREEDY)[0].outputs[0].text == outputs[0].outputs[0].text


def test_each_prompt_may_have_its_own_sampling(two_ranks: LLM, expected: list[list[int]]) -> None:
    lengths = [1, 3, NUM_TOKENS]
    sampling = [SamplingParams(max_tokens=length, temperature=0, ignore_eos=True) for length in lengths]
    outputs = two_ranks.generate(PROMPTS, sampling)
    assert [output.outputs[0].token_ids for output in outputs] == [
        continuation[:length] for continuation, length in zip(expected, lengths, strict=True)
    ]


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(two_ranks: LLM, expected: list[list[int]]) -> None:
    with pytest.raises(RequestError, match=f"{CONTEXT + 1}.*{CONTEXT}"):
        two_ranks.generate([[1] * (CONTEXT + 1)], GREEDY)
    assert tokens(two_ranks, PROMPTS) == expected


@pytest.mark.parametrize("prompt", [[], [300], [-1], [2**40]])
def test_token_ids_that_the_model_does_not_have_are_refused_and_the_llm_goes_on(
    two_ranks: LLM, expected: list[list[int]], prompt: list[int]
) -> None:
    with pytest.raises(RequestError, match="token"):
        two_ranks.generate([prompt], GREEDY)
    assert tokens(two_ranks, PROMPTS) == expected


def test_an_answer_ends_where_the_context_does(two_ranks: LLM) -> None:
    sampling = SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True)
    (output,) = two_ranks.generate([PROMPTS[1]], sampling)
    assert len(PROMPTS[1]) + len(output.outputs[0].token_ids) == CONTEXT
    assert output.outputs[0].finish_reason == "length"


def test_more_prompts_than_the_cache_holds_are_all_answered(model: Path) -> None:
    """Sequences wait, and lose their blocks and are computed again; the answers are those of each prompt alone."""
    prompts = [[index, *range(20)] for index in range(12)]
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    with LLM(model, **{**SMALL, "kv_cache_memory_bytes": 2 * 1024 * 80, "block_size": 4}) as llm:
        together = tokens(llm, prompts, sampling)
        assert together == [tokens(llm, [prompt], sampling)[0] for prompt in prompts]


def test_stop_strings_end_an_answer(two_ranks: LLM) -> None:
    text = two_ranks.generate("Hello", GREEDY)[0].outputs[0].text
    sampling = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, stop=(text[3:5],))
    (output,) = two_ranks.generate("Hello", sampling)
    assert output.outputs[0].text == text[: text.index(text[3:5])]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == text[3:5]


def transformers_logprobs(model: Path, tokens: list[int]) -> torch.Tensor:
    """What transformers makes of each next token: [num_tokens, vocab_size]."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logprobs: torch.Tensor = reference(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
    return logprobs


def test_logprobs_of_answer_and_prompt_are_those_of_transformers(
    two_ranks: LLM, model: Path, expected: list[list[int]]
) -> None:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=0)
    (output,) = two_ranks.generate([PROMPTS[1]], sampling)
    answer, prompt = output.outputs[0], PROMPTS[1]
    reference = transformers_logprobs(model, prompt + expected[1])
    assert answer.token_ids == expected[1]
    assert answer.logprobs is not None
    own = [entry[token].logprob for entry, token in zip(answer.logprobs, expected[1], strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(own))
    for position, entry in enumerate(answer.logprobs, start=len(prompt) - 1):
        ids = reference[position].topk(2).indices.tolist()
        assert list(entry) == ids, "the greedy token is the most probable one"
        assert [found.rank for found in entry.values()] == [1, 2]
        assert [found.logprob for found in entry.values()] == pytest.approx(reference[position, ids].tolist(), abs=1e-3)
        assert all(found.decoded_token == text_of(model, token) for token, found in entry.items())
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for position, (token, found) in enumerate(zip(prompt[1:], output.prompt_logprobs[1:], strict=True)):
        assert found is not None
        assert list(found) == [token]
        assert found[token].logprob == pytest.approx(reference[position, token].item(), abs=1e-3)
        assert found[token].rank == 1 + int((reference[position] > reference[position, token]).sum())


def text_of(model: Path, token: int) -> str:
    text: str = PreTrainedTokenizerFast.from_pretrained(model).decode([token])
    return text


def test_logprobs_that_nobody_asked_for_are_none(two_ranks: LLM) -> None:
    (output,) = two_ranks.generate([PROMPTS[1]], GREEDY)
    assert (output.prompt_logprobs, output.outputs[0].logprobs, output.outputs[0].cumulative_logprob) == (None,) * 3


def test_n_answers_are_those_of_the_seeds_that_follow(two_ranks: LLM) -> None:
    def draw(**options: Any) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=2.0, ignore_eos=True, **options)
        (output,) = two_ranks.generate([PROMPTS[1]], sampling)
        assert [answer.index for answer in output.outputs] == list(range(sampling.n))
        return [answer.token_ids for answer in output.outputs]

    assert draw(n=3, seed=5) == [draw(seed=5 + answer)[0] for answer in range(3)]


def test_the_best_of_several_answers_come_first(two_ranks: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 2.0, "ignore_eos": True, "seed": 3}
    (candidates,) = two_ranks.generate([PROMPTS[1]], SamplingParams(n=4, logprobs=0, **options))
    (best,) = two_ranks.generate([PROMPTS[1]], SamplingParams(n=2, best_of=4, **options))
    order = sorted(candidates.outputs, key=lambda answer: answer.cumulative_logprob or 0.0, reverse=True)
    assert [answer.token_ids for answer in best.outputs] == [answer.token_ids for answer in order[:2]]
    assert [answer.logprobs for answer in best.outputs] == [None, None]


def test_priorities_are_one_for_all_or_one_for_each(two_ranks: LLM, expected: list[list[int]]) -> None:
    for priority in (3, [2, 1, 0]):
        outputs = two_ranks.generate(PROMPTS, GREEDY, priority=priority)
        assert [output.outputs[0].token_ids for output in outputs] == expected
    with pytest.raises(ValueError, match="3 prompts need as many priorities, got 1"):
        two_ranks.generate(PROMPTS, GREEDY, priority=[1])


def test_a_bias_of_a_token_that_the_model_does_not_have_is_refused(two_ranks: LLM) -> None:
    with pytest.raises(RequestError, match=r"logit_bias.*300"):
        two_ranks.generate([PROMPTS[1]], SamplingParams(logit_bias={300: 1.0}))


def test_it_works_where_an_event_loop_runs_already(two_ranks: LLM, expected: list[list[int]]) -> None:
    """As in a notebook."""

    async def cell() -> list[list[int]]:
        return tokens(two_ranks, PROMPTS)

    assert asyncio.run(cell()) == expected


def test_close_twice_is_close_once_and_later_calls_say_so(model: Path) -> None:
    llm = LLM(model, **SMALL)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="LLM is closed"):
        llm.generate("Hello", GREEDY)


@pytest.mark.parametrize(
    ("options", "priority", "named"),
    [
        ({"logprobs": True}, 0, "logprobs"),
        ({"logit_bias": {5: True}}, 0, "logit_bias"),
        ({"seed": 1.5}, 0, "seed"),
        ({"max_tokens": 16.0}, 0, "max_tokens"),
        ({}, 1.5, "priority"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(
    two_ranks: LLM, options: dict[str, Any], priority: Any, named: str
) -> None:
    with pytest.raises(RequestError, match=named):
        two_ranks.generate([[1]], SamplingParams(**options), priority=[priority])


def test_a_killed_rank_ends_generate_with_its_name(model: Path) -> None:
    with LLM(model, tensor_parallel_size=2, **SMALL) as llm:
        ranks = [rank for node in llm.cluster_state().nodes for rank in node.ranks]
        os.kill(ranks[1].pid, signal.SIGKILL)
        with pytest.raises(LostError, match="rank 1"):
            generate_for_ever(llm)


def test_an_llm_with_restarts_answers_what_waits_after_a_rank_was_killed(
    model: Path, expected: list[list[int]]
) -> None:
    with LLM(model, tensor_parallel_size=2, max_restarts=1, **SMALL) as llm:
        ranks = [rank for node in llm.cluster_state().nodes for rank in node.ranks]
        os.kill(ranks[1].pid, signal.SIGKILL)
        assert tokens(llm, PROMPTS) == expected
        assert llm.cluster_state().epoch == 2
        assert "SIGKILL" in llm.cluster_state().restarts[0].cause
        killer = threading.Timer(0.3, lambda: os.kill(llm.cluster_state().nodes[0].ranks[0].pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(LostError, match="no restart is left: 1 in the last hour"):
            generate_for_ever(llm)


def generate_for_ever(llm: LLM) -> None:
    while True:
        llm.generate([PROMPTS[0]], GREEDY)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"tensor_paralel_size": 2}, SettingsError, "tensor_parallel_size"),
        ({"dtype": "float8"}, SettingsError, "float8"),
        ({"tensor_parallel_size": 9}, PlanError, "9"),
        ({"max_model_len": 1000}, PlanError, "1000"),
    ],
)
def test_wrong_options_are_errors_that_name_them(
    model: Path, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        LLM(model, **{**SMALL, **options})


def test_a_folder_that_is_no_model_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLM(tmp_path, **SMALL)


# -- tpdist generate --------------------------------------------------------------------------------------------------


def generate(model: Path, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tpdist", "generate", str(model), "--device", "cpu", "--threads", "1", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=END_S, check=False)


def test_generate_reads_its_prompt_from_stdin_and_writes_json(model: Path) -> None:
    arguments = ("--max-tokens", str(NUM_TOKENS), "--ignore-eos", "--local-world-size", "2")
    done = generate(model, "--prompt", "-", "--json", *arguments, stdin="Hello\n")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    prompt = PreTrainedTokenizerFast.from_pretrained(model)("Hello")["input_ids"]
    assert answer["prompt"] == "Hello"
    assert answer["token_ids"] == reference_tokens(model, [prompt], NUM_TOKENS)[0]
    assert answer["finish_reason"] == "length"


def test_generate_prints_the_text_and_nothing_else(model: Path, two_ranks: LLM) -> None:
    done = generate(model, "--prompt", "Hello", "--max-tokens", str(NUM_TOKENS), "--ignore-eos")
    assert done.returncode == 0, done.stderr
    assert done.stdout == two_ranks.generate("Hello", GREEDY)[0].outputs[0].text + "\n"


def test_generate_refuses_a_prompt_that_is_too_long(model: Path) -> None:
    done = generate(model, "--prompt", "-", stdin="x" * 500)
    assert done.returncode == SettingsError.exit_code, done.stderr
    assert "500" in done.stderr
    assert str(CONTEXT) in done.stderr
    assert "Traceback" not in done.stderr
