"""Dispatched models on a real GPU: layers there, in CPU memory and on the disk give the tokens of the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, reference_model
from transformers import AutoConfig, AutoModelForCausalLM

from tpdist.bigmodel import compute_module_sizes, get_max_memory, init_empty_weights, load_checkpoint_and_dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PROMPT = torch.tensor([[5, 7, 11, 13]])


def tokens(model: Any, prompt: torch.Tensor) -> list[int]:
    out = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert out.device == prompt.device
    return [int(token) for token in out[0]]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("gpu", "cpu"), [(2.0, 2.0), (0.7, 2.0), (0.7, 0.0), (0.7, 0.3)])
def test_tokens_are_the_same_wherever_the_layers_are(tmp_path: Path, tied: bool, gpu: float, cpu: float) -> None:
    folder = make_checkpoint(tmp_path, tie_word_embeddings=tied)
    expected = tokens(reference_model(folder), PROMPT)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
    size = compute_module_sizes(model)[""]
    load_checkpoint_and_dispatch(model.eval(), folder, "auto", {0: int(gpu * size), "cpu": int(cpu * size)})
    assert 0 in model.hf_device_map.values()
    for device in ("cpu", "cuda:0"):
        assert tokens(model, PROMPT.to(device)) == expected


def test_free_memory_is_seen() -> None:
    memory = get_max_memory()
    assert memory[0] > 0
    assert "cpu" in memory
