"""Qwen2 and Qwen2.5: a llama with biases on q, k and v, and a sliding window on some layers if it is switched on."""

from dataclasses import replace

from tpdist.plan.config_file import ConfigFile
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.parse_config import windows_by_type

# What transformers' Qwen2Config takes for keys that config.json leaves out.
DEFAULTS = {
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def configure(config: ModelConfig, file: ConfigFile) -> ModelConfig:
    return replace(config, qkv_bias=True).with_windows(sliding_windows(file, config.num_hidden_layers))


def sliding_windows(file: ConfigFile, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer: layer_types says which layers have one, or else they are the layers from
    max_window_layers on. use_sliding_window false switches it off."""
    on = file.flag("use_sliding_window") and file.has("sliding_window")
    window = file.positive("sliding_window") if on else None
    if windows := windows_by_type(file, num_layers, window):
        return windows
    first = file.count("max_window_layers")
    return tuple(window if index >= first else None for index in range(num_layers))
