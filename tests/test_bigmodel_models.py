"""Whole transformers models: the same greedy tokens from generate(), in memory, offloaded to the CPU or to the disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, reference_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import ModelOutput

from tpdist.bigmodel import (
    compute_module_sizes,
    cpu_offload,
    disk_offload,
    find_tied_parameters,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)

pytestmark = pytest.mark.slow

PROMPT = torch.tensor([[5, 7, 11, 13], [2, 3, 4, 6]])
NUM_TOKENS = 8


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen2ForCausalLM"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        architecture=architecture,
        tie_word_embeddings=request.param,
        max_shard_size="200KB",
    )


def tokens(model: Any, **options: Any) -> list[list[int]]:
    mask = torch.ones_like(PROMPT)
    out = model.generate(
        PROMPT, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, **options
    )
    return [[int(token) for token in row] for row in out]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return tokens(reference_model(folder))


def skeleton(folder: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert bool(find_tied_parameters(model)) == config.tie_word_embeddings
    return model.eval()


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("share", [2.0, 0.5, 0.3, 0.0])
@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_what_has_no_room_in_memory_stays_on_the_disk(
    folder: Path, expected: list[list[int]], share: float, prefetch: int, tmp_path: Path
) -> None:
    """A share of 0.5 is a model of twice the memory that is allowed."""
    model = skeleton(folder)
    before = files(folder)
    allowed = int(share * compute_module_sizes(model)[""])
    load_checkpoint_and_dispatch(
        model, folder, "auto", {"cpu": allowed}, offload_folder=tmp_path / "none", strict=True, prefetch_blocks=prefetch
    )
    resident = sum(tensor.nbytes for tensor in model.parameters() if tensor.device.type != "meta")
    assert resident <= allowed
    assert ("disk" in model.hf_device_map.values()) == (share < 1)
    assert (resident > 0) == (share >= 0.5)
    assert tokens(model) == expected
    assert tokens(model, use_cache=False) == expected
    assert files(folder) == before
    assert not (tmp_path / "none").exists()


def test_generate_works_with_everything_on_the_cpu_or_the_disk(
    folder: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    assert tokens(cpu_offload(reference_model(folder), execution_device="cpu")) == expected
    assert tokens(disk_offload(reference_model(folder), tmp_path)) == expected
    assert tokens(disk_offload(reference_model(folder), tmp_path, offload_buffers=True)) == expected


@pytest.mark.parametrize(
    "device_map",
    [
        {"model.embed_tokens": "disk", "": "cpu"},
        {"lm_head": "disk", "": "cpu"},
        {"model.layers.1": "disk", "": "cpu"},
        {"model.layers.1.mlp": "disk", "model.layers.2.self_attn.q_proj": "disk", "": "cpu"},
        {"model.rotary_emb": "cpu", "": "disk"},
    ],
)
def test_any_part_may_be_on_the_disk(folder: Path, expected: list[list[int]], device_map: dict[str, Any]) -> None:
    assert tokens(load_checkpoint_and_dispatch(skeleton(folder), folder, device_map)) == expected


def test_outputs_are_those_of_the_model(folder: Path) -> None:
    model = load_checkpoint_and_dispatch(skeleton(folder), folder, {"": "disk"})
    reference = reference_model(folder)
    with torch.inference_mode():
        out = model(input_ids=PROMPT, output_hidden_states=True)
        theirs = reference(input_ids=PROMPT, output_hidden_states=True)
    assert isinstance(out, ModelOutput)
    assert torch.equal(out.logits, theirs.logits)
    assert len(out.hidden_states) == len(theirs.hidden_states)
    assert isinstance(model(PROMPT, return_dict=False), tuple)


def test_half_precision_loads_as_the_checkpoint_has_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = load_checkpoint_and_dispatch(skeleton(folder), folder, {"": "disk"}, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
    assert torch.equal(model(PROMPT).logits, reference(PROMPT).logits)


def test_an_encoder_and_a_decoder_share_their_embeddings(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(PROMPT, **options)
    for device_map in ({"": "disk"}, "auto", {"encoder.block.1": "disk", "decoder": "disk", "": "cpu"}):
        with init_empty_weights():
            again = T5ForConditionalGeneration(config)
        load_checkpoint_and_dispatch(again.eval(), tmp_path, device_map, {"cpu": "10KB"})
        assert torch.equal(again.generate(PROMPT, **options), expected)
