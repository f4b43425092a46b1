"""From what the nodes are to what each of them runs: ranks, sizes, threads, addresses. Pure but for `local_interface`.

The head calls this once per epoch, before anything starts; whatever cannot work is refused here with all numbers.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tpdist.control.messages import Assign, StageAssign
from tpdist.control.placing import (
    OneProcess,
    demand_of,
    item_devices,
    place,
    process_inventory,
    ranks_by_machine,
    ranks_inventory,
    spare_inventory,
)
from tpdist.control.route import LOOPBACK, is_link_local, is_loopback, without_zone
from tpdist.control.state import Layout, NodeFacts
from tpdist.errors import PlanError
from tpdist.plan.memory import DTYPE_BYTES, is_planned, kv_bytes_per_token
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.placement import Placement
from tpdist.plan.shards import Axis, Blocks, Partition, Rows, Weights, key_value_heads, query_heads
from tpdist.plan.topology import RankPlace, Topology, local_world_sizes

SHRINKING = ("max_num_seqs", "max_num_batched_tokens")
ANY = "::"
ANY_IPV4 = "0.0.0.0"


def make_layout(
    nodes: Sequence[NodeFacts],
    *,
    config: ModelConfig,
    weights: Weights,
    settings: Mapping[str, Any],
    explicit: Collection[str],
    one_process: OneProcess | None,
    checkpoint_dtype: str,
    global_world_size: int | None,
    store_port: int,
    load_timeout_s: float,
    collective_timeout_s: float,
    local_interface: Callable[[str], str | None],
) -> Layout:
    """Assign ranks to `nodes` (head first). `settings` are the head's plan and engine settings, in which "auto" becomes
    what the devices and the checkpoint are; those that are not `explicit` may shrink to fit. `local_interface` names
    the head's own network interface with an address. Raises PlanError or JoinError."""
    device = _device(nodes, settings["device"])
    dtype = checkpoint_dtype if settings["dtype"] == "auto" else settings["dtype"]
    stages = settings["pipeline_parallel_size"] or 1
    sizes = node_sizes(nodes, device=device, global_world_size=global_world_size, stages=stages)
    demand = demand_of(config, settings, dtype=dtype, explicit=explicit)
    asked = one_process and process_inventory(nodes[0], device=device, asked=one_process)
    placement = place(
        config,
        weights,
        demand,
        settings,
        ranks=ranks_inventory(nodes, sizes, device=device),
        process=asked or spare_inventory(nodes, sizes, device=device),
        one_process=one_process,
    )
    shrunk = {name: getattr(placement.demand, name) for name in SHRINKING}
    common = {**settings, **shrunk, "device": device, "dtype": dtype}
    first_ranks = [0, *accumulate(sizes)]
    head = head_address(nodes, local_interface)
    threads = _threads(nodes, sizes)
    stages_of_all, backend = _stages(config, placement), _backend(nodes, sizes, device)
    devices_of_items = () if placement.method == "ranks" else item_devices(placement)
    assigns = tuple(
        Assign(
            cluster_id="",
            epoch=0,
            node_index=index,
            first_rank=first_ranks[index],
            local_world_size=sizes[index],
            world_size=first_ranks[-1],
            tp_size=placement.tp_size,
            stages=stages_of_all,
            item_devices=devices_of_items,
            most_blocks=placement.extra["num_blocks"],
            own_reserves=placement.method == "first-fit",
            backend=backend,
            threads=threads[index],
            interface=head.interface_for(node),
            head_host=head.host_for(node),
            bind_host=head.bind_host,
            load_timeout_s=load_timeout_s,
            collective_timeout_s=collective_timeout_s,
            store_port=store_port,
            max_model_len=_longest_sequence(placement, device=device),
            settings=common,
        )
        for index, node in enumerate(nodes)
    )
    return Layout(assigns, _summary(config, sizes, placement, assigns[0]), placement)


def _longest_sequence(placement: Placement, *, device: str) -> int:
    """Tokens of the longest sequence that is taken. What a longer one gathers for attention has no room where the cache
    is the plan's. CPU ranks have the memory that they find."""
    most = placement.demand.max_model_len
    planned = is_planned(device=device, one_process=placement.method != "ranks")
    return min(most, placement.extra["longest_sequence"]) if planned else most


def _stages(config: ModelConfig, placement: Placement) -> tuple[StageAssign, ...]:
    """One process is one stage, whatever its devices."""
    if placement.method != "ranks":
        return (StageAssign(start=0, stop=config.num_hidden_layers, shares=(1,)),)
    pairs = zip(placement.stage_layers, placement.shares, strict=True)
    return tuple(StageAssign(start=layers.start, stop=layers.stop, shares=shares) for layers, shares in pairs)


def node_sizes(
    nodes: Sequence[NodeFacts], *, device: str, global_world_size: int | None, stages: int = 1
) -> tuple[int, ...]:
    """Ranks of each node: what its user set, else its CUDA devices, else its share of what is left, which on a single
    node without a GPU is one rank for each of the `stages`."""
    requested = [
        node.register.local_world_size or (len(node.fingerprint.probe.devices) if device == "cuda" else None)
        for node in nodes
    ]
    if global_world_size is None:
        return tuple(size or stages for size in requested)
    return local_world_sizes(requested, global_world_size)


def _device(nodes: Sequence[NodeFacts], asked: str) -> str:
    """One kind for all ranks: a process group cannot mix them."""
    kinds = {node.fingerprint.probe.devices[0].kind if node.fingerprint.probe.devices else "cpu" for node in nodes}
    if asked == "cuda" and kinds != {"cuda"}:
        raise PlanError(f"--device cuda was asked for, but the nodes have {', '.join(sorted(kinds))}")
    if asked == "auto":
        return "cuda" if kinds == {"cuda"} else "cpu"
    return asked


def _backend(nodes: Sequence[NodeFacts], sizes: Sequence[int], device: str) -> str:
    """NCCL needs a GPU for each rank; ranks that share one, and CPUs, use gloo.

    Nodes on one machine are taken to see the same GPUs: if theirs are different ones, gloo is slow but right.
    """
    ranks = ranks_by_machine(nodes, sizes)
    shared = any(len(node.fingerprint.probe.devices) < ranks[node.fingerprint.probe.host_id] for node in nodes)
    return "nccl" if device == "cuda" and not shared else "gloo"


def _threads(nodes: Sequence[NodeFacts], sizes: Sequence[int]) -> list[int]:
    """CPU threads of each rank on each node; nodes on one machine share its CPUs evenly."""
    ranks = ranks_by_machine(nodes, sizes)
    probes = [node.fingerprint.probe for node in nodes]
    return [max(1, probe.num_cpus // ranks[probe.host_id]) for probe in probes]


@dataclass(frozen=True)
class HeadAddress:
    """Where rank 0 listens: the address, and the head's interface for collectives."""

    bind_host: str
    interface: str | None

    def host_for(self, node: NodeFacts) -> str:
        """How a node reaches the head. Over loopback it is the head's machine, and any address of the head will do."""
        if not is_loopback(node.register.head_address):
            return node.register.head_address
        return LOOPBACK if self.bind_host in (ANY_IPV4, ANY) else self.bind_host

    def interface_for(self, node: NodeFacts) -> str | None:
        """What a node's ranks use for collectives. On the head's machine that is the head's way to the others, even
        if the node itself came in over loopback."""
        return self.interface if is_loopback(node.register.head_address) else node.register.interface


def head_address(nodes: Sequence[NodeFacts], local_interface: Callable[[str], str | None]) -> HeadAddress:
    """What the workers reach the head by. With workers on this machine only, loopback.

    Rank 0 listens on all addresses if workers come in by several, or by one that this machine does not have
    (translated on the way) or that means nothing without an interface (link-local).
    """
    reached = list(dict.fromkeys(without_zone(node.register.head_address) for node in nodes[1:]))
    remote = [address for address in reached if not is_loopback(address)]
    if not remote:
        host = reached[0] if reached else LOOPBACK
        return HeadAddress(host, local_interface(host))
    interface = local_interface(remote[0])
    if len(remote) == 1 and interface is not None and not is_link_local(remote[0]):
        return HeadAddress(remote[0], interface)
    return HeadAddress(ANY if any(":" in address for address in remote) else ANY_IPV4, interface)


def _summary(config: ModelConfig, sizes: tuple[int, ...], placement: Placement, assign: Assign) -> dict[str, Any]:
    """The plan for people: /v1/cluster shows it. Bytes are what the plan expects, before anything is loaded. What was
    weighed against it is left to `tpdist plan`."""
    topology = Topology(node_sizes=sizes, tp_size=assign.tp_size, pp_size=len(assign.stages))
    shown = placement.as_dict()
    del shown["rejected"]
    weight_bytes: Counter[int | None] = Counter()
    for each in placement.devices:
        weight_bytes[each.rank] += each.weight_bytes
    return {
        **shown,
        "world_size": assign.world_size,
        "tensor_parallel_size": topology.tp_size,
        "pipeline_parallel_size": topology.pp_size,
        "device": assign.settings["device"],
        "backend": assign.backend,
        "dtype": assign.settings["dtype"],
        "max_model_len": assign.max_model_len,
        "ranks": [
            _rank_summary(config, assign, place, weight_bytes=weight_bytes[place.rank] + weight_bytes[None])
            for place in topology.places
        ],
    }


def _rank_summary(config: ModelConfig, assign: Assign, place: RankPlace, *, weight_bytes: int) -> dict[str, Any]:
    """What one rank holds. In one process the devices are all of rank 0."""
    axes: dict[str, Axis] = {
        "attention_heads": query_heads(config),
        "key_value_heads": key_value_heads(config),
        "intermediate": Blocks(config.intermediate_size),
        "vocabulary": Rows(config.vocab_size),
    }
    stage = assign.stages[place.stage]
    partition = Partition(stage.shares)
    token_bytes = kv_bytes_per_token(
        config, partition, place.tp_rank, dtype_bytes=DTYPE_BYTES[assign.settings["dtype"]]
    )
    return {
        "rank": place.rank,
        "node": place.node_index,
        "stage": place.stage,
        "layers": [stage.start, stage.stop],
        **{name: list(partition.interval(axis, place.tp_rank)) for name, axis in axes.items()},
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": token_bytes * (stage.stop - stage.start) // config.num_hidden_layers,
    }
