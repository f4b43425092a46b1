"""What a model is made of: sizes, flags and one entry per layer, the same for all families.

Plain data; parse_config.py reads it from config.json, and the files in models/ set what is particular to a family.
"""

from dataclasses import dataclass, replace

DEFAULT_ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """A rotary embedding, with the names of transformers' rope_parameters.

    `original_max_position_embeddings` is set for dynamic, llama3 and yarn, `low_freq_factor` and `high_freq_factor`
    for llama3, `beta_fast` and `beta_slow` for yarn. `attention_factor` None means: computed from the factor.
    """

    rope_type: str = "default"
    rope_theta: float = DEFAULT_ROPE_THETA
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0

    def max_length(self, max_position_embeddings: int) -> int:
        """The longest sequence, in tokens, that this rule is meant for. Linear and yarn stretch theirs by the factor.
        A dynamic one changes all frequencies beyond the original length; a cache of rotated keys cannot follow."""
        if self.rope_type == "linear":
            return int(max_position_embeddings * self.factor)
        if self.rope_type == "yarn" and self.original_max_position_embeddings:
            return max(max_position_embeddings, int(self.original_max_position_embeddings * self.factor))
        return max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What may differ from layer to layer. `sliding_window`: how many tokens one sees, itself included; None: all."""

    sliding_window: int | None
    rope: RopeConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder, with the names of config.json where it has one. `dtype` is None if config.json names none."""

    architecture: str
    model_type: str
    dtype: str | None
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layers: tuple[LayerConfig, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def max_model_len(self) -> int:
        """The longest sequence, prompt and completion, in tokens, that every layer supports."""
        return min(layer.rope.max_length(self.max_position_embeddings) for layer in self.layers)

    def with_windows(self, windows: tuple[int | None, ...]) -> "ModelConfig":
        """The same model with these sliding windows, one per layer."""
        pairs = zip(self.layers, windows, strict=True)
        return replace(self, layers=tuple(replace(layer, sliding_window=window) for layer, window in pairs))
