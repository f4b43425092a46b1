import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tpdist.errors import PlanError
from tpdist.layers.rotary import Rotary, attention_factor, inverse_frequencies, rotate
from tpdist.plan.model_config import RopeConfig

CPU = torch.device("cpu")
HEAD_DIM = 20
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
RULES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.3},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": YARN,
    "yarn, betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, untruncated": {**YARN, "truncate": False},
    "yarn, equal bounds": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "yarn, attention factor": {**YARN, "attention_factor": 0.8},
    "yarn, mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn, mscale without its pair": {**YARN, "mscale": 0.7},
}


def reference(rule: dict, length: int = 512) -> LlamaRotaryEmbedding:
    parameters = {"rope_theta": 10_000.0, **rule}
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=HEAD_DIM * 2,
            num_attention_heads=2,
            head_dim=HEAD_DIM,
            max_position_embeddings=length,
            rope_parameters=parameters,
        )
    )


@pytest.mark.parametrize("name", RULES)
def test_frequencies_have_the_bits_of_transformers(name):
    expected = reference(RULES[name])
    assert torch.equal(inverse_frequencies(RopeConfig(**RULES[name]), HEAD_DIM), expected.inv_freq)
    assert attention_factor(RopeConfig(**RULES[name])) == expected.attention_scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_rotated_heads_have_the_bits_of_transformers(name, dtype):
    positions = torch.tensor([0, 1, 2, 63, 64, 65, 300, 511])
    heads = torch.randn(8, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = reference(RULES[name])(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(heads, heads, cos[0], sin[0])
    angles = Rotary(RopeConfig(**RULES[name]), head_dim=HEAD_DIM, device=CPU)(positions, dtype=dtype)
    assert torch.equal(rotate(heads, *angles), expected)


def test_dynamic_scaling_up_to_the_original_length_is_the_default_but_for_rounding():
    dynamic = inverse_frequencies(RopeConfig(rope_type="dynamic", factor=2.3), HEAD_DIM)
    torch.testing.assert_close(dynamic, inverse_frequencies(RopeConfig(), HEAD_DIM), rtol=1e-6, atol=0)


def test_a_partial_rotation_leaves_the_other_dims_alone():
    heads = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(3)
    partial = Rotary(RopeConfig(partial_rotary_factor=0.5), head_dim=8, device=CPU)(positions, dtype=torch.float32)
    whole = Rotary(RopeConfig(), head_dim=4, device=CPU)(positions, dtype=torch.float32)
    rotated = rotate(heads, *partial)
    assert torch.equal(rotated[..., 4:], heads[..., 4:])
    assert torch.equal(rotated[..., :4], rotate(heads[..., :4], *whole))


def test_rotation_does_not_change_its_input():
    heads = torch.ones(2, 1, 4)
    rotate(heads, *Rotary(RopeConfig(), head_dim=4, device=CPU)(torch.tensor([3, 4]), dtype=torch.float32))
    assert torch.equal(heads, torch.ones(2, 1, 4))


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(PlanError, match="rope_type 'longrope' is not supported; supported are default, linear"):
        inverse_frequencies(RopeConfig(rope_type="longrope"), 8)


def test_a_rule_without_its_numbers_is_refused():
    with pytest.raises(PlanError, match="needs original_max_position_embeddings, low_freq_factor, high_freq_factor"):
        inverse_frequencies(RopeConfig(rope_type="llama3", factor=8.0), 8)
