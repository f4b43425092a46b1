"""How long a decode step takes, from what it reads and what it exchanges.

    device     (weights + keys and values it reads) / bandwidth of its memory; of an embedding only a few rows are read
    all-reduce latency + 2 (n - 1) / n * bytes / bandwidth      a ring (https://doi.org/10.1016/j.jpdc.2008.09.002)
    stage      the slowest of its devices, two all-reduces a layer, one for the embedding, a gather of the logits and a
               broadcast of the tokens
    next stage latency + bytes / bandwidth, and a broadcast among its ranks

A step has one token of each of `max_batch_size` sequences, each at the context that was demanded. A sliding window
bounds what a layer reads. Kernels are taken to reach the bandwidth, and nothing to overlap: times compare layouts.
"""

from collections.abc import Sequence

from tpdist.plan.costs import context_tokens
from tpdist.plan.devices import default_inside
from tpdist.plan.memory import DTYPE_BYTES
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.placement import Demand, Device, Inventory, Link
from tpdist.plan.shards import Partition, Rows


def link_between(inventory: Inventory, left: Device, right: Device) -> Link:
    """What leads from one device to another."""
    if left.node == right.node:
        link = inventory.inside.get(left.node)
        return link or default_inside([each for each in inventory.devices if each.node == left.node])
    return (
        inventory.across.get((left.node, right.node))
        or inventory.across.get((right.node, left.node))
        or inventory.default_across
    )


def slowest_link(inventory: Inventory, devices: Sequence[Device]) -> Link | None:
    """The lowest bandwidth and the highest latency between any two of some devices; None for one device."""
    by_node: dict[str, list[Device]] = {}
    for device in devices:
        by_node.setdefault(device.node, []).append(device)
    firsts = [group[0] for group in by_node.values()]
    if not inventory.across:
        firsts = firsts[:2]  # all pairs have the same link
    links = [link_between(inventory, group[0], group[1]) for group in by_node.values() if len(group) > 1]
    links += [link_between(inventory, a, b) for index, a in enumerate(firsts) for b in firsts[index + 1 :]]
    if not links:
        return None
    return Link(bandwidth=min(link.bandwidth for link in links), latency_s=max(link.latency_s for link in links))


def all_reduce_s(num_bytes: float, *, size: int, link: Link | None) -> float:
    if link is None:
        return 0.0
    return link.latency_s + 2 * (size - 1) / size * num_bytes / link.bandwidth


def send_s(num_bytes: float, link: Link | None) -> float:
    return 0.0 if link is None else link.latency_s + num_bytes / link.bandwidth


def hidden_row_bytes(config: ModelConfig, demand: Demand) -> int:
    """The hidden states of a decode step."""
    return demand.max_batch_size * config.hidden_size * DTYPE_BYTES[demand.dtype]


def tokens_read(config: ModelConfig, demand: Demand) -> list[int]:
    """By layer, how many cached tokens a decode step reads, of all its sequences."""
    context = context_tokens(demand)
    return [demand.max_batch_size * min(context, layer.sliding_window or context) for layer in config.layers]


def layer_exchange_s(config: ModelConfig, demand: Demand, *, size: int, link: Link | None) -> float:
    """The two all-reduces of a layer."""
    return 2 * all_reduce_s(hidden_row_bytes(config, demand), size=size, link=link)


def first_exchange_s(config: ModelConfig, demand: Demand, *, size: int, link: Link | None) -> float:
    """The embedding's all-reduce."""
    return all_reduce_s(hidden_row_bytes(config, demand), size=size, link=link)


def last_exchange_s(config: ModelConfig, demand: Demand, partition: Partition, *, link: Link | None) -> float:
    """The gather of logits on the first rank, and the broadcast of the tokens."""
    own = Rows(config.vocab_size).intervals(partition.shares)[0].size
    gathered = demand.max_batch_size * (config.vocab_size - own) * DTYPE_BYTES[demand.dtype]
    return send_s(gathered, link) + send_s(8 * demand.max_batch_size, link)
