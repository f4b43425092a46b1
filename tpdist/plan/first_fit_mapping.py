"""first_fit.py over the devices of one process, with the sizes that all its placements go by, and its own reserves:
of a GPU 9/10 of what is free may be used, and the CPU has no limit, since it can swap."""

from dataclasses import replace

from tpdist.errors import PlanError
from tpdist.plan import costs
from tpdist.plan.amounts import amount
from tpdist.plan.first_fit import first_fit
from tpdist.plan.fitting import Fit
from tpdist.plan.memory import DTYPE_BYTES
from tpdist.plan.one_process import ONE, Task
from tpdist.plan.placement import Demand, Device, Placement
from tpdist.plan.places import usable_bytes
from tpdist.plan.refusal import demand_in_words

UNLIMITED_BYTES = 2**60


def with_own_reserves(task: Task) -> Task:
    """The task with devices of which first-fit's reserves are what all placements leave."""
    devices = tuple(_with_own_reserve(device) for device in task.inventory.devices)
    return replace(task, inventory=replace(task.inventory, devices=devices))


def _with_own_reserve(device: Device) -> Device:
    if device.kind == "cuda":
        return replace(device, total_bytes=device.free_bytes)
    is_unlimited = device.kind == "cpu" and device.limit_bytes is None
    return replace(device, free_bytes=UNLIMITED_BYTES) if is_unlimited else device


def with_real_devices(placement: Placement, task: Task) -> Placement:
    """With the devices as they are, and a note where the CPU is to hold more than is free there."""
    plans = []
    for plan in placement.devices:
        device = next(device for device in task.devices if device.name == plan.device.name)
        plans.append(replace(plan, device=device, usable_bytes=min(plan.usable_bytes, device.free_bytes)))
    notes = [
        f"{plan.device.name} is to hold {amount(plan.used_bytes)}, and {amount(plan.usable_bytes)} are free: first-fit "
        f"sets it no limit, and the rest will be swapped"
        for plan in plans
        if plan.device.kind == "cpu" and plan.used_bytes > plan.usable_bytes
    ]
    return replace(placement, devices=tuple(plans), notes=(*placement.notes, *notes))


def first_fit_layers(task: Task, demand: Demand) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """What first_fit says, of the sizes that all placements here go by."""
    config, dtype_bytes = task.model.config, DTYPE_BYTES[demand.dtype]
    items = task.model.items(ONE, 0, demand.dtype)
    hidden = costs.hidden_bytes(config, demand)
    mapped = costs.forward_bytes(config, ONE, 0, demand)
    token_bytes = costs.kv_bytes_per_layer(config, ONE, 0, dtype_bytes=dtype_bytes)
    gpus = [device for device in task.devices if device.kind == "cuda"]
    ropes = int(costs.rope_bytes(config)[0, -1])
    made = first_fit(
        items.layers.tolist(),
        non_mapped_bytes=items.embedding
        + items.final_norm
        + (0 if items.tied else items.head)
        + task.model.extra.bytes,
        mapped_activation_bytes=mapped,
        non_mapped_activation_bytes=max(
            costs.logits_bytes(config, ONE, 0, demand, kind="cuda"), task.model.extra.peak_bytes(demand)
        ),
        kv_bytes_per_layer=costs.demanded_tokens(demand) * token_bytes,
        devices=[(device.name, device.free_bytes) for device in gpus],
        usable=[
            max(0, usable_bytes(device, demand) - costs.overhead_bytes(device.kind) - hidden - ropes) for device in gpus
        ],
        cpu=any(device.kind == "cpu" for device in task.devices),
        parameters=demand_in_words(demand),
    )
    return made.layers, made.warnings


def first_fit_candidate(task: Task, demand: Demand) -> Fit | None:
    task = with_own_reserves(task)
    try:
        layers, _ = first_fit_layers(task, demand)
    except PlanError:
        return None
    return task.fixed(layers).closest(demand)
