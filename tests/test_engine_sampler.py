"""The sampler against a plain reference for one row, and the promise that rows do not touch each other."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpdist.engine.sample_row import SampleRow
from tpdist.engine.sampler import _nucleus_cuts, sample, uniform
from tpdist.sampling_params import SamplingParams

VOCAB_SIZE = 37


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def row(
    *,
    seed: int = 0,
    index: int = 0,
    prompt: Sequence[int] = (),
    completion: Sequence[int] | None = None,
    stops: tuple[int, ...] = (),
    **params: Any,
) -> SampleRow:
    """A row that has sampled `completion`, or `index` tokens of which nothing is looked at."""
    sampled = (0,) * index if completion is None else completion
    tokens = np.array([*prompt, *sampled], dtype=np.int32)
    return SampleRow(
        sampling=SamplingParams(**params),
        stop_token_ids=stops,
        seed=seed,
        num_prompt_tokens=len(prompt),
        tokens=tokens,
        num_tokens=len(tokens),
    )


def random_logits(n: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4


def reference_scores(logits: list[float], one: SampleRow) -> list[float]:
    """Mask, bias and penalties token by token."""
    params, tokens = one.sampling, one.tokens.tolist()
    scores = []
    for token, logit in enumerate(logits):
        score = logit + (params.logit_bias or {}).get(token, 0)
        if one.num_sampled < params.min_tokens and token in one.stop_token_ids:
            score = -math.inf
        if token in tokens:
            score *= params.repetition_penalty if score < 0 else 1 / params.repetition_penalty
        count = tokens[one.num_prompt_tokens :].count(token)
        scores.append(score - count * params.frequency_penalty - (count > 0) * params.presence_penalty)
    return scores


def reference_distribution(logits: list[float], one: SampleRow) -> list[float]:
    """The probabilities that one row is drawn from, in plain Python and float64, by sorting."""
    params, scores = one.sampling, reference_scores(logits, one)
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
    if one.sampling.greedy:
        scores = reference_scores(logits, one)
        return scores.index(max(scores))
    target, mass = uniform(one.seed, one.num_sampled), 0.0
    probabilities = reference_distribution(logits, one)
    for token, probability in enumerate(probabilities):
        mass += probability
        if mass > target:
            return token
    return max(token for token, probability in enumerate(probabilities) if probability)


def token_ids(max_size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=max_size)


@st.composite
def sample_rows(draw: st.DrawFn) -> SampleRow:
    return row(
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        prompt=draw(token_ids(8)),
        completion=draw(token_ids(12)),
        stops=tuple(draw(token_ids(3))),
        temperature=draw(st.sampled_from([0, 0.3, 0.7, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 1, 3, 20, 100])),
        top_p=draw(st.sampled_from([0.05, 0.5, 0.9, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.6, -0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 1.1, -0.9])),
        logit_bias=draw(st.none() | st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-9, 9), max_size=3)),
        min_tokens=draw(st.sampled_from([0, 6])),
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
    rows = [row(temperature=0, repetition_penalty=2, prompt=(0, 0)), row(temperature=0, repetition_penalty=2)]
    assert sample(logits.clone(), rows).tolist() == [1, 0]
    rows[1] = row(temperature=0, repetition_penalty=2, completion=(0,))
    assert sample(logits.clone(), rows).tolist() == [1, 1]


def test_min_tokens_masks_stop_ids_until_enough_tokens_are_there() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0]])
    early = row(temperature=0, min_tokens=2, stops=(0, 1, 999), index=1)
    late = row(temperature=0, min_tokens=2, stops=(0, 1, 999), index=2)
    assert sample(logits.clone(), [early]).tolist() == [2]
    assert sample(logits.clone(), [late]).tolist() == [0]


def test_frequency_and_presence_penalty_count_the_tokens_of_the_completion_only() -> None:
    logits = torch.zeros(3, 4)
    history = {"prompt": (0, 0, 1), "completion": (1, 2, 2, 2)}
    rows = [
        row(temperature=0, frequency_penalty=0.5, presence_penalty=0.25, **history),
        row(temperature=0, frequency_penalty=-0.5, **history),
        row(temperature=0, presence_penalty=-2, **history),
    ]
    assert sample(logits, rows).tolist() == [0, 2, 1]
    assert logits.tolist() == [[0, -0.75, -1.75, 0], [0, 0.5, 1.5, 0], [0, 2, 2, 0]]


def test_a_bias_is_added_before_penalties_and_cannot_lift_a_masked_stop_id() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.0, 5.0]])
    bias = {1: 6, 3: 100, 9: 100}
    one = row(logit_bias=bias, prompt=(1,), repetition_penalty=2, stops=(3,), min_tokens=1, temperature=0)
    assert sample(logits, [one]).tolist() == [1]
    assert logits.tolist() == [[1, 2, 0, -math.inf]]


def test_rows_without_options_keep_their_logits() -> None:
    logits = random_logits(3)
    before = logits.clone()
    rows = [row(temperature=0, prompt=(1, 2)), row(presence_penalty=2, completion=(3,)), row(top_k=2, prompt=(1, 2))]
    sample(logits, rows)
    assert torch.equal(logits[::2], before[::2])
    assert not torch.equal(logits[1], before[1])


@settings(max_examples=30, deadline=None)
@given(
    prompt=token_ids(6), completion=token_ids(20), seed=st.integers(0, 10**6), repetition=st.sampled_from([1.0, 1.5])
)
def test_a_row_that_grows_is_penalised_as_one_that_starts_with_all_its_tokens(
    prompt: list[int], completion: list[int], seed: int, repetition: float
) -> None:
    params = {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": repetition}
    growing = row(prompt=prompt, completion=completion, **params)
    for length in range(len(completion) + 1):
        growing.num_tokens = len(prompt) + length
        kept, anew = random_logits(1, seed=seed), random_logits(1, seed=seed)
        tokens = sample(kept, [growing])
        assert torch.equal(tokens, sample(anew, [row(prompt=prompt, completion=completion[:length], **params)]))
        assert torch.equal(kept, anew)


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
    logits = random_logits(40, vocab_size=3000) * spread
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    top_p = torch.linspace(0.001, 0.999, 40, dtype=torch.float64)[:, None]
    best = weights.sort(dim=-1, descending=True).values
    sums = best.double().cumsum(dim=-1)
    before = (sums - best.double()) / sums[:, -1:]
    expected = best.gather(1, (before < top_p).sum(dim=-1, keepdim=True) - 1)
    assert torch.equal(_nucleus_cuts(weights, top_p), expected)


def test_a_top_p_next_to_one_keeps_all_that_may_be_drawn_and_a_minute_one_keeps_the_best() -> None:
    weights = torch.tensor([[1.0, 0.5, 2**-20, 0.0], [0.25, 1.0, 0.0, 1.0]])
    for top_p, expected in ((1 - 1e-9, [[2**-20], [0.25]]), (1e-300, [[1.0], [1.0]])):
        assert _nucleus_cuts(weights, torch.full((2, 1), top_p, dtype=torch.float64)).tolist() == expected


def test_tokens_that_tie_at_the_cut_of_top_k_are_all_kept() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    rows = [row(index=index, top_k=2) for index in range(200)]
    assert set(sample(logits.repeat(200, 1), rows).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {0}), (0.6, {0, 1, 3, 4}), (1.0, {0, 1, 3, 4})])
def test_top_p_counts_the_tokens_that_tie_at_the_cut_of_top_k(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([[0.48, 0.13, 0.01, 0.13, 0.13]]).log()  # token 0 is 0.55 of what top_k leaves
    rows = [row(index=index, top_k=2, top_p=top_p) for index in range(200)]
    assert set(sample(logits.repeat(200, 1), rows).tolist()) == kept


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_row_of_nan_gets_some_token_and_leaves_the_others_alone(params: dict[str, Any]) -> None:
    logits = random_logits(2)
    logits[1] = torch.nan
    alone = sample(logits[:1].clone(), [row(**params)])
    both = sample(logits, [row(**params), row(**params)])
    assert both[0] == alone[0]
    assert 0 <= both[1] < VOCAB_SIZE


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
