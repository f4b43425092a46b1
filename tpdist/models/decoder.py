"""The llama-like decoder that all current families share, as one rank of a tensor-parallel group holds it.

Everything that differs between families is a flag or a number in ModelConfig; there is no family's name in this file.
Module paths are those of the checkpoint, but for the fused qkv_proj and gate_up_proj. It knows no files, no scheduler
and no sampling; whoever runs it loads the parameters and owns the caches.

    x = embed(ids)                                                                     all-reduce
    per layer:  x = x + o_proj(attention(rope(qkv_proj(norm(x)))))                     all-reduce
                x = x + down_proj(act(gate) * up), gate, up = gate_up_proj(norm(x))    all-reduce
    logits = lm_head(norm(x))                                                          gather

A pipeline stage has some of the layers: x comes from the stage before, and goes to the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpdist.errors import PlanError
from tpdist.layers.attention import AttentionBackend, AttentionContext, gather_attention
from tpdist.layers.embedding import LMHead, VocabParallelEmbedding
from tpdist.layers.linear import GateUpParallelLinear, QKVParallelLinear, RowParallelLinear
from tpdist.layers.norm import RMSNorm
from tpdist.layers.rotary import Rotary, rotate
from tpdist.parallel.group import RankGroup
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.shards import Axis, Blocks, Interval, Partition, Rows, key_value_heads, query_heads
from tpdist.plan.stages import Stage, whole

# By config.json's hidden_act.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What all modules of one rank are made with: `group.rank` of the ranks that `partition` deals the model to."""

    partition: Partition
    group: RankGroup
    dtype: torch.dtype
    device: torch.device
    attend: AttentionBackend

    def interval(self, axis: Axis) -> Interval:
        """This rank's part of an axis."""
        return self.partition.interval(axis, self.group.rank)


class Decoder(nn.Module):
    """One rank's part of a stage, by default of the whole model. Parameters are uninitialized until they are loaded."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        partition: Partition,
        group: RankGroup,
        dtype: torch.dtype,
        device: torch.device,
        stage: Stage | None = None,
        attend: AttentionBackend = gather_attention,
    ) -> None:
        """`group`: the ranks of this stage. Raises PlanError when the partition leaves a rank without a head, or for an
        unknown activation or rope."""
        super().__init__()
        assert partition.size == group.size, f"partition of {partition.size} ranks, group of {group.size}"
        self.stage = stage or whole(config.num_hidden_layers)
        self.hidden_size = config.hidden_size
        shard = Shard(partition=partition, group=group, dtype=dtype, device=device, attend=attend)
        self.model = DecoderStack(config, stage=self.stage, shard=shard)
        self.lm_head = self._make_head(config, shard) if self.stage.is_last else None

    def _make_head(self, config: ModelConfig, shard: Shard) -> LMHead:
        """A tied one shares the embedding's parameter where the embedding is on this stage, and has a copy elsewhere."""
        return LMHead(
            config.hidden_size,
            rows=Rows(config.vocab_size).intervals(shard.partition.shares),
            group=shard.group,
            dtype=shard.dtype,
            device=shard.device,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
        )

    def forward(
        self, x: Tensor, *, positions: Tensor, attention: AttentionContext, caches: Sequence[tuple[Tensor, ...]]
    ) -> Tensor:
        """Run the tokens of one step through the layers of this stage. Every rank of it must call it with the same step.

        x: token ids [num_tokens] int64 on the first stage, what the stage before returned on the others. positions:
        [num_tokens] int64. caches: per layer, one tensor [num_blocks, block_size, *shape] for each of `cache_shapes`;
        this step's keys and values are written to them. Returns [num_tokens, hidden_size], on the last stage after the
        final norm, replicated. Raises PeerLostError.
        """
        hidden: Tensor = self.model(x, positions=positions, attention=attention, caches=caches)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """hidden: [n, hidden_size]; returns float32 [n, vocab_size] on rank 0 and None on the others. Every rank of the
        last stage must call it, and none of another. Raises PeerLostError."""
        assert self.lm_head is not None, "this stage has no output layer"
        logits: Tensor | None = self.lm_head(hidden)
        return logits

    def cache_shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Per layer, the shape per token of each tensor of its cache on this rank."""
        return tuple(layer.cache_shapes() for layer in self.model.layers.values() if isinstance(layer, DecoderLayer))


class DecoderStack(nn.Module):
    """Embedding, layers and final norm, as far as this stage has them: what checkpoints call `model`. Layers keep their
    numbers in the whole model."""

    def __init__(self, config: ModelConfig, *, stage: Stage, shard: Shard) -> None:
        super().__init__()
        self.embed_tokens = self._make_embedding(config, shard) if stage.is_first else None
        layers = dict(enumerate(config.layers))
        held = {index: layers[index] for index in range(*stage.layers)}
        self.layers = nn.ModuleDict(
            {str(index): DecoderLayer(config, window=each.sliding_window, shard=shard) for index, each in held.items()}
        )
        self.norm = None
        if stage.is_last:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=shard.dtype, device=shard.device)
        ropes = list(dict.fromkeys(layer.rope for layer in held.values()))
        self.rotaries = nn.ModuleList(Rotary(rope, head_dim=config.head_dim, device=shard.device) for rope in ropes)
        self.rotary_of_layer = [ropes.index(layer.rope) for layer in held.values()]

    def _make_embedding(self, config: ModelConfig, shard: Shard) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(
            config.hidden_size,
            rows=shard.interval(Rows(config.vocab_size)),
            group=shard.group,
            dtype=shard.dtype,
            device=shard.device,
        )

    def forward(
        self, x: Tensor, *, positions: Tensor, attention: AttentionContext, caches: Sequence[tuple[Tensor, ...]]
    ) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        angles = [rotary(positions, dtype=x.dtype) for rotary in self.rotaries]
        for layer, rotary, cache in zip(self.layers.values(), self.rotary_of_layer, caches, strict=True):
            x = layer(x, angles=angles[rotary], attention=attention, cache=cache)
        return x if self.norm is None else self.norm(x)


class DecoderLayer(nn.Module):
    """Attention and a gated MLP, each after a norm and added to what came in."""

    def __init__(self, config: ModelConfig, *, window: int | None, shard: Shard) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=shard.dtype, device=shard.device)
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(config, window=window, shard=shard)
        self.post_attention_layernorm = norm()
        self.mlp = GatedMLP(config, shard=shard)

    def forward(
        self, x: Tensor, *, angles: tuple[Tensor, Tensor], attention: AttentionContext, cache: tuple[Tensor, ...]
    ) -> Tensor:
        """x: [num_tokens, hidden_size], replicated, as is what it returns."""
        x = x + self.self_attn(self.input_layernorm(x), angles=angles, attention=attention, cache=cache)
        hidden: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return hidden

    def cache_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.self_attn.cache_shapes()


class SelfAttention(nn.Module):
    """Attention of this rank's heads; the sum over the ranks is in o_proj.

    heads: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], all counted on this rank.
    """

    def __init__(self, config: ModelConfig, *, window: int | None, shard: Shard) -> None:
        super().__init__()
        queries, keys = shard.interval(query_heads(config)), shard.interval(key_value_heads(config))
        self.num_heads, self.num_kv_heads, self.head_dim = queries.size, keys.size, config.head_dim
        self.window = window
        self.attend = shard.attend
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            query_heads=queries,
            kv_heads=keys,
            head_dim=config.head_dim,
            bias=config.qkv_bias,
            dtype=shard.dtype,
            device=shard.device,
        )
        norm = partial(RMSNorm, config.head_dim, eps=config.rms_norm_eps, dtype=shard.dtype, device=shard.device)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.o_proj = RowParallelLinear(
            config.hidden_size,
            columns=Interval(queries.start * config.head_dim, queries.stop * config.head_dim),
            group=shard.group,
            bias=config.o_bias,
            dtype=shard.dtype,
            device=shard.device,
        )

    def forward(
        self, x: Tensor, *, angles: tuple[Tensor, Tensor], attention: AttentionContext, cache: tuple[Tensor, ...]
    ) -> Tensor:
        """x: [num_tokens, hidden_size], replicated, as is what it returns."""
        heads = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        rotated = rotate(self._normalized(heads), *angles)
        attended = self.attend(
            rotated[:, : self.num_heads],
            rotated[:, self.num_heads :],
            heads[:, -self.num_kv_heads :],
            cache=cache,
            context=attention,
            scale=self.head_dim**-0.5,
            window=self.window,
        )
        projected: Tensor = self.o_proj(attended)
        return projected

    def _normalized(self, heads: Tensor) -> Tensor:
        """Query and key heads, side by side so that one call rotates both, with the norm that some models give each."""
        if self.q_norm is None or self.k_norm is None:
            return heads[:, : -self.num_kv_heads]
        queries, keys = heads[:, : self.num_heads], heads[:, self.num_heads : -self.num_kv_heads]
        return torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=1)

    def cache_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Keys and values."""
        return ((self.num_kv_heads, self.head_dim),) * 2


class GatedMLP(nn.Module):
    """y = down_proj(act(gate) * up); gate, up: [num_tokens, columns.size], this rank's part."""

    def __init__(self, config: ModelConfig, *, shard: Shard) -> None:
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            raise PlanError(f"hidden_act {config.hidden_act!r} is not supported; use one of {', '.join(ACTIVATIONS)}")
        self.act = ACTIVATIONS[config.hidden_act]
        columns = shard.interval(Blocks(config.intermediate_size))
        self.gate_up_proj = GateUpParallelLinear(
            config.hidden_size, columns=columns, bias=config.mlp_bias, dtype=shard.dtype, device=shard.device
        )
        self.down_proj = RowParallelLinear(
            config.hidden_size,
            columns=columns,
            group=shard.group,
            bias=config.mlp_bias,
            dtype=shard.dtype,
            device=shard.device,
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        projected: Tensor = self.down_proj(self.act(gate).mul_(up))
        return projected
