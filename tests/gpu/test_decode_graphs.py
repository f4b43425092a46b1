"""Decode steps as real CUDA graphs, against the eager path on the same device."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, reference_tokens
from decode_steps import LENS, Decodes
from ranks import Meeting, open_store, run_processes
from torch import Tensor

from tpdist import LLM, SamplingParams
from tpdist.engine.decode_graphs import CudaRecorder
from tpdist.layers.attention import AttentionContext, gather_attention
from tpdist.parallel.process_group import connect

NUM_GPUS = torch.cuda.device_count()
NUM_TOKENS = 12
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
# They reach the rung above 256 tokens, and batches of all sizes up to nine.
PROMPTS = [[(7 * index + place) % 256 for place in range(1 + 32 * index)] for index in range(9)]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS == 0, reason="no CUDA device")]
needs_two = pytest.mark.skipif(NUM_GPUS < 2, reason="NCCL wants a device for each rank, and there are not two")


@pytest.fixture(autouse=True)
def _inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


def on_device(**options: Any) -> Decodes:
    return Decodes(CudaRecorder(), device=torch.device("cuda", torch.cuda.current_device()), **options)


@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize("windows", [(None, None, None), (5, None, 300)])
def test_every_batch_size_gives_what_the_eager_path_gives(windows: Sequence[int | None], num_kv_heads: int) -> None:
    decodes = on_device(windows=windows, num_kv_heads=num_kv_heads)
    for num_seqs in range(1, 10):
        decodes.check({slot: LENS[slot] for slot in range(num_seqs)}, tolerance=1e-3)
    for num_seqs in (2, 9, 1, 5):  # graphs that were recorded before others, in the memory that they share
        decodes.check({slot: LENS[-1 - slot] for slot in range(num_seqs)}, tolerance=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_within_the_tolerance(dtype: torch.dtype) -> None:
    decodes = on_device(dtype=dtype)
    for num_seqs in range(1, 10):
        decodes.check({slot: LENS[slot] for slot in range(num_seqs)}, tolerance=0.1)


def test_a_step_that_waits_for_the_device_is_run_eagerly_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    def attend(*args: Any, context: AttentionContext, **kwargs: Any) -> Tensor:
        if context.device_lens is not None:
            context.device_lens.tolist()
        return gather_attention(*args, context=context, **kwargs)

    lens = {0: 17, 4: 300}
    decodes, alone = on_device(attend=attend), on_device(enabled=False)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(decodes.run(lens), alone.eager(lens))
    assert "the capture failed" in caplog.text
    assert not decodes.serves(lens)
    for _ in range(3):
        torch.testing.assert_close(decodes.eager(lens), alone.eager(lens))
    torch.testing.assert_close(decodes.cache.layers, alone.cache.layers)


def generate(folder: Path, **options: Any) -> list[list[int]]:
    """Greedy tokens of prompts alone and together, so that batches shrink and grow."""
    with LLM(folder, device="cuda", kv_cache_memory_bytes=64 * 1024**2, **options) as llm:
        outputs = [llm.generate(PROMPTS[:num_seqs], GREEDY) for num_seqs in range(1, len(PROMPTS) + 1)]
    answers = [[output.outputs[0].token_ids for output in each] for each in outputs]
    assert all(each == answers[-1][: len(each)] for each in answers)
    return answers[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, tokenizer=True, hidden_size=96, num_attention_heads=12, num_key_value_heads=4)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return reference_tokens(model, PROMPTS, max_new_tokens=NUM_TOKENS)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_one_rank_gives_the_same_tokens_with_graphs_and_without(
    model: Path, expected: list[list[int]], enforce_eager: bool
) -> None:
    assert generate(model, local_world_size=1, enforce_eager=enforce_eager) == expected


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_share_a_device_run_eagerly_and_agree(
    model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert generate(model, local_world_size=num_ranks) == expected


@needs_two
def test_two_devices_give_the_same_tokens_over_nccl(model: Path, expected: list[list[int]]) -> None:
    assert generate(model, local_world_size=2) == expected


def check_over_nccl(rank: int, meeting: Meeting) -> int:
    """Returns how many graphs were recorded. The process just ends: to leave a group, NCCL waits until no graph holds
    its collectives."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    store = open_store(meeting)
    group = connect(rank=rank, world_size=2, tp_size=2, backend="nccl", store=store, timeout_s=60, device=device)
    with torch.inference_mode():
        decodes = on_device(group=group)
        for num_seqs in (1, 3, 8, 3):
            decodes.check({slot: LENS[slot] for slot in range(num_seqs)}, tolerance=1e-3)
    torch.cuda.synchronize()
    return decodes.num_recorded


@needs_two
def test_graphs_hold_the_collectives_of_nccl() -> None:
    assert run_processes(check_over_nccl, 2) == [3, 3]
