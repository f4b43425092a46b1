"""The whole path on a CUDA device: one rank, and several gloo ranks that share the device."""

from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, reference_tokens

from tpdist import LLM, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = [[5], [7, 11, 13], list(range(3, 60))]
NUM_TOKENS = 12


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_greedy_tokens_on_the_device_equal_transformers(tmp_path: Path, tp_size: int) -> None:
    folder = make_checkpoint(
        tmp_path / "model", tokenizer=True, hidden_size=96, num_attention_heads=12, num_key_value_heads=4
    )
    expected = reference_tokens(folder, PROMPTS, max_new_tokens=NUM_TOKENS)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    with LLM(folder, device="cuda", local_world_size=tp_size, kv_cache_memory_bytes=64 * 1024**2) as llm:
        outputs = llm.generate(PROMPTS, sampling)
    assert [output.outputs[0].token_ids for output in outputs] == expected
