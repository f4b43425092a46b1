"""Whole engines against transformers, float32 and greedy, with everything that a busy server does at once: prompts in
chunks beside decodes, prefixes found in the cache, several answers to one prompt, and preemption for want of blocks.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from checkpoints import ARCHITECTURES, greedy_tokens, make_checkpoint, reference_model
from decoding import load_decoder
from ranks import run_ranks

from tpdist.control.messages import Generate, StepPlan
from tpdist.engine.engine import Engine, LocalExecutor
from tpdist.engine.kv_cache import allocate
from tpdist.engine.runner import Runner
from tpdist.engine.scheduler import Scheduler
from tpdist.parallel.group import RankGroup, SingleGroup
from tpdist.sampling_params import SamplingParams

BLOCK_SIZE, NUM_BLOCKS, MAX_NUM_SEQS, MAX_LEN = 4, 14, 5, 48
NUM_TOKENS = 14
STEM = [(11 * i + 4) % 250 for i in range(21)]
PROMPTS = [STEM, [*STEM, 7], STEM[:13], [3], STEM[:13], [*STEM[:8], 9, 8, 7, 6, 5], STEM, [250, 1, 2, 3], [*STEM, 7, 9]]
LAYOUTS = [
    (1,),
    (1, 1),
    *(pytest.param(shares, marks=pytest.mark.slow) for shares in [(1, 3), (1, 1, 1), (1, 1, 1, 1)]),
]


@dataclass
class Served:
    answers: list[list[int]]
    preemptions: int
    prefix_cache_hits: int


class PlanChannel:
    """Takes plans from rank 0 to the others through the group's own broadcast; an empty one ends the run."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group

    def send(self, plan: StepPlan | None) -> None:
        data = b"" if plan is None else msgspec.msgpack.encode(plan)
        self._group.broadcast(torch.tensor([len(data)]))
        if data:
            self._group.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def receive(self) -> StepPlan | None:
        size = int(self._group.broadcast(torch.zeros(1, dtype=torch.int64)))
        if not size:
            return None
        data = self._group.broadcast(torch.empty(size, dtype=torch.uint8))
        return msgspec.msgpack.decode(data.numpy().tobytes(), type=StepPlan)


def serve(group: RankGroup, folder: Path, shares: tuple[int, ...]) -> Served | None:
    """Run all prompts on every rank; what came of them on rank 0."""
    decoder = load_decoder(folder, group=group, shares=shares)
    device = torch.device("cpu")
    cache = allocate(
        decoder.cache_shapes(), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=device
    )
    runner = Runner(
        decoder,
        group=group,
        cache=cache,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_LEN,
        epoch=1,
        device=device,
    )
    channel = PlanChannel(group)
    if group.rank == 0:
        served = run_engine(runner, channel)
        channel.send(None)
        return served
    while plan := channel.receive():
        runner.execute(plan)
    return None


def run_engine(runner: Runner, channel: PlanChannel) -> Served:
    """Half of the requests come at once, the others one with every other step."""
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=12,
        max_model_len=MAX_LEN,
        vocab_size=300,
        epoch=1,
    )
    engine = Engine(scheduler, LocalExecutor(runner, send=channel.send))
    answers: list[list[int]] = [[] for _ in PROMPTS]
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    waiting = [
        Generate(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling)
        for index, prompt in enumerate(PROMPTS)
    ]
    for request in waiting[:4]:
        engine.add(request)
    del waiting[:4]
    while engine.has_work or waiting:
        if waiting and runner.step % 2 == 0:
            engine.add(waiting.pop(0))
        outputs = engine.step()
        assert outputs is not None
        for output in outputs.outputs:
            answers[int(output.request_id)] += output.token_ids
        scheduler.check()
    stats = engine.stats()
    return Served(answers, preemptions=stats.preemptions, prefix_cache_hits=stats.prefix_cache_hits)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    windowed = {"sliding_window": 10} if request.param == "MistralForCausalLM" else {}
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(
        folder, architecture=request.param, hidden_size=60, num_attention_heads=12, head_dim=20, **windowed
    )


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    model = reference_model(checkpoint)
    return [greedy_tokens(model, prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("shares", LAYOUTS, ids=str)
def test_a_busy_engine_gives_the_tokens_of_transformers(
    checkpoint: Path, expected: list[list[int]], shares: tuple[int, ...]
) -> None:
    results = [serve(SingleGroup(), checkpoint, shares)] if len(shares) == 1 else None
    served = (results or run_ranks(serve, len(shares), checkpoint, shares))[0]
    assert served.answers == expected
    assert served.preemptions > 0
    assert served.prefix_cache_hits > 0
