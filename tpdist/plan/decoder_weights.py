"""The weight table of a llama-like decoder: every tensor of its checkpoint, where it goes and how it is split.

Made from the flags of ModelConfig alone. q, k and v are parts of one parameter, and so are gate and up.
"""

from collections.abc import Iterator

from tpdist.plan.model_config import ModelConfig
from tpdist.plan.shards import Blocks, Rows, Split, Weights, WeightSpec, key_value_heads, query_heads


def decoder_weights(config: ModelConfig) -> Weights:
    """The weight table of a llama-like decoder."""
    rows = Split(0, Rows(config.vocab_size))
    vocabulary = (config.vocab_size, config.hidden_size)
    specs = [_same("model.embed_tokens.weight", vocabulary, rows)]
    for index in range(config.num_hidden_layers):
        specs += _layer(config, f"model.layers.{index}")
    specs.append(_same("model.norm.weight", (config.hidden_size,)))
    ignorable = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
    if not config.tie_word_embeddings:
        return Weights(specs=(*specs, _same("lm_head.weight", vocabulary, rows)), ignorable=ignorable)
    tied = (("lm_head.weight", "model.embed_tokens.weight"),)
    return Weights(specs=tuple(specs), ignorable=(*ignorable, r"lm_head\.weight"), tied=tied)


def _layer(config: ModelConfig, path: str) -> Iterator[WeightSpec]:
    yield _same(f"{path}.input_layernorm.weight", (config.hidden_size,))
    yield from _attention(config, f"{path}.self_attn")
    yield _same(f"{path}.post_attention_layernorm.weight", (config.hidden_size,))
    yield from _mlp(config, f"{path}.mlp")


def _attention(config: ModelConfig, path: str) -> Iterator[WeightSpec]:
    head_dim, hidden_size = config.head_dim, config.hidden_size
    query = Split(0, query_heads(config), head_dim)
    key_value = Split(0, key_value_heads(config), head_dim)
    query_size, key_value_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    parts = (
        ("q_proj", query_size, query),
        ("k_proj", key_value_size, key_value),
        ("v_proj", key_value_size, key_value),
    )
    for part, (leaf, size, split) in enumerate(parts):
        yield from _column(f"{path}.{leaf}", f"{path}.qkv_proj", part, size, hidden_size, split, config.qkv_bias)
    columns = Split(1, query.axis, head_dim)
    yield from _row(f"{path}.o_proj", hidden_size, query_size, columns, config.o_bias)
    if config.qk_norm:
        yield _same(f"{path}.q_norm.weight", (head_dim,))
        yield _same(f"{path}.k_norm.weight", (head_dim,))


def _mlp(config: ModelConfig, path: str) -> Iterator[WeightSpec]:
    size, hidden_size, axis = config.intermediate_size, config.hidden_size, Blocks(config.intermediate_size)
    for part, leaf in enumerate(("gate_proj", "up_proj")):
        yield from _column(
            f"{path}.{leaf}", f"{path}.gate_up_proj", part, size, hidden_size, Split(0, axis), config.mlp_bias
        )
    yield from _row(f"{path}.down_proj", hidden_size, size, Split(1, axis), config.mlp_bias)


def _column(
    source: str, target: str, part: int, out_size: int, in_size: int, split: Split, bias: bool
) -> Iterator[WeightSpec]:
    """One part of a fused linear layer whose rows, and bias with them, are dealt to the ranks."""
    shapes = {"weight": (out_size, in_size), "bias": (out_size,)}
    for leaf in ("weight", "bias") if bias else ("weight",):
        yield WeightSpec(
            name=f"{source}.{leaf}", shape=shapes[leaf], parameter=f"{target}.{leaf}", part=part, split=split
        )


def _row(path: str, out_size: int, in_size: int, split: Split, bias: bool) -> Iterator[WeightSpec]:
    """A linear layer whose columns are dealt to the ranks; its bias is whole on every rank, to be added once."""
    yield _same(f"{path}.weight", (out_size, in_size), split)
    if bias:
        yield _same(f"{path}.bias", (out_size,))


def _same(name: str, shape: tuple[int, ...], split: Split | None = None) -> WeightSpec:
    """A tensor whose parameter has the same name."""
    return WeightSpec(name=name, shape=shape, parameter=name, split=split)
