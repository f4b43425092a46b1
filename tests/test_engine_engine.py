"""The engine with real decoders against transformers: token for token in float32, whatever runs beside a request."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from checkpoints import make_checkpoint, reference_tokens
from ranks import run_ranks

from tpdist.checkpoint.index import CheckpointIndex
from tpdist.checkpoint.load import load_weights
from tpdist.control.messages import Generate, StepPlan
from tpdist.engine.engine import Engine, LocalExecutor
from tpdist.engine.kv_cache import allocate
from tpdist.engine.runner import Runner
from tpdist.engine.scheduler import Scheduler
from tpdist.models.decoder import Decoder
from tpdist.models.registry import load_config, weights
from tpdist.parallel.group import RankGroup, SingleGroup
from tpdist.plan.shards import Partition
from tpdist.sampling_params import SamplingParams

CPU = torch.device("cpu")
BLOCK_SIZE = 4
MAX_NUM_SEQS = 6
MAX_MODEL_LEN = 96
NUM_TOKENS = 12
PROMPT_LENS = (1, 3, 4, 5, 17, 40)
PROMPTS = [[(7 * i + length) % 290 for i in range(length)] for length in PROMPT_LENS]
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), architecture="LlamaForCausalLM")


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[int]]:
    return reference_tokens(llama, PROMPTS, NUM_TOKENS)


def make_runner(folder: Path, *, group: RankGroup, num_blocks: int) -> Runner:
    config = load_config(folder)
    partition = Partition.even(group.size)
    model = Decoder(config, partition=partition, group=group, dtype=torch.float32, device=CPU)
    index = CheckpointIndex.read(folder)
    load_weights(
        model,
        index=index,
        weights=weights(config),
        partition=partition,
        rank=group.rank,
        threads=1,
        progress=lambda done, total: None,
    )
    cache = allocate(
        model.cache_shapes(), num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
    )
    return Runner(
        model,
        group=group,
        cache=cache,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        epoch=1,
        device=CPU,
    )


def make_scheduler(folder: Path, *, num_blocks: int, max_num_batched_tokens: int = 64) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=load_config(folder).vocab_size,
        epoch=1,
    )


def make_engine(folder: Path, *, num_blocks: int = 200, max_num_batched_tokens: int = 64) -> Engine:
    runner = make_runner(folder, group=SingleGroup(), num_blocks=num_blocks)
    scheduler = make_scheduler(folder, num_blocks=num_blocks, max_num_batched_tokens=max_num_batched_tokens)
    return Engine(scheduler, LocalExecutor(runner))


def answers(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, steps_between: int = 0
) -> list[list[int]]:
    """The tokens of each prompt; `steps_between` steps run before the next prompt is added."""
    tokens: list[list[int]] = [[] for _ in prompts]

    def step() -> bool:
        outputs = engine.step()
        for output in outputs.outputs if outputs else ():
            tokens[int(output.request_id)].extend(output.token_ids)
        return outputs is not None

    for number, prompt in enumerate(prompts):
        engine.add(Generate(request_id=str(number), prompt_token_ids=tuple(prompt), sampling=sampling))
        for _ in range(steps_between):
            step()
    while step():
        pass
    return tokens


def test_greedy_tokens_are_those_of_transformers_for_each_prompt_alone(llama: Path, expected: list[list[int]]) -> None:
    engine = make_engine(llama)
    assert [answers(engine, [prompt], GREEDY)[0] for prompt in PROMPTS] == expected


def test_greedy_tokens_are_those_of_transformers_when_all_run_together(llama: Path, expected: list[list[int]]) -> None:
    assert answers(make_engine(llama), PROMPTS, GREEDY) == expected


@pytest.mark.parametrize("max_num_batched_tokens", [1, 5, 7])
def test_chunks_of_a_prompt_give_the_same_tokens_as_the_whole(
    llama: Path, expected: list[list[int]], max_num_batched_tokens: int
) -> None:
    engine = make_engine(llama, max_num_batched_tokens=max_num_batched_tokens)
    assert answers(engine, PROMPTS, GREEDY, steps_between=2) == expected


def test_preempted_sequences_get_the_same_tokens(llama: Path, expected: list[list[int]]) -> None:
    engine = make_engine(llama, num_blocks=14)
    assert answers(engine, PROMPTS, GREEDY, steps_between=1) == expected
    assert engine.stats().preemptions > 0


def test_a_seeded_draw_does_not_depend_on_what_runs_beside_it(llama: Path) -> None:
    sampling = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0.9, top_p=0.95, top_k=40, seed=7, repetition_penalty=1.1, ignore_eos=True
    )
    alone = [answers(make_engine(llama), [prompt], sampling)[0] for prompt in PROMPTS]
    crowded = make_engine(llama, num_blocks=14, max_num_batched_tokens=9)
    assert answers(crowded, PROMPTS, sampling) == alone
    assert crowded.stats().preemptions > 0


def test_a_sequence_alone_fills_the_cache_to_its_last_token(llama: Path) -> None:
    engine = make_engine(llama, num_blocks=5)
    endless = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
    assert answers(engine, [PROMPTS[3]], endless) == reference_tokens(llama, [PROMPTS[3]], 5 * BLOCK_SIZE - 5)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("MistralForCausalLM", {"sliding_window": 9}),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
        ("Qwen3ForCausalLM", {"num_key_value_heads": 2}),
    ],
)
def test_every_family_gives_the_tokens_of_transformers_under_preemption(
    tmp_path: Path, architecture: str, overrides: dict[str, Any]
) -> None:
    folder = make_checkpoint(tmp_path, architecture=architecture, **overrides)
    engine = make_engine(folder, num_blocks=14, max_num_batched_tokens=11)
    assert answers(engine, PROMPTS, GREEDY) == reference_tokens(folder, PROMPTS, NUM_TOKENS)


def tokens_of_a_rank(group: RankGroup, folder: Path) -> list[list[int]] | None:
    """Rank 0 runs the engine, the others run what arrives; until they are told to end."""
    runner = make_runner(folder, group=group, num_blocks=14)

    if group.rank == 0:
        scheduler = make_scheduler(folder, num_blocks=14, max_num_batched_tokens=11)
        engine = Engine(
            scheduler, LocalExecutor(runner, send=lambda plan: pass_on(group, msgspec.msgpack.encode(plan)))
        )
        tokens = answers(engine, PROMPTS, GREEDY)
        pass_on(group, b"end")
        return tokens
    while (data := receive(group)) != b"end":
        assert runner.execute(msgspec.msgpack.decode(data, type=StepPlan)) is None
    return None


def pass_on(group: RankGroup, data: bytes) -> None:
    group.broadcast(torch.tensor([len(data)]))
    group.broadcast(torch.tensor(list(data)))


def receive(group: RankGroup) -> bytes:
    size = int(group.broadcast(torch.zeros(1, dtype=torch.int64)))
    return bytes(group.broadcast(torch.zeros(size, dtype=torch.int64)).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_give_the_tokens_of_transformers(llama: Path, expected: list[list[int]], world_size: int) -> None:
    assert run_ranks(tokens_of_a_rank, world_size, llama) == [expected] + [None] * (world_size - 1)
