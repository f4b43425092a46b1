"""Scores against plain formulas, and that asking for them changes nothing."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpdist.control.messages import TokenLogprobs
from tpdist.engine.logprobs import read, sample_and_score, score
from tpdist.engine.sample_row import SampleRow
from tpdist.engine.sampler import sample
from tpdist.sampling_params import SamplingParams

VOCAB_SIZE = 37


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def naive(logits: torch.Tensor, token: int, num_top: int) -> TokenLogprobs:
    """The entry of one row by sorting. logits: [vocab_size]."""
    logprobs = logits.log_softmax(dim=-1).tolist()
    top = sorted(range(len(logprobs)), key=lambda other: (-logprobs[other], other))[:num_top]
    rank = 1 + sum(logprob > logprobs[token] for logprob in logprobs)
    return TokenLogprobs((token, *top), tuple(logprobs[other] for other in (token, *top)), rank)


def row(*, seed: int = 0, completion: Sequence[int] = (3, 3, 5), **params: Any) -> SampleRow:
    tokens = np.array([1, 2, *completion], dtype=np.int32)
    return SampleRow(
        sampling=SamplingParams(**params),
        stop_token_ids=(4,),
        seed=seed,
        num_prompt_tokens=2,
        tokens=tokens,
        num_tokens=len(tokens),
    )


def tied_logits(n: int, *, seed: int, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Small whole numbers: nearly every value occurs several times in a row."""
    return torch.randint(-4, 4, (n, vocab_size), generator=torch.Generator().manual_seed(seed)).float()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), tokens=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1), num_top=st.integers(0, 20)
)
def test_a_score_holds_rank_and_top_tokens_and_names_the_lower_of_tied_ids_first(
    seed: int, tokens: list[int], num_top: int
) -> None:
    logits = tied_logits(len(tokens), seed=seed)
    expected = tuple(naive(line, token, num_top) for line, token in zip(logits, tokens, strict=True))
    scores = score(logits, torch.tensor(tokens), num_top=num_top)
    assert read(torch.tensor([7, 8]), [scores]) == ([7, 8], [expected])


def test_a_token_of_all_the_probability_has_the_logprob_zero_and_the_others_stay_finite_or_minus_infinity() -> None:
    logits = torch.tensor([[0.0, 300.0, -math.inf, 0.0]])
    _, [(entry,)] = read(torch.tensor([1]), [score(logits, torch.tensor([1]), num_top=4)])
    assert entry == TokenLogprobs((1, 1, 0, 3, 2), (0, 0, -300, -300, -math.inf), 1)


def test_a_vocabulary_smaller_than_what_is_asked_for_is_named_as_a_whole() -> None:
    logits = tied_logits(1, seed=1, vocab_size=5)
    _, [entries] = read(torch.tensor([2]), [score(logits, torch.tensor([2]), num_top=20)])
    assert entries == (naive(logits[0], 2, 5),)


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 0},
    {"temperature": 0, "logprobs": 4, "frequency_penalty": 2, "presence_penalty": 1, "repetition_penalty": 1.7},
    {"temperature": 1.5, "logprobs": 20},
    {"temperature": 0.4, "top_k": 3, "top_p": 0.7, "logprobs": 2, "logit_bias": {4: 50, 9: -3}, "min_tokens": 8},
    {"top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("num_rows", [1, 3, 6, 40, 97])
def test_scores_are_of_the_raw_logits_and_asking_for_them_changes_no_token(num_rows: int) -> None:
    rows = [row(seed=i, **PARAMS[(i + 4) % len(PARAMS)]) for i in range(num_rows)]
    logits = tied_logits(num_rows, seed=num_rows) + torch.arange(VOCAB_SIZE) / 100
    expected = sample(logits.clone(), rows).tolist()
    tokens, scores = sample_and_score(logits.clone(), rows)
    token_ids, entries = read(tokens, [*scores.values()])
    assert token_ids == expected
    tops = {position: one.sampling.logprobs for position, one in enumerate(rows)}
    assert {position: entry for position, (entry,) in zip(scores, entries, strict=True)} == {
        position: naive(logits[position], token_ids[position], num_top)
        for position, num_top in tops.items()
        if num_top is not None
    }


def test_rows_that_ask_for_no_logprobs_have_no_scores() -> None:
    rows = [row(temperature=0), row(seed=1)]
    tokens, scores = sample_and_score(tied_logits(2, seed=0), rows)
    assert (len(tokens), scores) == (2, {})
    assert read(tokens, []) == (tokens.tolist(), [])
