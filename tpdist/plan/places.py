"""Places that layers can be on, and tables of what each run of layers needs and takes there.

A place is the ranks of a stage, each with a device, or in one process a device by itself. Of a run of layers, a table
tells for each place whether it fits and how long a decode step of it takes; search.py finds the best runs in them.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np

from tpdist.plan import costs, speed
from tpdist.plan.costs import Bytes
from tpdist.plan.memory import DEFAULT_CPU_CACHE_BYTES, DTYPE_BYTES, cuda_usable_bytes
from tpdist.plan.placement import Demand, Device, Inventory
from tpdist.plan.search import Costs
from tpdist.plan.shards import Interval, Partition
from tpdist.plan.sizes import Model

Mode = Literal["ranks", "devices"]


@dataclass(frozen=True)
class Place:
    """`devices` in the order of the ranks that `partition` deals a stage to."""

    devices: tuple[Device, ...]
    partition: Partition

    @cached_property
    def hosts(self) -> tuple[int, ...]:
        """How many consecutive ranks are on each machine."""
        return tuple(len(list(run)) for _, run in groupby(device.node for device in self.devices))


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one device needs for its layers, besides a cache, of which `token_bytes` is what a token takes."""

    device: Device
    stage: int
    tp_rank: int
    layers: Interval
    holds_embedding: bool
    holds_head: bool
    usable_bytes: int
    weight_bytes: int
    activation_bytes: int
    communication_bytes: int
    overhead_bytes: int
    token_bytes: int

    @property
    def fixed_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.communication_bytes + self.overhead_bytes

    @property
    def room_bytes(self) -> int:
        """What is left for a cache; negative if it does not fit without one."""
        return self.usable_bytes - self.fixed_bytes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`places` of a model. In mode `ranks` each device is a process' own, and the places are stages in their order. The
    output layer goes with the last layer, or with `head_first` with the first."""

    model: Model
    inventory: Inventory
    places: tuple[Place, ...]
    mode: Mode
    head_first: bool = False

    @cached_property
    def local_ranks(self) -> Counter[str]:
        """How many ranks each node has."""
        return Counter(device.node for place in self.places for device in place.devices)

    @cached_property
    def world_size(self) -> int:
        return sum(len(place.devices) for place in self.places)

    @cached_property
    def host(self) -> Device | None:
        """In one process, the memory in which layers are computed that lie there or on the disk."""
        return next((device for device in self.inventory.devices if device.kind == "cpu"), None)

    def stream_bytes(self, demand: Demand) -> int:
        """What layers on the disk take in memory while they are used."""
        return costs.STREAM_BUFFERS * int(self.model.items(Partition((1,)), 0, demand.dtype).layers.max())

    def overflow(self, demand: Demand, *, tokens: int = 0) -> Costs:
        """[num_places, num_layers + 1, num_layers + 1]: by how much a run of layers exceeds the fullest device of a
        place; not above 0 where it fits. The cache is what the demand needs, and of `tokens` at least. In float64,
        which is exact up to 8 PiB, so that a demand may be of any size."""
        made: dict[Hashable, Costs] = {}
        for place in self.places:
            key = self._room_key(place)
            if key not in made:
                made[key] = self._overflow(place, demand, tokens)
        return np.stack([made[self._room_key(place)] for place in self.places])

    def need(self, place_index: int, tp_rank: int, layers: Interval, *, stage: int, demand: Demand) -> Need:
        """What a device of a place needs for `layers`, as `stage` of all."""
        place = self.places[place_index]
        device, num_layers = place.devices[tp_rank], self.model.num_layers
        is_first = layers.start == 0
        is_last = is_first if self.head_first else layers.stop == num_layers
        return Need(
            device=device,
            stage=stage,
            tp_rank=tp_rank,
            layers=layers,
            holds_embedding=is_first,
            holds_head=is_last,
            usable_bytes=usable_bytes(device, demand),
            weight_bytes=int(self._weights(place, tp_rank, demand)[layers.start, layers.stop]),
            activation_bytes=self._activations(place, tp_rank, demand, is_first=is_first, is_last=is_last),
            communication_bytes=self._communication(place, tp_rank, demand, is_first=is_first, is_last=is_last),
            overhead_bytes=costs.overhead_bytes(device.kind)
            + (self.stream_bytes(demand) if device.kind == "disk" else 0),
            token_bytes=layers.size * self._layer_token_bytes(place, tp_rank, demand),
        )

    def held_bytes(self, place: Place, rank: int, demand: Demand) -> Costs:
        """[num_layers + 1, num_layers + 1]: what a rank holds beside activations and cache, by run of layers."""
        overhead = costs.overhead_bytes(place.devices[rank].kind)
        made: Costs = self._weights(place, rank, demand) + self._by_ends(self._communication, place, rank, demand)
        return made + overhead

    def layer_token_bytes(self, place: Place, demand: Demand) -> list[int]:
        """By rank of a place, what a token takes in the cache of a layer."""
        return [self._layer_token_bytes(place, rank, demand) for rank in range(len(place.devices))]

    def seconds(self, demand: Demand) -> Costs:
        """[num_places, num_layers + 1, num_layers + 1]: of a decode step of a run of layers, without what follows."""
        read: dict[Hashable, Costs] = {}
        made: dict[Hashable, Costs] = {}
        for place in self.places:
            bandwidths = (place.partition.shares, *(device.bandwidth for device in place.devices))
            if bandwidths not in read:
                ranks = range(len(place.devices))
                read[bandwidths] = np.max([self._read_s(place, rank, demand) for rank in ranks], axis=0)
            key = self._speed_key(place)
            if key not in made:
                made[key] = read[bandwidths] + self._exchange_s(place, demand)
        return np.stack([made[self._speed_key(place)] for place in self.places])

    def transfers(self, demand: Demand) -> Costs:
        """[num_places, num_places]: seconds from one place to another."""
        num_bytes = speed.hidden_row_bytes(self.model.config, demand)
        firsts = [place.devices[0] for place in self.places]
        rows = [[speed.send_s(num_bytes, speed.link_between(self.inventory, a, b)) for b in firsts] for a in firsts]
        return np.array(rows)

    def return_s(self, places: Sequence[int], demand: Demand) -> float:
        """Seconds for the way back from the last place to the first: of tokens, or of hidden states to the output."""
        if len(places) < 2 or (self.mode == "devices" and not self.head_first):
            return 0.0
        first, last = (self.places[each].devices[0] for each in (places[0], places[-1]))
        num_bytes = speed.hidden_row_bytes(self.model.config, demand) if self.head_first else 0
        return speed.send_s(num_bytes, speed.link_between(self.inventory, last, first))

    def _room_key(self, place: Place) -> Hashable:
        """Equal for places in which the same fits."""
        nodes = [device.node for device in place.devices]
        return place.partition.shares, *(
            (
                device.kind,
                device.total_bytes,
                device.free_bytes,
                device.limit_bytes,
                nodes.index(device.node),
                self.local_ranks[device.node],
            )
            for device in place.devices
        )

    def _speed_key(self, place: Place) -> Hashable:
        """Equal for places that take the same time."""
        return place.partition.shares, *((device.bandwidth, device.node) for device in place.devices)

    def _overflow(self, place: Place, demand: Demand, tokens: int) -> Costs:
        tokens = max(tokens, costs.demanded_tokens(demand))
        if self.mode == "devices" and place.devices[0].kind != "cuda" and self.host is not None:
            return self._host_overflow(place, self.host, demand, tokens)
        sizes = np.arange(self.model.num_layers + 1)
        num_layers = np.maximum(sizes[None, :] - sizes[:, None], 0)
        worst = np.full(num_layers.shape, -np.inf)
        for rank, device in enumerate(place.devices):
            kv = num_layers * float(tokens * self._layer_token_bytes(place, rank, demand))
            table = self._weights(place, rank, demand) + kv
            room = usable_bytes(device, demand) - costs.overhead_bytes(device.kind)
            table += self._beside(place, rank, demand) - float(room)
            np.maximum(worst, table, out=worst)
            limit = self.cache_limit(device, demand)
            if limit is not None:
                np.maximum(worst, kv - limit, out=worst)
        return worst

    def _weights(self, place: Place, rank: int, demand: Demand) -> Bytes:
        return self.model.weight_table(place.partition, rank, demand.dtype, head_first=self.head_first)

    def _host_overflow(self, place: Place, host: Device, demand: Demand, tokens: int) -> Costs:
        """As `_overflow`, of the CPU or the disk, whose layers are computed in the memory of one machine. They are the
        last ones, so that all layers behind a start have their caches there, and what the CPU leaves is the disk's."""
        on_disk = place.devices[0].kind == "disk"
        num_layers = self.model.num_layers
        behind = num_layers - np.arange(num_layers + 1, dtype=np.int64)[:, None]
        kv = behind * float(tokens * self._layer_token_bytes(place, 0, demand))
        weights = self._weights(place, 0, demand)
        held = costs.overhead_bytes("cpu") + (0 if on_disk else weights)
        table = held + kv + self._beside(place, 0, demand) - usable_bytes(host, demand)
        streamed = table if on_disk else table[:, :-1]
        streamed += self.stream_bytes(demand)
        if not on_disk:
            last = self._activations(place, 0, demand, is_first=False, is_last=not self.head_first)
            own = self._activations(place, 0, demand, is_first=False, is_last=False)
            streamed += float(max(0, last - own) + costs.hidden_bytes(self.model.config, demand))
        if on_disk:
            np.maximum(table, weights - usable_bytes(place.devices[0], demand), out=table)
        if demand.kv_cache_memory_bytes is None:
            available = np.maximum(host.free_bytes - held, 0)
            np.maximum(table, kv - np.minimum(DEFAULT_CPU_CACHE_BYTES, available // 4), out=table)
        return table

    def _beside(self, place: Place, rank: int, demand: Demand) -> Costs:
        """Activations and communication by interval."""
        made: Costs = self._by_ends(self._activations, place, rank, demand)
        return made + self._by_ends(self._communication, place, rank, demand)

    def _by_ends(self, num_bytes: Callable[..., int], place: Place, rank: int, demand: Demand) -> Costs:
        """By interval, what differs only where an interval has an end of the model."""
        size = self.model.num_layers + 1
        table = np.empty((size, size))
        for is_first, rows in ((False, slice(1, None)), (True, slice(0, 1))):
            for is_last, columns in ((False, slice(0, -1)), (True, slice(-1, None))):
                holds_head = is_first if self.head_first else is_last
                table[rows, columns] = num_bytes(place, rank, demand, is_first=is_first, is_last=holds_head)
        return table

    def cache_limit(self, device: Device, demand: Demand) -> int | None:
        """The most that a cache may take on a device whatever is free; None if only room decides. In one process the
        limit is for all devices together, and does not depend on where layers are."""
        if self.mode == "devices":
            return None
        if demand.kv_cache_memory_bytes is not None:
            return demand.kv_cache_memory_bytes
        return DEFAULT_CPU_CACHE_BYTES // self.local_ranks[device.node] if device.kind == "cpu" else None

    def _layer_token_bytes(self, place: Place, rank: int, demand: Demand) -> int:
        dtype_bytes = DTYPE_BYTES[demand.dtype]
        return costs.kv_bytes_per_layer(self.model.config, place.partition, rank, dtype_bytes=dtype_bytes)

    def _activations(self, place: Place, rank: int, demand: Demand, *, is_first: bool, is_last: bool) -> int:
        config, extra = self.model.config, self.model.extra
        peaks = [self.model.forward_bytes(place.partition, rank, demand)]
        if is_last:
            kind = place.devices[rank].kind
            peaks.append(costs.logits_bytes(config, place.partition, rank, demand, kind=kind))
        if is_first:
            peaks.append(extra.peak_bytes(demand))
        return max(peaks)

    def _communication(self, place: Place, rank: int, demand: Demand, *, is_first: bool, is_last: bool) -> int:
        hidden = costs.hidden_bytes(self.model.config, demand)
        received = 0 if is_first else hidden
        if self.mode == "devices":
            return received
        sent = 0 if is_last or rank > 0 else hidden * len(self.places)
        if place.devices[rank].kind == "cuda":
            return received + sent + costs.nccl_bytes(tp_size=len(place.devices), world_size=self.world_size)
        return received + sent + costs.gloo_bytes(place.hosts, rank, hidden_bytes=hidden)

    def _exchange_s(self, place: Place, demand: Demand) -> Costs:
        """Seconds that the ranks of a place exchange for, by interval."""
        config, size = self.model.config, len(place.devices)
        link = speed.slowest_link(self.inventory, place.devices)
        steps = np.arange(self.model.num_layers + 1)
        exchange_s = speed.layer_exchange_s(config, demand, size=size, link=link)
        table = np.maximum(steps[None, :] - steps[:, None], 0) * exchange_s
        table[0, :] += speed.first_exchange_s(config, demand, size=size, link=link)
        table[1:, :] += speed.send_s(speed.hidden_row_bytes(config, demand), link)
        table[:, -1] += speed.last_exchange_s(config, demand, place.partition, link=link)
        made: Costs = table
        return made

    def _read_s(self, place: Place, rank: int, demand: Demand) -> Costs:
        """Seconds that a device reads for: layers, the last norm and the output layer, which may be the embedding."""
        items = self.model.items(place.partition, rank, demand.dtype)
        read = np.array(speed.tokens_read(self.model.config, demand), dtype=np.float64)
        table = costs.sums_of_runs(items.layers + read * self._layer_token_bytes(place, rank, demand))
        last = table[0, :] if self.head_first else table[:, -1]
        last += items.final_norm + items.head
        made: Costs = table / place.devices[rank].bandwidth
        return made


def usable_bytes(device: Device, demand: Demand) -> int:
    """What may be used of a device at all."""
    usable = device.free_bytes
    if device.kind == "cuda":
        usable = cuda_usable_bytes(
            free_bytes=device.free_bytes,
            total_bytes=device.total_bytes,
            gpu_memory_utilization=demand.gpu_memory_utilization,
        )
    return usable if device.limit_bytes is None else min(usable, device.limit_bytes)
