"""Configurations of models that no benchmark loads: for plans, which need no files."""

from tpdist.plan.model_config import LayerConfig, ModelConfig, RopeConfig


def llama(
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    vocab_size: int,
    max_position_embeddings: int,
    head_dim: int = 128,
) -> ModelConfig:
    """A llama in bfloat16 with 128 heads over 8 of keys and values."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        dtype="bfloat16",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=128,
        num_key_value_heads=8,
        head_dim=head_dim,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        layers=(LayerConfig(sliding_window=None, rope=RopeConfig()),) * num_layers,
        bos_token_id=None,
        eos_token_ids=(),
    )
