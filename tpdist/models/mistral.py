"""Mistral: a llama without biases whose layers have a sliding window, unless it is null.

With layer_types only the layers it names have one: transformers takes such a checkpoint for a Ministral.
"""

from tpdist.plan.config_file import ConfigFile
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.parse_config import windows_by_type

# What transformers' MistralConfig takes for keys that config.json leaves out.
DEFAULTS = {
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def configure(config: ModelConfig, file: ConfigFile) -> ModelConfig:
    window = file.positive("sliding_window") if file.has("sliding_window") else None
    windows = windows_by_type(file, config.num_hidden_layers, window)
    return config.with_windows(windows or (window,) * config.num_hidden_layers)
