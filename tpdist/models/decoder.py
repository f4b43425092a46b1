"""The llama-like decoder that all current families share, as one rank of a tensor-parallel group holds it.

Everything that differs between families is a flag or a number in ModelConfig; there is no family's name in this file.
Module paths are those of the checkpoint, but for the fused qkv_proj and gate_up_proj. It knows no files, no scheduler
and no sampling; whoever runs it loads the parameters and owns the caches.

    x = embed(ids)                                                                     all-reduce
    x = layer(x) for each layer, see decoder_layer.py                                  two all-reduces each
    logits = lm_head(norm(x))                                                          gather

A pipeline stage has some of the layers: x comes from the stage before, and goes to the next. In one process the layers
may lie on several devices: x goes to where the next layer lies.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tpdist.layers.attention import AttentionBackend, AttentionContext, gather_attention
from tpdist.layers.embedding import LMHead, VocabParallelEmbedding
from tpdist.layers.norm import RMSNorm
from tpdist.layers.rotary import Rotary
from tpdist.models.decoder_layer import DecoderLayer, Shard
from tpdist.models.item_devices import DISK, ItemDevices, computing_device
from tpdist.models.streamed import NUM_BUFFERS, StreamedLayers
from tpdist.parallel.group import RankGroup
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.shards import Partition, Rows, key_value_heads
from tpdist.plan.stages import Stage, whole


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
        items: ItemDevices | None = None,
        attend: AttentionBackend = gather_attention,
    ) -> None:
        """`group`: the ranks of this stage. `items`: where the parts of a whole model lie, by default all on `device`;
        layers on the disk have to come by `stream`. Raises PlanError when the partition leaves a rank without a head,
        or for an unknown activation or rope."""
        super().__init__()
        assert partition.size == group.size, f"partition of {partition.size} ranks, group of {group.size}"
        self.stage = stage or whole(config.num_hidden_layers)
        self.hidden_size = config.hidden_size
        self.items = items or ItemDevices.same(device, num_layers=config.num_hidden_layers)
        self._config = config
        self._shard = Shard(partition=partition, group=group, dtype=dtype, device=device, attend=attend)
        self.model = DecoderStack(config, stage=self.stage, items=self.items, shard=self._shard)
        self.lm_head = self._make_head(config) if self.stage.is_last else None

    def _make_head(self, config: ModelConfig) -> LMHead:
        """A tied one shares the embedding's parameter where that lies beside it, and has a copy elsewhere."""
        shard = self._shard.on(self.items.head)
        tied = config.tie_word_embeddings and self.items.embedding == self.items.head
        return LMHead(
            config.hidden_size,
            rows=Rows(config.vocab_size).intervals(shard.partition.shares),
            group=shard.group,
            dtype=shard.dtype,
            device=shard.device,
            tied_to=self.model.embed_tokens if tied else None,
        )

    def stream(self, read: Callable[[DecoderLayer, int], None]) -> None:
        """Let `read` fill the layers that lie on the disk, when they are needed, with the weights of a number."""
        numbers = self.items.on_disk
        shard = self._shard.on(DISK)
        buffers = [DecoderLayer(self._config, window=None, shard=shard) for _ in range(NUM_BUFFERS if numbers else 0)]
        if numbers:
            self.model.streamed = StreamedLayers(numbers, buffers=buffers, read=read)

    def forward(
        self, x: Tensor, *, positions: Tensor, attention: AttentionContext, caches: Sequence[tuple[Tensor, ...]]
    ) -> Tensor:
        """Run the tokens of one step through the layers of this stage. Every rank of it must call it with the same
        step.

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
        """Per layer of this stage, the shape per token of each tensor of its cache on this rank: keys and values."""
        heads = self._shard.interval(key_value_heads(self._config)).size
        return (((heads, self._config.head_dim),) * 2,) * self.stage.layers.size

    def cache_devices(self) -> tuple[torch.device, ...]:
        """Per layer of this stage, where it is computed."""
        return tuple(self.model.devices)


class DecoderStack(nn.Module):
    """Embedding, layers and final norm, as far as this stage has them: what checkpoints call `model`. Layers keep their
    numbers in the whole model; those that lie on the disk are no submodules.

    `devices`: where each layer of this stage is computed.
    """

    def __init__(self, config: ModelConfig, *, stage: Stage, items: ItemDevices, shard: Shard) -> None:
        super().__init__()
        self.streamed: StreamedLayers[DecoderLayer] | None = None
        self.embed_tokens = self._make_embedding(config, shard.on(items.embedding)) if stage.is_first else None
        self.numbers = range(*stage.layers)
        self.windows = {number: config.layers[number].sliding_window for number in self.numbers}
        self.devices = [computing_device(items.layers[number]) for number in self.numbers]
        self.layers = nn.ModuleDict(
            {
                str(number): DecoderLayer(config, window=self.windows[number], shard=shard.on(items.layers[number]))
                for number in self.numbers
                if items.layers[number] != DISK
            }
        )
        self.norm = self._make_norm(config, shard.on(items.head)) if stage.is_last else None
        kinds = [
            (config.layers[number].rope, device) for number, device in zip(self.numbers, self.devices, strict=True)
        ]
        ropes = list(dict.fromkeys(kinds))
        self.rotaries = nn.ModuleList(Rotary(rope, head_dim=config.head_dim, device=device) for rope, device in ropes)
        self.rotary_devices = [device for _, device in ropes]
        self.rotary_of_layer = [ropes.index(kind) for kind in kinds]

    def _make_embedding(self, config: ModelConfig, shard: Shard) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(
            config.hidden_size,
            rows=shard.interval(Rows(config.vocab_size)),
            group=shard.group,
            dtype=shard.dtype,
            device=shard.device,
        )

    def _make_norm(self, config: ModelConfig, shard: Shard) -> RMSNorm:
        return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=shard.dtype, device=shard.device)

    def forward(
        self, x: Tensor, *, positions: Tensor, attention: AttentionContext, caches: Sequence[tuple[Tensor, ...]]
    ) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x.to(self.embed_tokens.weight.device))
        angles = [
            rotary(positions.to(device), dtype=x.dtype)
            for rotary, device in zip(self.rotaries, self.rotary_devices, strict=True)
        ]
        places = zip(self.numbers, self.devices, self.rotary_of_layer, caches, strict=True)
        for number, device, rotary, cache in places:
            layer = self._layer(number)
            x = layer(x.to(device), angles=angles[rotary], attention=attention.on(device), cache=cache)
        return x if self.norm is None else self.norm(x.to(self.norm.weight.device))

    def _layer(self, number: int) -> DecoderLayer:
        """A layer that holds its weights, until the next one is asked for."""
        if str(number) in self.layers:
            layer = self.layers[str(number)]
        else:
            assert self.streamed is not None, f"layer {number} lies on the disk, and nothing reads it"
            layer = self.streamed.layer(number)
            layer.self_attn.window = self.windows[number]
        assert isinstance(layer, DecoderLayer)
        return layer
