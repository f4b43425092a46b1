"""Stages that share one GPU, and layers of one process on the GPU, the CPU and the disk, against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, reference_tokens

from tpdist import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[(7 * i + length) % 290 for i in range(length)] for length in (3, 17, 40)]
NUM_TOKENS = 10
MAPPED = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": "cpu"}
ENDS_ON_CPU = {"model.layers.3": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
ENDS_ON_DISK = {"model.layers.3": "disk", "model.norm": "disk", "lm_head": "disk"}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("model"), num_hidden_layers=4, tie_word_embeddings=request.param, tokenizer=True
    )


@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_parallel_size": 2, "tensor_parallel_size": 1},
        {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "pipeline_layers": (1, 3)},
        {"device_layers": "0:2"},
        {"device_map": MAPPED | ENDS_ON_CPU},
        {"device_map": MAPPED | ENDS_ON_DISK, "offload_folder": "/tmp"},
        {"no_nccl": True},
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers(checkpoint: Path, options: dict[str, Any]) -> None:
    expected = reference_tokens(checkpoint, PROMPTS, NUM_TOKENS)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    with LLM(checkpoint, device="cuda", dtype="float32", kv_cache_memory_bytes="64MiB", **options) as llm:
        found = llm.generate(PROMPTS, sampling)
        held = llm.cluster_state().nodes[0].ranks[0].held
    assert [list(each.outputs[0].token_ids) for each in found] == expected
    assert any(each.device.startswith("cuda") for each in held)


def test_a_prompt_is_scored_in_chunks_where_the_output_lies_on_another_device(checkpoint: Path) -> None:
    """Steps that only score have nothing to sample, and scores on the device of the output."""
    sampling = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=1, ignore_eos=True)
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory_bytes": "64MiB"}
    with LLM(checkpoint, device="cpu", **options) as llm:
        (expected,) = llm.generate([PROMPTS[-1]], sampling)
    mapped = {"device": "cuda", "device_map": MAPPED | ENDS_ON_CPU, "max_num_batched_tokens": 16}
    with LLM(checkpoint, **mapped, **options) as llm:
        (found,) = llm.generate([PROMPTS[-1]], sampling)
    assert found.prompt_logprobs is not None
    assert expected.prompt_logprobs is not None
    for token, ours, theirs in zip(
        PROMPTS[-1][1:], found.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True
    ):
        assert ours is not None
        assert theirs is not None
        assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-3)
