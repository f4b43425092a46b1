"""From what the nodes have and what their user asks for to a placement: what the planner is told, and what it answers.

`tpdist plan` and the head both go through here, so that what is shown is what runs. Pure.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from tpdist.control.devices import probed_devices, process_devices, rank_devices
from tpdist.control.state import NodeFacts, node_id
from tpdist.errors import DoesNotFitError, PlanError
from tpdist.plan.device_layers import parse_device_layers
from tpdist.plan.device_map import MappedLayers, mapped_layers
from tpdist.plan.inventory import make_inventory
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.placement import Demand, Device, Inventory, Objective, Placement
from tpdist.plan.planner import plan_mapping, plan_ranks
from tpdist.plan.shards import Weights
from tpdist.plan.sizes import NOTHING_ELSE, Extra

DEPRECATED = "--device-layers (-n) is deprecated: without it the layers are placed by what fits"


@dataclass(frozen=True, kw_only=True)
class OneProcess:
    """What was asked of the placement over the devices of one process: the settings of these names, and whether layers
    may lie on the disk."""

    placement: Literal["exact", "first-fit"]
    device_layers: str | None
    device_map: str | Mapping[str, int | str] | None
    max_memory: Mapping[str, int | None] | None
    disk: bool
    optimize: Objective | None = None


ALONE = OneProcess(placement="exact", device_layers=None, device_map=None, max_memory=None, disk=False)
"""What a single rank asks of the devices of its process when its own is too small, for the objective that was asked
for."""


def max_model_len(config: ModelConfig, asked: int | None) -> int:
    """Longest sequence: what was asked for, else what the model supports. Raises PlanError when it is too much."""
    longest = config.max_model_len
    if asked is not None and asked > longest:
        raise PlanError(
            f"--max-model-len {asked} is more than the {longest} tokens that {config.architecture} supports"
        )
    return asked or longest


def demand_of(config: ModelConfig, settings: Mapping[str, Any], *, dtype: str, explicit: Collection[str]) -> Demand:
    """What the plan and engine settings ask for. What is not `explicit` may shrink."""
    names = {field.name for field in fields(Demand)} - {"fixed"}
    asked: dict[str, Any] = {name: settings[name] for name in names}
    asked["dtype"] = dtype
    asked["max_model_len"] = max_model_len(config, settings["max_model_len"])
    return Demand(**asked, fixed=frozenset(names.intersection(explicit)))


def place(
    config: ModelConfig,
    weights: Weights,
    demand: Demand,
    settings: Mapping[str, Any],
    *,
    ranks: Inventory,
    process: Inventory | None,
    one_process: OneProcess | None,
    extra: Extra = NOTHING_ELSE,
) -> Placement:
    """Ranks on the devices of `ranks`, or what was asked of `one_process` over those of `process`. A single rank on a
    GPU that cannot hold the model has the other devices of its process too: then the layers go there as they would with
    MISTRALRS_NO_NCCL=1, and what helps if those do not suffice either is what is said. Raises SettingsError, PlanError
    or JoinError."""
    if one_process is not None:
        assert process is not None, "one process has devices"
        return place_layers(config, weights, process, demand, one_process, extra=extra)
    try:
        return place_ranks(config, weights, ranks, demand, settings, extra=extra)
    except DoesNotFitError as error:
        if process is None:
            raise
        refusal = error
    try:
        return place_layers(
            config, weights, process, demand, replace(ALONE, optimize=settings["optimize"]), extra=extra
        )
    except DoesNotFitError as error:
        # What one process would help with has just been tried.
        more_ranks = (each for each in refusal.helps if "MISTRALRS_NO_NCCL" not in each)
        helps = dict.fromkeys((*more_ranks, *error.helps))
        raise DoesNotFitError(error.message, helps=list(helps)) from error


def place_ranks(
    config: ModelConfig,
    weights: Weights,
    inventory: Inventory,
    demand: Demand,
    settings: Mapping[str, Any],
    *,
    extra: Extra = NOTHING_ELSE,
) -> Placement:
    """One rank on each device of `inventory`, as the plan settings say. Raises PlanError or JoinError."""
    shares, layers = settings["tensor_shares"], settings["pipeline_layers"]
    return plan_ranks(
        config,
        weights,
        inventory,
        demand,
        tp_size=settings["tensor_parallel_size"],
        pp_size=settings["pipeline_parallel_size"],
        shares=tuple(shares) if isinstance(shares, list | tuple) else shares,
        stage_layers=None if layers is None else tuple(layers),
        objective=settings["optimize"] or "throughput",
        extra=extra,
    )


def place_layers(
    config: ModelConfig,
    weights: Weights,
    inventory: Inventory,
    demand: Demand,
    asked: OneProcess,
    *,
    extra: Extra = NOTHING_ELSE,
) -> Placement:
    """The layers over the devices of one process. Raises SettingsError or PlanError."""
    mapped = _mapped(asked, inventory, num_layers=config.num_hidden_layers)
    placement = plan_mapping(
        config,
        weights,
        inventory,
        demand,
        method=mapped.method,
        device_layers=mapped.layers,
        head_first=mapped.head_first,
        objective=asked.optimize or "latency",
        allow_disk=asked.disk,
        extra=extra,
    )
    if asked.device_layers is not None:
        placement = replace(placement, notes=(DEPRECATED, *placement.notes))
    return placement


def _mapped(asked: OneProcess, inventory: Inventory, *, num_layers: int) -> MappedLayers:
    gpus = [device.name for device in inventory.devices if device.kind == "cuda"]
    if asked.device_layers is not None:
        layers = parse_device_layers(asked.device_layers, num_layers=num_layers, num_devices=len(gpus))
        return MappedLayers("manual", layers, head_first=True)
    if asked.device_map is not None:
        return mapped_layers(asked.device_map, num_layers=num_layers, gpus=gpus)
    return MappedLayers(asked.placement)


def item_devices(placement: Placement) -> tuple[str, ...]:
    """Where the embedding, each layer, and the output with the final norm lie, in this order."""
    embedding = next(each.device.name for each in placement.devices if each.holds_embedding)
    output = next(each.device.name for each in placement.devices if each.holds_head)
    layers = sorted((each.layers, each.device.name) for each in placement.devices if each.layers.size)
    return (embedding, *(name for interval, name in layers for _ in range(interval.size)), output)


def ranks_by_machine(nodes: Sequence[NodeFacts], sizes: Sequence[int]) -> Counter[str]:
    """By machine, the ranks of all nodes that stand on it."""
    ranks: Counter[str] = Counter()
    for node, size in zip(nodes, sizes, strict=True):
        ranks[node.fingerprint.probe.host_id] += size
    return ranks


def ranks_inventory(nodes: Sequence[NodeFacts], sizes: Sequence[int], *, device: str) -> Inventory:
    """A device for each rank, in their order. Nodes on one machine share its memory."""
    ranks = ranks_by_machine(nodes, sizes)
    devices: list[Device] = []
    for node, size in zip(nodes, sizes, strict=True):
        probe = node.fingerprint.probe
        found = probed_devices(probe, node=node_id(node.register.worker_id))
        own = [each for each in found if each.kind == device]
        devices += rank_devices(own, size, ranks_on_machine=ranks[probe.host_id])
    return make_inventory(devices)


def spare_inventory(nodes: Sequence[NodeFacts], sizes: Sequence[int], *, device: str) -> Inventory | None:
    """All devices of the process of a single rank, where those are more than its own GPU."""
    if sum(sizes) > 1 or device != "cuda":
        return None
    return process_inventory(nodes[0], device=device, asked=ALONE)


def process_inventory(node: NodeFacts, *, device: str, asked: OneProcess) -> Inventory:
    """All devices of one node's process, of which the GPUs count unless the ranks are to run on the CPU."""
    found = probed_devices(node.fingerprint.probe, node=node_id(node.register.worker_id))
    return make_inventory(
        process_devices(
            found,
            cpu_only=device == "cpu",
            disk=asked.disk,
            max_memory=asked.max_memory,
        )
    )
