"""Placements by hand, for tests of what shows them."""

from typing import Any

from tpdist.cli.plan_model import ModelFacts
from tpdist.plan.inventory import parse_devices
from tpdist.plan.placement import Candidate, Demand, Device, DevicePlan, Inventory, Link, Placement
from tpdist.plan.shards import Interval

GIB = 1024**3


def facts_of_70b(**changes: Any) -> ModelFacts:
    fields: dict[str, Any] = {
        "name": "big",
        "architecture": "LlamaForCausalLM",
        "num_parameters": 70_553_706_496,
        "checkpoint_bytes": 141_107_412_992,
        "dtype": "bfloat16",
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_model_len": 131072,
    }
    return ModelFacts(**{**fields, **changes})


def two_nodes(names: tuple[str, str] = ("alpha", "beta")) -> Inventory:
    """Four large GPUs and two small ones."""
    first, second = parse_devices("4x80GiB").devices, parse_devices("48GiB,24GiB").devices
    link = Link(bandwidth=12.5e9, latency_s=30e-6)
    return Inventory(
        devices=tuple(_moved(device, names[0]) for device in first)
        + tuple(_moved(device, names[1]) for device in second),
        inside={name: Link(bandwidth=300e9, latency_s=10e-6) for name in names},
        across={names: link},
        default_across=link,
    )


def _moved(device: Device, node: str) -> Device:
    return Device(
        name=device.name,
        kind=device.kind,
        node=node,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        bandwidth=device.bandwidth,
    )


def device_plan(device: Device, **changes: Any) -> DevicePlan:
    """Nine tenths of the device in use: a half weights, a quarter KV cache."""
    total = device.total_bytes
    fields: dict[str, Any] = {
        "device": device,
        "rank": 0,
        "stage": 0,
        "tp_rank": 0,
        "layers": Interval(0, 80),
        "holds_embedding": True,
        "holds_head": True,
        "usable_bytes": total * 9 // 10,
        "weight_bytes": total // 2,
        "kv_cache_bytes": total // 4,
        "activation_bytes": total // 20,
        "communication_bytes": total // 40,
        "overhead_bytes": total // 40,
        "tokens": 200_000,
    }
    return DevicePlan(**{**fields, **changes})


def two_stages(inventory: Inventory, **changes: Any) -> Placement:
    """Four ranks with 52 layers on the first node, two unequal ones with 28 on the second."""
    plans = [
        device_plan(
            device,
            rank=rank,
            stage=0 if rank < 4 else 1,
            tp_rank=rank % 4,
            layers=Interval(0, 52) if rank < 4 else Interval(52, 80),
            holds_embedding=rank < 4,
            holds_head=rank >= 4,
        )
        for rank, device in enumerate(inventory.devices)
    ]
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "method": "ranks",
        "objective": "throughput",
        "demand": Demand(dtype="bfloat16", max_model_len=131072),
        "devices": tuple(plans),
        "tp_size": 4,
        "pp_size": 2,
        "stage_layers": (Interval(0, 52), Interval(52, 80)),
        "shares": ((1, 1, 1, 1), (2, 1)),
        "longest_context": 100_000,
        "latency_s": 0.0241,
        "slowest_stage_s": 0.0131,
        "rejected": tuple(rejected(index) for index in range(7)),
        "notes": ("the KV cache was shrunk",),
        "advice": ("a faster link would help",),
    }
    return Placement(**{**fields, **changes})


def rejected(index: int) -> Candidate:
    return Candidate(
        tp_size=2,
        pp_size=3,
        stage_layers=(26, 27, 27),
        shortfall_bytes=index * GIB,
        latency_s=0.03,
        slowest_stage_s=0.01,
        reason=f"reason {index}",
    )


def one_process(text: str = "2x24GiB,cpu=64GiB") -> tuple[Inventory, Placement]:
    """Layers on two GPUs and in the machine's memory; the disk holds none."""
    inventory = parse_devices(text)
    bounds = (Interval(0, 30), Interval(30, 60), Interval(60, 80))
    plans = [
        device_plan(
            device,
            rank=None,
            stage=stage,
            layers=bounds[stage],
            holds_embedding=stage == 0,
            holds_head=stage == 2,
        )
        for stage, device in enumerate(inventory.devices)
    ]
    disk = Device(name="disk", kind="disk", node="node0", total_bytes=GIB, free_bytes=GIB, bandwidth=2e9)
    empty = dict.fromkeys(("weight_bytes", "kv_cache_bytes", "activation_bytes"), 0)
    idle = device_plan(disk, rank=None, stage=3, layers=Interval(80, 80), **empty)
    placement = two_stages(
        inventory,
        method="exact",
        devices=(*plans, idle),
        tp_size=1,
        pp_size=3,
        stage_layers=bounds,
        shares=((1,), (1,), (1,)),
    )
    return inventory, placement
