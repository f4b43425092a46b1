"""One layer of the llama-like decoder, as one rank of a tensor-parallel group holds it.

    x = x + o_proj(attention(rope(qkv_proj(norm(x)))))                     all-reduce
    x = x + down_proj(act(gate) * up), gate, up = gate_up_proj(norm(x))    all-reduce

It knows neither the other layers nor where x comes from.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpdist.errors import PlanError
from tpdist.layers.attention import AttentionBackend, AttentionContext
from tpdist.layers.linear import GateUpParallelLinear, QKVParallelLinear, RowParallelLinear
from tpdist.layers.norm import RMSNorm
from tpdist.layers.rotary import rotate
from tpdist.models.item_devices import computing_device
from tpdist.parallel.group import RankGroup
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.shards import Axis, Blocks, Interval, Partition, key_value_heads, query_heads

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

    def on(self, name: str) -> "Shard":
        """The same for what lies on another device."""
        return replace(self, device=computing_device(name))


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
