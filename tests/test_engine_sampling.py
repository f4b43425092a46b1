"""Sampling by whole models: log-probabilities are those of transformers however a prompt is cut into chunks, and a
sequence gets the same tokens alone, among others with any options, and over several ranks.

Models are compared at 1e-4: float32, three layers, logits of a magnitude of some units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, reference_logits
from decoding import load_decoder
from ranks import run_ranks

from tpdist.control.messages import SequenceStart, SlotBlocks, SlotWork, StepPlan, TokenLogprobs
from tpdist.engine.kv_cache import allocate
from tpdist.engine.runner import Runner
from tpdist.parallel.group import RankGroup, SingleGroup
from tpdist.sampling_params import SamplingParams

BLOCK_SIZE = 4
NUM_TOKENS = 6
PROMPTS = [[(7 * i + 3) % 290 for i in range(length)] for length in (41, 2, 1)]
ASKING = SamplingParams(temperature=0, logprobs=3, prompt_logprobs=5)
MIXED = (
    SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.5, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=1.2, top_k=20, logit_bias={5: 3.0, 250: -2.0}, presence_penalty=-0.5),
    SamplingParams(temperature=0, repetition_penalty=1.3, min_tokens=4, logprobs=0),
    SamplingParams(min_p=0.05, min_tokens=2, prompt_logprobs=0),
)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class Request:
    prompt: list[int]
    sampling: SamplingParams
    seed: int = 0
    done: int = 0

    @property
    def num_steps_left(self) -> int:
        return len(self.prompt) + NUM_TOKENS - 1 - self.done

    def work(self, slot: int, chunk: int) -> SlotWork:
        """The next `chunk` tokens of the prompt, or a decode."""
        first, self.done = self.done, self.done + max(1, min(chunk, len(self.prompt) - self.done))
        return SlotWork(slot, first, self.done - first, self.done >= len(self.prompt))

    def start(self, slot: int) -> SequenceStart:
        data = np.array(self.prompt, dtype="<i4").tobytes()
        return SequenceStart(slot, data, len(self.prompt), self.seed, self.sampling, (298, 299))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), vocab_size=301)


def plans(requests: Sequence[Request], *, chunk: int) -> list[StepPlan]:
    """All requests side by side, `chunk` tokens of each prompt in a step."""
    width = -(-(max(len(request.prompt) for request in requests) + NUM_TOKENS) // BLOCK_SIZE)
    starts = tuple(request.start(slot) for slot, request in enumerate(requests))
    blocks = tuple(SlotBlocks(slot, tuple(range(slot * width, (slot + 1) * width))) for slot in range(len(requests)))
    found = [StepPlan(epoch=1, step=1, start=starts, blocks=blocks, work=next_work(requests, chunk))]
    while work := next_work(requests, chunk):
        found.append(StepPlan(epoch=1, step=len(found) + 1, work=work))
    return found


def next_work(requests: Sequence[Request], chunk: int) -> tuple[SlotWork, ...]:
    return tuple(request.work(slot, chunk) for slot, request in enumerate(requests) if request.num_steps_left > 0)


def run(
    group: RankGroup, folder: Path, shares: Sequence[int], requests: Sequence[Request], chunk: int
) -> list[Answer] | None:
    """The answer of each request; None on ranks other than 0."""
    decoder = load_decoder(folder, group=group, shares=shares)
    cpu = torch.device("cpu")
    cache = allocate(decoder.cache_shapes(), num_blocks=128, block_size=BLOCK_SIZE, dtype=torch.float32, device=cpu)
    runner = Runner(decoder, group=group, cache=cache, max_num_seqs=8, max_model_len=64, epoch=1, device=cpu)
    answers = [Answer() for _ in requests]
    for plan in plans(requests, chunk=chunk):
        result = runner.execute(plan)
        if result is None:
            continue
        for slot, token in result.token_ids:
            answers[slot].tokens.append(token)
        for slot, entry in result.logprobs.items():
            answers[slot].logprobs.append(entry)
        for slot, entries in result.prompt_logprobs.items():
            answers[slot].prompt_logprobs.extend(entries)
    return answers if group.rank == 0 else None


def alone(folder: Path, requests: Sequence[Request], *, chunk: int = 64) -> list[Answer]:
    """What each request gets by itself."""
    answers = [run(SingleGroup(), folder, (1,), [request], chunk) for request in requests]
    return [answer[0] for answer in answers if answer]


def asking() -> list[Request]:
    return [Request(prompt, ASKING) for prompt in PROMPTS]


def mixed() -> list[Request]:
    """Every option with every prompt; the seeds differ."""
    pairs = [(prompt, sampling) for prompt in PROMPTS[:2] for sampling in MIXED]
    return [Request(prompt, sampling, seed) for seed, (prompt, sampling) in enumerate(pairs)]


def assert_close(
    entries: Sequence[TokenLogprobs], logits: torch.Tensor, token_ids: Sequence[int], *, num_top: int
) -> None:
    """logits: [n, vocab_size] of the reference, which predicted `token_ids`."""
    logprobs = logits.log_softmax(dim=-1)
    assert len(entries) == len(logprobs) == len(token_ids)
    for entry, line, token in zip(entries, logprobs, token_ids, strict=True):
        top = line.argsort(descending=True)[:num_top].tolist()
        assert entry.token_ids == (token, *top)
        assert entry.rank == 1 + (line > line[token]).sum().item()
        assert entry.logprobs == pytest.approx(line[[token, *top]].tolist(), abs=1e-4)


def check_against_transformers(folder: Path, answers: Sequence[Answer] | None) -> None:
    assert answers is not None
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        logits = reference_logits(folder, prompt + answer.tokens)
        last = len(prompt) - 1
        assert_close(answer.prompt_logprobs, logits[:last], prompt[1:], num_top=5)
        assert_close(answer.logprobs, logits[last:-1], answer.tokens, num_top=3)
        assert answer.tokens == logits[last:-1].argmax(dim=-1).tolist()


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_logprobs_of_prompt_and_completion_are_those_of_transformers_in_any_chunks(llama: Path, chunk: int) -> None:
    check_against_transformers(llama, run(SingleGroup(), llama, (1,), asking(), chunk))


@pytest.mark.parametrize("shares", [(1, 1), (3, 1)])
def test_two_ranks_report_the_logprobs_of_transformers_on_the_first(llama: Path, shares: tuple[int, ...]) -> None:
    first, second = run_ranks(run, 2, llama, shares, asking(), 40)
    check_against_transformers(llama, first)
    assert second is None


def same_tokens(answers: Sequence[Answer], others: Sequence[Answer] | None) -> bool:
    return [answer.tokens for answer in answers] == [answer.tokens for answer in others or ()]


@pytest.mark.parametrize("chunk", [2, 64])
def test_seeds_give_the_same_tokens_alone_and_among_others_with_all_options_mixed(llama: Path, chunk: int) -> None:
    answers = alone(llama, mixed())
    assert len({tuple(answer.tokens) for answer in answers}) > len(MIXED)
    assert same_tokens(answers, run(SingleGroup(), llama, (1,), mixed(), chunk))


def test_seeds_give_the_same_tokens_over_two_ranks(llama: Path) -> None:
    first, _ = run_ranks(run, 2, llama, (1, 1), mixed(), 64)
    assert same_tokens(alone(llama, mixed()), first)


def test_only_sequences_that_ask_for_logprobs_get_them(llama: Path) -> None:
    answers = run(SingleGroup(), llama, (1,), mixed(), 5)
    assert answers is not None
    for request, answer in zip(mixed(), answers, strict=True):
        options = request.sampling
        assert len(answer.logprobs) == (NUM_TOKENS if options.logprobs is not None else 0)
        assert len(answer.prompt_logprobs) == (len(request.prompt) - 1 if options.prompt_logprobs is not None else 0)
