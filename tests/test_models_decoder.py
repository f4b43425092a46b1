"""Whole tiny models against transformers: logits close, greedy tokens equal, for every family, rule and sharding.

Logits are compared at 1e-4: float32, three layers, logits of a magnitude of some units.
"""

import pytest
import torch
from checkpoints import greedy_tokens as expected_tokens
from checkpoints import make_checkpoint, reference_model
from decoding import greedy_tokens, load_decoder, prompt_logits
from ranks import run_ranks

from tpdist.errors import PlanError
from tpdist.models.decoder import Decoder
from tpdist.models.registry import load_config, weights
from tpdist.parallel.group import FakeGroup, SingleGroup
from tpdist.plan.model_config import LayerConfig, ModelConfig, RopeConfig
from tpdist.plan.shards import Partition, local_shape

torch.set_num_threads(1)

PROMPTS = [[5, 17, 280, 3, 99, 5, 5, 61, 230, 8, 12, 250, 7], [41, 2, 6], [77]]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
HEADS_6_OF_20 = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20}
MODELS = {
    "llama": {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 72,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "llama, all biases": {"architecture": "LlamaForCausalLM", "attention_bias": True, "mlp_bias": True},
    "llama, tied, odd vocabulary": {
        "architecture": "LlamaForCausalLM",
        "tie_word_embeddings": True,
        "vocab_size": 515,
        **HEADS_6_OF_20,
    },
    "llama, one kv head": {"architecture": "LlamaForCausalLM", "num_key_value_heads": 1, "intermediate_size": 101},
    "llama, gelu": {"architecture": "LlamaForCausalLM", "hidden_act": "gelu_pytorch_tanh"},
    "llama, linear rope": {
        "architecture": "LlamaForCausalLM",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama, dynamic rope": {
        "architecture": "LlamaForCausalLM",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama, llama3 rope": {"architecture": "LlamaForCausalLM", "rope_parameters": LLAMA3},
    "llama, yarn": {"architecture": "LlamaForCausalLM", "rope_parameters": YARN, "max_position_embeddings": 64},
    "mistral, window": {"architecture": "MistralForCausalLM", "sliding_window": 5},
    "mistral, no window": {"architecture": "MistralForCausalLM", "sliding_window": None, **HEADS_6_OF_20},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2, upper windows": {
        "architecture": "Qwen2ForCausalLM",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"architecture": "Qwen3ForCausalLM", "num_key_value_heads": 2, "head_dim": 24},
    "qwen3, mixed windows": {
        "architecture": "Qwen3ForCausalLM",
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_bias": True,
    },
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """A folder, and transformers' model of it."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), **{"dtype": torch.float32, **MODELS[request.param]})
    return folder, reference_model(folder)


def made(name, folder):
    return make_checkpoint(folder, **MODELS[name])


def test_the_logits_of_a_prompt_are_those_of_transformers(checkpoint):
    folder, reference = checkpoint
    seen = prompt_logits(SingleGroup(), folder, (1,), PROMPTS[0])
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits[0]
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 4])
def test_greedy_tokens_of_prompts_side_by_side_are_those_of_transformers_one_by_one(checkpoint, chunk):
    folder, reference = checkpoint
    seen = greedy_tokens(SingleGroup(), folder, (1,), PROMPTS, 6, chunk)
    assert seen == [expected_tokens(reference, prompt, 6) for prompt in PROMPTS]


def check_sharded(folder, shares):
    reference = reference_model(folder)
    expected = [expected_tokens(reference, prompt, 4) for prompt in PROMPTS]
    assert run_ranks(greedy_tokens, len(shares), folder, shares, PROMPTS, 4, 5) == [expected] * len(shares)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("llama, all biases", (1, 1)),
        ("llama, tied, odd vocabulary", (2, 1)),
        ("qwen3, mixed windows", (1, 1, 1)),
        ("llama, one kv head", (1, 1, 1, 1)),
    ],
)
def test_sharded_models_generate_the_tokens_of_transformers(name, shares, tmp_path):
    check_sharded(made(name, tmp_path), shares)


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(1, 1), (1, 3), (1, 1, 1), (3, 1, 2), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_generates_the_tokens_of_transformers_for_every_sharding(name, shares, tmp_path):
    check_sharded(made(name, tmp_path), shares)


def large_config(**changes) -> ModelConfig:
    """The sizes of a 70 billion parameter llama."""
    sizes = {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
        "layers": (LayerConfig(sliding_window=None, rope=RopeConfig()),) * 80,
        "bos_token_id": None,
        "eos_token_ids": (),
    }
    return ModelConfig(**{**sizes, **changes})


def on_meta(config: ModelConfig, *, shares: tuple[int, ...], rank: int) -> Decoder:
    return Decoder(
        config,
        partition=Partition(shares),
        group=FakeGroup(rank=rank, size=len(shares)),
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )


@pytest.mark.parametrize("shares", [(1,), (1, 1, 1), (2, 1, 1), (1,) * 8, (1,) * 20], ids=str)
def test_parameters_at_full_size_have_the_planned_shape_on_the_first_middle_and_last_rank(shares):
    config, partition = large_config(), Partition(shares)
    for rank in sorted({0, len(shares) // 2, len(shares) - 1}):
        decoder = on_meta(config, shares=shares, rank=rank)
        planned = set()
        for spec in weights(config).specs:
            path, leaf = spec.parameter.rsplit(".", 1)
            module = decoder.get_submodule(path)
            fused = hasattr(module, "part_view")
            here = module.part_view(leaf, spec.part) if fused else module.get_parameter(leaf)
            assert here.shape == local_shape(spec, partition, rank), (spec.name, rank)
            planned.add(spec.parameter)
        assert planned == {name for name, _ in decoder.named_parameters()}


def test_cache_shapes_count_the_key_value_heads_of_the_rank():
    config = large_config(num_hidden_layers=2, layers=large_config().layers[:2])
    assert on_meta(config, shares=(1, 1, 1), rank=0).cache_shapes() == (((3, 128), (3, 128)),) * 2
    assert on_meta(config, shares=(1,) * 16, rank=5).cache_shapes() == (((1, 128), (1, 128)),) * 2


def test_tied_embeddings_are_one_parameter(tmp_path):
    decoder = load_decoder(made("qwen2", tmp_path), group=SingleGroup(), shares=(1,))
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert "lm_head.weight" not in {spec.parameter for spec in weights(load_config(tmp_path)).specs}


def test_layers_of_one_rope_share_its_frequencies():
    short, long = RopeConfig(), RopeConfig(rope_theta=5e5)
    layers = tuple(LayerConfig(sliding_window=None, rope=rope) for rope in (short, long, short))
    decoder = on_meta(large_config(layers=layers, num_hidden_layers=3), shares=(1,), rank=0)
    assert len(decoder.model.rotaries) == 2
    assert decoder.model.rotary_of_layer == [0, 1, 0]


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(PlanError, match="hidden_act 'relu6' is not supported; use one of silu"):
        on_meta(large_config(hidden_act="relu6"), shares=(1,), rank=0)


def test_a_partition_for_another_group_is_refused():
    with pytest.raises(AssertionError, match="partition of 2 ranks, group of 1"):
        Decoder(
            large_config(),
            partition=Partition((1, 1)),
            group=SingleGroup(),
            dtype=torch.bfloat16,
            device=torch.device("meta"),
        )
