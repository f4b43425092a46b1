"""Llama, and every checkpoint that calls itself one: rotary grouped-query attention, SwiGLU, optional biases."""

from dataclasses import replace

from tpdist.plan.config_file import ConfigFile
from tpdist.plan.model_config import ModelConfig

# What transformers' LlamaConfig takes for keys that config.json leaves out.
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def configure(config: ModelConfig, file: ConfigFile) -> ModelConfig:
    bias = file.flag("attention_bias")
    return replace(config, qkv_bias=bias, o_bias=bias, mlp_bias=file.flag("mlp_bias"))
