"""Reads a ModelConfig from config.json and refuses, with file and key, what is missing, malformed or not supported.

Accepts the layout of transformers 5 (rope_parameters, dtype) and the older one (rope_theta and rope_scaling,
torch_dtype), and follows transformers in what an absent key means. Knows no family: models/ says which defaults and
flags each has.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tpdist.errors import PlanError
from tpdist.plan.config_file import ConfigFile
from tpdist.plan.model_config import DEFAULT_ROPE_THETA, LayerConfig, ModelConfig, RopeConfig

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh")


def parse(file: ConfigFile, *, architecture: str) -> ModelConfig:
    """Read the keys that all families share; biases and norms are off and every layer sees all tokens.

    Raises CheckpointError for a missing or malformed key and PlanError for a kind of model that is not supported.
    """
    _refuse_quantization(file)
    heads = file.positive("num_attention_heads")
    hidden_size = file.positive("hidden_size")
    num_layers = file.positive("num_hidden_layers")
    config = ModelConfig(
        architecture=architecture,
        model_type=file.text("model_type", ""),
        dtype=_dtype(file),
        vocab_size=file.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=file.positive("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=file.positive("num_key_value_heads", heads),
        head_dim=_head_dim(file, hidden_size, heads),
        hidden_act=_hidden_act(file),
        rms_norm_eps=file.positive_number("rms_norm_eps"),
        max_position_embeddings=file.positive("max_position_embeddings"),
        tie_word_embeddings=file.flag("tie_word_embeddings"),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        layers=tuple(LayerConfig(sliding_window=None, rope=rope) for rope in ropes(file, num_layers)),
        bos_token_id=file.token_id("bos_token_id"),
        eos_token_ids=file.token_ids("eos_token_id"),
    )
    if heads % config.num_key_value_heads:
        raise file.error(
            "num_attention_heads", f"({heads}) must be a multiple of {config.num_key_value_heads} kv heads"
        )
    if config.head_dim % 2:
        raise file.error("head_dim", f"({config.head_dim}) must be even for a rotary embedding")
    return config


def eos_token_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """The ids that end a completion: those of generation_config.json if it names any, else those of config.json."""
    path = folder / "generation_config.json"
    ids = ConfigFile.read(path).token_ids("eos_token_id") if path.exists() else ()
    return ids or config.eos_token_ids


def layer_types(file: ConfigFile, num_layers: int) -> tuple[str, ...] | None:
    """The kind of attention of each layer, or None if config.json does not say."""
    if not file.has("layer_types"):
        return None
    kinds = file.texts("layer_types")
    if len(kinds) != num_layers:
        raise file.error("layer_types", f"has {len(kinds)} entries for num_hidden_layers {num_layers}")
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise PlanError(f"{file.path}: layer_types {', '.join(unknown)} are not supported")
    return kinds


def windows_by_type(file: ConfigFile, num_layers: int, window: int | None) -> tuple[int | None, ...] | None:
    """`window` for each layer that layer_types calls sliding, or None if config.json has no layer_types."""
    kinds = layer_types(file, num_layers)
    if kinds is None:
        return None
    if window is None and "sliding_attention" in kinds:
        raise file.error("layer_types", "has sliding_attention, but there is no sliding window, or it is switched off")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def ropes(file: ConfigFile, num_layers: int) -> tuple[RopeConfig, ...]:
    """The rotary embedding of each layer. rope_scaling wins over rope_parameters, and what stands inside them over
    rope_theta and partial_rotary_factor beside them, as in transformers."""
    section = file.section("rope_scaling")
    if section is None or not section.values:
        section = file.section("rope_parameters") or ConfigFile(file.path, {})
    kinds = layer_types(file, num_layers) or ()
    if not set(kinds) & set(section.values):
        return (_rope(file, section),) * num_layers
    by_kind = {kind: _rope_of_kind(file, section, kind) for kind in sorted(set(kinds))}
    return tuple(by_kind[kind] for kind in kinds)


def _rope_of_kind(file: ConfigFile, section: ConfigFile, kind: str) -> RopeConfig:
    nested = section.section(kind)
    if nested is None:
        raise PlanError(f"{file.path}: {section.prefix}{kind} is absent; layers without rope are not supported")
    return _rope(file, nested)


def _rope(file: ConfigFile, section: ConfigFile) -> RopeConfig:
    rope_type = section.text("rope_type", section.text("type", "default"))
    if rope_type not in _ROPE_RULES:
        raise PlanError(f"{file.path}: rope type {rope_type} is not supported; supported are {', '.join(_ROPE_RULES)}")
    rope = RopeConfig(
        rope_type=rope_type,
        rope_theta=section.positive_number("rope_theta", file.positive_number("rope_theta", DEFAULT_ROPE_THETA)),
        partial_rotary_factor=section.positive_number(
            "partial_rotary_factor", file.positive_number("partial_rotary_factor", 1.0)
        ),
    )
    if rope.partial_rotary_factor != 1:
        raise PlanError(f"{file.path}: partial_rotary_factor {rope.partial_rotary_factor} is not supported, only 1")
    return _ROPE_RULES[rope_type](file, section, rope)


def _default(file: ConfigFile, section: ConfigFile, rope: RopeConfig) -> RopeConfig:
    return rope


def _linear(file: ConfigFile, section: ConfigFile, rope: RopeConfig) -> RopeConfig:
    return replace(rope, factor=section.positive_number("factor"))


def _dynamic(file: ConfigFile, section: ConfigFile, rope: RopeConfig) -> RopeConfig:
    original = file.positive("max_position_embeddings")
    return replace(rope, factor=section.positive_number("factor"), original_max_position_embeddings=original)


def _llama3(file: ConfigFile, section: ConfigFile, rope: RopeConfig) -> RopeConfig:
    return replace(
        rope,
        factor=section.positive_number("factor"),
        original_max_position_embeddings=_original_length(file, section),
        low_freq_factor=section.positive_number("low_freq_factor"),
        high_freq_factor=section.positive_number("high_freq_factor"),
    )


def _yarn(file: ConfigFile, section: ConfigFile, rope: RopeConfig) -> RopeConfig:
    original = _original_length(file, section)
    return replace(
        rope,
        factor=section.positive_number("factor", file.positive("max_position_embeddings") / original),
        original_max_position_embeddings=original,
        beta_fast=section.number("beta_fast") or 32.0,
        beta_slow=section.number("beta_slow") or 1.0,
        attention_factor=section.number("attention_factor"),
        mscale=section.number("mscale"),
        mscale_all_dim=section.number("mscale_all_dim"),
        truncate=section.flag("truncate", True),
    )


_ROPE_RULES: dict[str, Callable[[ConfigFile, ConfigFile, RopeConfig], RopeConfig]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}


def _original_length(file: ConfigFile, section: ConfigFile) -> int:
    """The length that the model was trained with before its context was extended."""
    key = "original_max_position_embeddings"
    return file.positive(key) if file.has(key) else section.positive(key, file.positive("max_position_embeddings"))


def _head_dim(file: ConfigFile, hidden_size: int, num_heads: int) -> int:
    if file.has("head_dim"):
        return file.positive("head_dim")
    if hidden_size % num_heads:
        raise file.error("hidden_size", f"({hidden_size}) must be a multiple of num_attention_heads ({num_heads})")
    return hidden_size // num_heads


def _dtype(file: ConfigFile) -> str | None:
    key = "dtype" if file.has("dtype") else "torch_dtype"
    if not file.has(key):
        return None
    dtype = file.text(key)
    if dtype not in DTYPES:
        raise file.error(key, f"is {dtype}, which is not supported; supported are {', '.join(DTYPES)}")
    return dtype


def _hidden_act(file: ConfigFile) -> str:
    name = file.text("hidden_act")
    if name not in ACTIVATIONS:
        raise PlanError(f"{file.path}: hidden_act {name} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return name


def _refuse_quantization(file: ConfigFile) -> None:
    for key in ("quantization_config", "compression_config"):
        if section := file.section(key):
            method = section.text("quant_method", "an unnamed method")
            raise PlanError(
                f"{file.path}: the checkpoint is quantized ({method}), which is not supported; "
                f"use the bfloat16, float16 or float32 checkpoint of the same model"
            )
