"""The sizes of one model on any rank of any partition, each worked out once however many layouts are weighed."""

from dataclasses import dataclass

from tpdist.plan import costs
from tpdist.plan.costs import Bytes, ItemBytes, WeightItems
from tpdist.plan.memory import DTYPE_BYTES
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.placement import Demand
from tpdist.plan.shards import Partition, Weights


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What stays on the first device besides the decoder: weights, and what it keeps alive at its fullest, which with a
    `tower` the demand's images decide."""

    bytes: int = 0
    activation_bytes: int = 0
    tower: costs.VisionTower | None = None

    @staticmethod
    def of(tower: costs.VisionTower | None) -> "Extra":
        return Extra() if tower is None else Extra(bytes=tower.parameter_bytes, tower=tower)

    def peak_bytes(self, demand: Demand) -> int:
        return self.activation_bytes if self.tower is None else costs.vision_bytes(self.tower, demand)[1]


NOTHING_ELSE = Extra()


class Model:
    def __init__(self, config: ModelConfig, weights: Weights, extra: Extra) -> None:
        self.config = config
        self.weights = weights
        self.extra = extra
        self.num_layers = config.num_hidden_layers
        self._items = WeightItems(config, weights)
        self._ropes = costs.rope_bytes(config)
        self._on_rank: dict[tuple[tuple[int, ...], int, str], ItemBytes] = {}
        self._tables: dict[tuple[tuple[int, ...], int, str, bool], Bytes] = {}
        self._forward_bytes: dict[tuple[tuple[int, ...], int, Demand], int] = {}

    def items(self, partition: Partition, rank: int, dtype: str) -> ItemBytes:
        key = (partition.shares, rank, dtype)
        if key not in self._on_rank:
            self._on_rank[key] = self._items.on_rank(partition, rank, dtype_bytes=DTYPE_BYTES[dtype])
        return self._on_rank[key]

    def weight_table(self, partition: Partition, rank: int, dtype: str, *, head_first: bool) -> Bytes:
        """Weights and buffers by interval of layers, [num_layers + 1, num_layers + 1]; not to be changed."""
        key = (partition.shares, rank, dtype, head_first)
        if key not in self._tables:
            table = self.items(partition, rank, dtype).by_interval(head_first=head_first) + self._ropes
            table[0, :] += self.extra.bytes
            self._tables[key] = table
        return self._tables[key]

    def forward_bytes(self, partition: Partition, rank: int, demand: Demand) -> int:
        """Of costs.forward_bytes: what a step keeps alive up to its last hidden states."""
        key = (partition.shares, rank, demand)
        if key not in self._forward_bytes:
            self._forward_bytes[key] = costs.forward_bytes(self.config, partition, rank, demand)
        return self._forward_bytes[key]
