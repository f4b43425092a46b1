"""Decode steps of a small random model, by DecodeGraphs and by the eager path, on any device and group of ranks.

    decodes = Decodes()
    decodes.check({0: 17, 4: 300})  # slot 0 has 17 tokens once the step has run, slot 4 has 300

The cache is full of random numbers, so that no prompt has to be run first, and reading a wrong place shows.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from plans import small_config
from torch import Tensor

from tpdist.control.messages import SlotWork
from tpdist.engine.decode_graphs import DecodeGraphs, Recorder
from tpdist.engine.kv_cache import KVCache
from tpdist.layers.attention import AttentionBackend, AttentionContext, gather_attention
from tpdist.models.decoder import Decoder
from tpdist.parallel.group import RankGroup, SingleGroup
from tpdist.plan.model_config import LayerConfig, RopeConfig
from tpdist.plan.shards import Partition
from tpdist.plan.stages import Stage

CPU = torch.device("cpu")
VOCAB_SIZE = 300
MAX_NUM_SEQS = 12
MAX_TOKENS = 600
BLOCK_SIZE = 4
# Around the limits of blocks and of the rungs 256, 512 and 600.
LENS = [1, 4, 5, 255, 256, 257, 512, 513, 600, 3, 8, 9]

Lens = dict[int, int]
"""By slot, the tokens of its sequence in the cache once the step has run."""


def keep(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Recording without a graph: what was recorded is run again."""
    return function


def random_decoder(
    *,
    group: RankGroup,
    windows: Sequence[int | None],
    num_kv_heads: int,
    attend: AttentionBackend,
    dtype: torch.dtype,
    device: torch.device,
    stage: Stage | None = None,
) -> Decoder:
    layers = tuple(LayerConfig(sliding_window=window, rope=RopeConfig()) for window in windows)
    config = small_config(
        layers=layers, num_hidden_layers=len(layers), num_key_value_heads=num_kv_heads, qk_norm=True, qkv_bias=True
    )
    partition = Partition((1,) * group.size)
    model = Decoder(config, partition=partition, group=group, dtype=dtype, device=device, stage=stage, attend=attend)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 1 + 0.2 * noise)
    return model


class Decodes:
    """A model, its cache, and what has to be known of a step to run it both ways. `num_recorded` counts recordings.

    All that it does belongs into torch.inference_mode.
    """

    def __init__(
        self,
        record: Recorder = keep,
        *,
        group: RankGroup | None = None,
        windows: Sequence[int | None] = (None, 5, 300),
        num_kv_heads: int = 4,
        enabled: bool = True,
        attend: AttentionBackend = gather_attention,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        group = group or SingleGroup()
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.model = random_decoder(
            group=group, windows=windows, num_kv_heads=num_kv_heads, attend=attend, dtype=dtype, device=device
        )
        blocks_each = -(-MAX_TOKENS // BLOCK_SIZE)
        num_blocks = MAX_NUM_SEQS * blocks_each
        self.tables = torch.randperm(num_blocks, generator=generator).view(MAX_NUM_SEQS, blocks_each).numpy()
        layers = tuple(
            tuple(torch.randn(num_blocks, BLOCK_SIZE, *shape, generator=generator).to(device, dtype) for shape in layer)
            for layer in self.model.cache_shapes()
        )
        self.cache = KVCache(layers=layers, num_blocks=num_blocks, block_size=BLOCK_SIZE)
        self.last_tokens = torch.zeros(MAX_NUM_SEQS, dtype=torch.int64, device=device)
        self.num_recorded = 0
        self._record = record
        self.graphs = DecodeGraphs(
            self.model,
            group=group,
            cache=self.cache,
            max_num_seqs=MAX_NUM_SEQS,
            max_tokens=MAX_TOKENS,
            device=device,
            enabled=enabled,
            record=self.record,
        )
        tokens = torch.randint(VOCAB_SIZE, (MAX_NUM_SEQS,), generator=generator)
        self.remember(range(MAX_NUM_SEQS), tokens.to(device))

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1
        return self._record(function)

    def remember(self, slots: Sequence[int], tokens: Tensor) -> None:
        self.last_tokens[list(slots)] = tokens
        self.graphs.remember(slots, tokens)

    def serves(self, lens: Lens) -> bool:
        return self.graphs.serves([SlotWork(slot, length - 1, 1, True) for slot, length in lens.items()])

    def run(self, lens: Lens) -> Tensor:
        assert self.serves(lens)
        slots = np.array(list(lens))
        positions = np.array(list(lens.values())) - 1
        tables = self.tables[slots, : positions.max() // BLOCK_SIZE + 1]
        return self.graphs.run(slots, positions, tables, eager=partial(self.eager, lens))

    def eager(self, lens: Lens, caches: Sequence[tuple[Tensor, ...]] | None = None) -> Tensor:
        slots, ends = list(lens), torch.tensor(list(lens.values()), device=self.device)
        tables = torch.from_numpy(self.tables[slots]).to(self.device)
        blocks = tables.gather(1, ((ends - 1) // BLOCK_SIZE)[:, None]).squeeze(1)
        attention = AttentionContext(
            slot_mapping=blocks * BLOCK_SIZE + (ends - 1) % BLOCK_SIZE,
            block_tables=tables,
            context_lens=ends.tolist(),
            query_lens=[1] * len(slots),
            block_size=BLOCK_SIZE,
        )
        hidden: Tensor = self.model(
            self.last_tokens[slots], positions=ends - 1, attention=attention, caches=caches or self.cache.layers
        )
        return hidden

    def check(self, lens: Lens, *, tolerance: float = 1e-4) -> None:
        """Run a step by its graph, and compare hidden states and caches with those of the eager path. They are of a
        magnitude of 1 and went through three layers; padding may change the order of sums."""
        caches = tuple(tuple(each.clone() for each in layer) for layer in self.cache.layers)
        self.run(lens)
        for cache in self.written_places(lens):
            cache.fill_(float("nan"))
        replayed, expected = self.run(lens), self.eager(lens, caches)
        torch.testing.assert_close(replayed, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(self.cache.layers, caches, rtol=tolerance, atol=tolerance)

    def written_places(self, lens: Lens) -> list[Tensor]:
        """Where the step's tokens lie in the cache of each layer, as views."""
        return [
            each[self.tables[slot, (length - 1) // BLOCK_SIZE], (length - 1) % BLOCK_SIZE]
            for slot, length in lens.items()
            for layer in self.cache.layers
            for each in layer
        ]
