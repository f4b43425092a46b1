"""From what the nodes are to what each of them runs: ranks, sizes, threads, addresses. Pure but for `local_interface`.

The head calls this once per epoch, before anything starts; whatever cannot work is refused here with all numbers.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpdist.control.messages import Assign, StageAssign
from tpdist.control.route import LOOPBACK, is_link_local, is_loopback, without_zone
from tpdist.control.state import Layout, NodeFacts
from tpdist.errors import JoinError, PlanError
from tpdist.plan.memory import DTYPE_BYTES, kv_bytes_per_token, weight_bytes
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.shards import Axis, Blocks, Partition, Rows, Weights, check_shardable, key_value_heads, query_heads
from tpdist.plan.stages import stages_of
from tpdist.plan.topology import Topology, local_world_sizes

ANY = "::"
ANY_IPV4 = "0.0.0.0"


def make_layout(
    nodes: Sequence[NodeFacts],
    *,
    config: ModelConfig,
    weights: Weights,
    settings: Mapping[str, Any],
    checkpoint_dtype: str,
    global_world_size: int | None,
    store_port: int,
    load_timeout_s: float,
    hang_timeout_s: float,
    local_interface: Callable[[str], str | None],
) -> Layout:
    """Assign ranks to `nodes` (head first). `settings` are the head's plan and engine settings, in which "auto" becomes
    what the devices and the checkpoint are; `local_interface` names the head's own network interface with an address.
    Raises PlanError or JoinError."""
    device = _device(nodes, settings["device"])
    dtype = checkpoint_dtype if settings["dtype"] == "auto" else settings["dtype"]
    sizes = node_sizes(nodes, device=device, global_world_size=global_world_size)
    tp_size, pp_size = parallel_sizes(sum(sizes), settings)
    partition = Partition.even(tp_size)
    check_shardable(config, partition)
    counts = settings.get("pipeline_layers") or tuple(
        config.num_hidden_layers // pp_size + (i < config.num_hidden_layers % pp_size) for i in range(pp_size)
    )
    stages = tuple(StageAssign(start=s.layers.start, stop=s.layers.stop, shares=partition.shares) for s in stages_of(counts, config.num_hidden_layers))
    head = _head_address(nodes, local_interface)
    threads = _threads(nodes, sizes)
    backend = _backend(nodes, sizes, device)
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    assigns = tuple(
        Assign(
            cluster_id="",
            epoch=0,
            node_index=index,
            first_rank=firsts[index],
            local_world_size=sizes[index],
            world_size=sum(sizes),
            tp_size=tp_size,
            stages=stages,
            backend=backend,
            threads=threads[index],
            interface=head.interface_for(node),
            head_host=head.host_for(node),
            bind_host=head.bind_host,
            load_timeout_s=load_timeout_s,
            hang_timeout_s=hang_timeout_s,
            store_port=store_port,
            max_model_len=max_model_len(config, settings["max_model_len"]),
            settings={**settings, "device": device, "dtype": dtype},
        )
        for index, node in enumerate(nodes)
    )
    topology = Topology(node_sizes=sizes, tp_size=tp_size, pp_size=pp_size)
    return Layout(assigns, _summary(config, weights, topology, partition, assigns[0]))


def node_sizes(nodes: Sequence[NodeFacts], *, device: str, global_world_size: int | None) -> tuple[int, ...]:
    """Ranks of each node: what its user set, else its CUDA devices, else its share of what is left."""
    requested = [
        node.register.local_world_size or (len(node.fingerprint.probe.devices) if device == "cuda" else None)
        for node in nodes
    ]
    if global_world_size is None:
        return tuple(size or 1 for size in requested)
    return local_world_sizes(requested, global_world_size)


def parallel_sizes(world_size: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """(tensor-parallel size, stages) for this many ranks."""
    pp_size: int = settings["pipeline_parallel_size"] or 1
    tp_size: int = settings["tensor_parallel_size"] or world_size // pp_size
    if tp_size * pp_size != world_size:
        raise JoinError(
            f"tensor_parallel_size={tp_size} times {pp_size} stages needs {tp_size * pp_size} ranks, "
            f"but the nodes have {world_size}; change --tensor-parallel-size or the nodes' LOCAL_WORLD_SIZE"
        )
    return tp_size, pp_size


def max_model_len(config: ModelConfig, asked: int | None) -> int:
    """Longest sequence: what was asked for, else what the model supports. Raises PlanError when it is too much."""
    longest = config.max_model_len
    if asked is not None and asked > longest:
        raise PlanError(
            f"--max-model-len {asked} is more than the {longest} tokens that {config.architecture} supports"
        )
    return asked or longest


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
    ranks = _ranks_by_machine(nodes, sizes)
    shared = any(len(node.fingerprint.probe.devices) < ranks[node.fingerprint.probe.host_id] for node in nodes)
    return "nccl" if device == "cuda" and not shared else "gloo"


def _ranks_by_machine(nodes: Sequence[NodeFacts], sizes: Sequence[int]) -> Counter[str]:
    ranks: Counter[str] = Counter()
    for node, size in zip(nodes, sizes, strict=True):
        ranks[node.fingerprint.probe.host_id] += size
    return ranks


def _threads(nodes: Sequence[NodeFacts], sizes: Sequence[int]) -> list[int]:
    """CPU threads of each rank on each node; nodes on one machine share its CPUs evenly."""
    ranks = _ranks_by_machine(nodes, sizes)
    probes = [node.fingerprint.probe for node in nodes]
    return [max(1, probe.num_cpus // ranks[probe.host_id]) for probe in probes]


@dataclass(frozen=True)
class _HeadAddress:
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


def _head_address(nodes: Sequence[NodeFacts], local_interface: Callable[[str], str | None]) -> _HeadAddress:
    """What the workers reach the head by. With workers on this machine only, loopback.

    Rank 0 listens on all addresses if workers come in by several, or by one that this machine does not have
    (translated on the way) or that means nothing without an interface (link-local).
    """
    reached = list(dict.fromkeys(without_zone(node.register.head_address) for node in nodes[1:]))
    remote = [address for address in reached if not is_loopback(address)]
    if not remote:
        host = reached[0] if reached else LOOPBACK
        return _HeadAddress(host, local_interface(host))
    interface = local_interface(remote[0])
    if len(remote) == 1 and interface is not None and not is_link_local(remote[0]):
        return _HeadAddress(remote[0], interface)
    return _HeadAddress(ANY if any(":" in address for address in remote) else ANY_IPV4, interface)


def _summary(
    config: ModelConfig, weights: Weights, topology: Topology, partition: Partition, assign: Assign
) -> dict[str, Any]:
    """The plan for people: /v1/cluster shows it. Bytes are what the plan expects, before anything is loaded."""
    dtype_bytes = DTYPE_BYTES[assign.settings["dtype"]]
    axes: dict[str, Axis] = {
        "attention_heads": query_heads(config),
        "key_value_heads": key_value_heads(config),
        "intermediate": Blocks(config.intermediate_size),
        "vocabulary": Rows(config.vocab_size),
    }
    return {
        "architecture": config.architecture,
        "world_size": sum(topology.node_sizes),
        "tensor_parallel_size": topology.tp_size,
        "pipeline_parallel_size": topology.pp_size,
        "device": assign.settings["device"],
        "backend": assign.backend,
        "dtype": assign.settings["dtype"],
        "max_model_len": assign.max_model_len,
        "ranks": [
            {
                "rank": place.rank,
                "node": place.node_index,
                "stage": place.stage,
                **{name: list(partition.interval(axis, place.tp_rank)) for name, axis in axes.items()},
                "weight_bytes": weight_bytes(weights, partition, place.tp_rank, dtype_bytes=dtype_bytes),
                "kv_bytes_per_token": kv_bytes_per_token(config, partition, place.tp_rank, dtype_bytes=dtype_bytes),
            }
            for place in topology.places
        ],
    }
