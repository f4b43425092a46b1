"""The sampler against a plain reference for one row, and the promise that rows do not touch each other."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpdist.engine.sampler import SampleRow, _nucleus_cuts, sample, uniform
from tpdist.sampling_params import SamplingParams

VOCAB_SIZE = 37


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def row(
    *, seed: int = 0, index: int = 0, history: tuple[int, ...] = (), stops: tuple[int, ...] = (), **params: Any
) -> SampleRow:
    sampling = SamplingParams(**params)
    return SampleRow(sampling, stops, seed, index, np.array(history, dtype=np.int32))


def random_logits(n: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4


def reference_distribution(logits: list[float], one: SampleRow) -> list[float]:
    """The probabilities that one row is drawn from, in plain Python and float64, by sorting."""
    params = one.sampling
    scores = list(logits)
    for token in set(one.history.tolist()):
        scores[token] *= params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
    if one.num_sampled < params.min_tokens:
        scores = [-math.inf if token in one.stop_token_ids else score for token, score in enumerate(scores)]
    best = max(scores)
    weights = [math.exp((score - best) / params.temperature) for score in scores]
    weights = [weight if weight >= params.min_p else 0 for weight in weights]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    order = order[: params.top_k or None]
    total = sum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= params.top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    return [weights[token] / total / mass if token in kept else 0.0 for token in range(len(weights))]


def reference_token(logits: list[float], one: SampleRow) -> int:
    target, mass = uniform(one.seed, one.num_sampled), 0.0
    probabilities = reference_distribution(logits, one)
    for token, probability in enumerate(probabilities):
        mass += probability
        if mass > target:
            return token
    return max(token for token, probability in enumerate(probabilities) if probability)


@st.composite
def sample_rows(draw: st.DrawFn) -> SampleRow:
    return row(
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        index=draw(st.integers(0, 50)),
        history=tuple(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=8))),
        stops=tuple(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3))),
        temperature=draw(st.sampled_from([0.3, 0.7, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 1, 3, 20, 100])),
        top_p=draw(st.sampled_from([0.05, 0.5, 0.9, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        min_tokens=draw(st.sampled_from([0, 10])),
    )


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(sample_rows(), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_a_row_gets_the_token_of_the_reference_in_any_mixture_of_rows(rows: list[SampleRow], seed: int) -> None:
    logits = random_logits(len(rows), seed=seed)
    expected = [reference_token(line.tolist(), one) for line, one in zip(logits, rows, strict=True)]
    assert sample(logits, rows).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(sample_rows(), min_size=2, max_size=6), seed=st.integers(0, 10**6))
def test_a_row_gets_the_same_token_alone_and_in_a_batch(rows: list[SampleRow], seed: int) -> None:
    logits = random_logits(len(rows), seed=seed, vocab_size=5000)
    alone = [sample(logits[i : i + 1].clone(), [one]).item() for i, one in enumerate(rows)]
    assert sample(logits.clone(), rows).tolist() == alone


def test_greedy_rows_take_the_highest_logit_and_the_lowest_id_on_a_tie() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 1.0, 5.0]])
    assert sample(logits, [row(temperature=0), row(temperature=0)]).tolist() == [1, 0]


def test_greedy_and_random_rows_mix_in_a_batch() -> None:
    logits = random_logits(4)
    rows = [row(temperature=0), row(seed=1), row(temperature=0), row(top_k=1)]
    tokens = sample(logits.clone(), rows)
    best = logits.argmax(-1)
    assert [tokens[i].item() for i in (0, 2, 3)] == [best[i].item() for i in (0, 2, 3)]


def test_the_repetition_penalty_counts_for_greedy_rows() -> None:
    logits = torch.tensor([[4.0, 3.0, -1.0], [-0.5, -0.6, -9.0]])
    rows = [row(temperature=0, repetition_penalty=2, history=(0, 0)), row(temperature=0, repetition_penalty=2)]
    assert sample(logits.clone(), rows).tolist() == [1, 0]
    rows[1] = row(temperature=0, repetition_penalty=2, history=(0,))
    assert sample(logits.clone(), rows).tolist() == [1, 1]


def test_min_tokens_masks_stop_ids_until_enough_tokens_are_there() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0]])
    early = row(temperature=0, min_tokens=2, stops=(0, 1, 999), index=1)
    late = row(temperature=0, min_tokens=2, stops=(0, 1, 999), index=2)
    assert sample(logits.clone(), [early]).tolist() == [2]
    assert sample(logits.clone(), [late]).tolist() == [0]


def test_draws_follow_the_softmax_at_the_given_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    num_draws = 4000
    rows = [row(seed=5, index=index, temperature=0.8) for index in range(num_draws)]
    counts = torch.bincount(sample(logits.repeat(num_draws, 1), rows), minlength=4)
    expected = (logits[0] / 0.8).softmax(-1)
    # four standard deviations of a binomial count, divided by num_draws
    bound = 4 * (expected * (1 - expected) / num_draws).sqrt()
    assert ((counts / num_draws - expected).abs() < bound).all()


def test_top_p_keeps_the_token_that_crosses_it_and_drops_the_rest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        rows = [row(index=index, top_p=top_p) for index in range(400)]
        assert set(sample(logits.repeat(400, 1), rows).tolist()) == kept


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 30.0])
def test_the_cut_of_top_p_is_the_one_that_sorting_finds(spread: float) -> None:
    probabilities = (random_logits(40, vocab_size=3000) * spread).softmax(dim=-1)
    top_p = torch.linspace(0.001, 0.999, 40, dtype=torch.float64)[:, None]
    best = probabilities.sort(dim=-1, descending=True).values
    before = best.double().cumsum(dim=-1) - best.double()
    expected = best.gather(1, (before < top_p).sum(dim=-1, keepdim=True) - 1)
    assert torch.equal(_nucleus_cuts(probabilities, top_p), expected)


def test_a_top_p_that_rounding_keeps_out_of_reach_keeps_all_tokens() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25 - 1e-6, 0.0], [1.0, 0.0, 0.0, 0.0]])
    top_p = torch.tensor([[1 - 1e-9], [1 - 1e-9]], dtype=torch.float64)
    assert _nucleus_cuts(probabilities, top_p).tolist() == [[0.0], [1.0]]


def test_tokens_that_tie_at_the_cut_of_top_k_are_all_kept() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    rows = [row(index=index, top_k=2) for index in range(200)]
    assert set(sample(logits.repeat(200, 1), rows).tolist()) == {0, 1, 2}


def test_a_minute_temperature_is_greedy() -> None:
    logits = random_logits(3)
    rows = [row(temperature=temperature) for temperature in (1e-320, 1e-38, 1e-6)]
    assert sample(logits.clone(), rows).tolist() == logits.argmax(-1).tolist()


def test_uniform_depends_on_seed_and_index_and_covers_the_unit_interval() -> None:
    draws = [uniform(seed, index) for seed in (-(2**63), 0, 1, 2**63 - 1) for index in range(2000)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 4 * math.sqrt(1 / 12 / len(draws))
    assert uniform(3, 4) == uniform(3, 4) != uniform(4, 3)


def test_draws_are_the_same_in_every_release() -> None:
    assert [uniform(0, 0), uniform(0, 1), uniform(-1, 0)] == [
        0.6524484863740321,
        0.7012121095215251,
        0.3662420901697574,
    ]
