"""Qwen3 (dense): a llama with a norm on every query and key head; its sliding windows are those of Qwen2."""

from dataclasses import replace

from tpdist.models import qwen2
from tpdist.plan.config_file import ConfigFile
from tpdist.plan.model_config import ModelConfig

# What transformers' Qwen3Config takes for keys that config.json leaves out.
DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def configure(config: ModelConfig, file: ConfigFile) -> ModelConfig:
    bias = file.flag("attention_bias")
    windows = qwen2.sliding_windows(file, config.num_hidden_layers)
    return replace(config, qkv_bias=bias, o_bias=bias, qk_norm=True).with_windows(windows)
