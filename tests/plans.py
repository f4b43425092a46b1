"""Model configurations for tests that need no files."""

from typing import Any

from tpdist.plan.model_config import LayerConfig, ModelConfig, RopeConfig


def small_config(**changes: Any) -> ModelConfig:
    """A small llama-like model of three layers; `changes` are fields of ModelConfig."""
    num_layers = changes.get("num_hidden_layers", 3)
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "layers": (LayerConfig(sliding_window=None, rope=RopeConfig()),) * num_layers,
        "bos_token_id": None,
        "eos_token_ids": (),
    }
    return ModelConfig(**{**fields, **changes})
