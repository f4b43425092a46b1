"""Whole engines over pipeline stages against transformers, float32 and greedy, with everything that a busy server does
at once: several steps in flight, prompts in chunks, prefixes from the cache, preemption, seeds, log-probabilities, and
requests that go away."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import ARCHITECTURES, greedy_tokens, make_checkpoint, reference_model
from ranks import run_processes
from staging import Cut, Sizes, run_stage

from tpdist.control.messages import Generate
from tpdist.engine.engine import Engine
from tpdist.engine.scheduler import Scheduler
from tpdist.sampling_params import SamplingParams

NUM_TOKENS = 14
STEM = [(11 * i + 4) % 250 for i in range(21)]
PROMPTS = [STEM, [*STEM, 7], STEM[:13], [3], STEM[:13], [*STEM[:8], 9, 8, 7, 6, 5], STEM, [250, 1, 2, 3], [*STEM, 7, 9]]
SIZES = Sizes(num_blocks=14, block_size=4, max_num_seqs=5, max_num_batched_tokens=18, max_model_len=48)
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
TWO = Cut((2, 3), ((1,), (1,)))
CUTS = [
    TWO,
    *(
        pytest.param(cut, marks=pytest.mark.slow)
        for cut in [
            Cut((1, 4), ((1, 1), (1, 1))),
            Cut((4, 1), ((1,), (1,))),
            Cut((2, 1, 2), ((1,), (1,), (1,))),
            Cut((3, 2), ((1, 3), (2, 1))),
            Cut((1, 1, 1, 1, 1), ((1,),) * 5),
            Cut((2, 3), ((1, 1, 1), (3, 1, 2))),
        ]
    ),
]


@dataclass
class Served:
    answers: list[list[int]]
    most_in_flight: int
    preemptions: int
    prefix_cache_hits: int
    logprobs: list[list[float]]
    prompt_logprobs: list[list[float]]


def drive(engine: Engine, scheduler: Scheduler, sampling: SamplingParams, aborted: tuple[int, ...] = ()) -> Served:
    """Half of the requests come at once, the others one by one; some are aborted while they run."""
    waiting = [
        Generate(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling)
        for index, prompt in enumerate(PROMPTS)
    ]
    served = Served([[] for _ in PROMPTS], 0, 0, 0, [[] for _ in PROMPTS], [[] for _ in PROMPTS])
    for request in waiting[:4]:
        engine.add(request)
    del waiting[:4]
    while engine.has_work or waiting:
        outputs = engine.step()
        served.most_in_flight = max(served.most_in_flight, engine.num_in_flight)
        scheduler.check()
        if outputs is None:
            continue
        if waiting and outputs.step % 2 == 0:
            engine.add(waiting.pop(0))
        for output in outputs.outputs:
            number = int(output.request_id)
            served.answers[number] += output.token_ids
            served.logprobs[number] += [entry.logprobs[0] for entry in output.logprobs]
            served.prompt_logprobs[number] += [entry.logprobs[0] for entry in output.prompt_logprobs]
            if number in aborted and len(served.answers[number]) == 3:
                engine.abort(output.request_id)
    stats = engine.stats()
    served.preemptions, served.prefix_cache_hits = stats.preemptions, stats.prefix_cache_hits
    return served


def serve(folder: Path, cut: Cut, *arguments: Any, sizes: Sizes = SIZES) -> Served:
    served = run_processes(run_stage, cut.world_size, folder, cut, sizes, drive, *arguments)[0]
    assert isinstance(served, Served)
    return served


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    particular: dict[str, Any] = {
        "MistralForCausalLM": {"sliding_window": 10},
        "Qwen2ForCausalLM": {"tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 2},
        "Qwen3ForCausalLM": {"tie_word_embeddings": True},
    }
    return make_checkpoint(
        tmp_path_factory.mktemp("model"),
        architecture=request.param,
        hidden_size=60,
        num_hidden_layers=5,
        num_attention_heads=12,
        head_dim=20,
        **particular.get(request.param, {}),
    )


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    model = reference_model(checkpoint)
    return [greedy_tokens(model, prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_busy_pipeline_gives_the_tokens_of_transformers(
    checkpoint: Path, expected: list[list[int]], cut: Cut
) -> None:
    served = serve(checkpoint, cut, GREEDY)
    assert served.answers == expected
    assert served.preemptions > 0
    assert served.prefix_cache_hits > 0
    assert served.most_in_flight == len(cut.layers)


@pytest.mark.slow
def test_seeded_draws_penalties_and_logprobs_do_not_depend_on_the_stages(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_hidden_layers=5)
    sampling = SamplingParams(
        max_tokens=NUM_TOKENS,
        temperature=0.9,
        top_k=40,
        seed=7,
        repetition_penalty=1.2,
        logprobs=2,
        prompt_logprobs=1,
        ignore_eos=True,
    )
    alone = serve(folder, Cut((5,), ((1,),)), sampling)
    staged = serve(folder, Cut((2, 2, 1), ((1,),) * 3), sampling)
    assert staged.answers == alone.answers
    for ours, theirs in zip(staged.logprobs, alone.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for prompt, ours, theirs in zip(PROMPTS, staged.prompt_logprobs, alone.prompt_logprobs, strict=True):
        assert len(ours) == len(prompt) - 1
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_aborted_requests_leave_the_others_alone(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_hidden_layers=5)
    model = reference_model(folder)
    served = serve(folder, TWO, GREEDY, (0, 3, 6))
    for number, prompt in enumerate(PROMPTS):
        if number not in (0, 3, 6):
            assert served.answers[number] == greedy_tokens(model, prompt, NUM_TOKENS)
        else:
            assert len(served.answers[number]) == 3
