"""first_fit.py over the devices of one process, with the sizes that all its placements go by."""

from tpdist.errors import PlanError
from tpdist.plan import costs
from tpdist.plan.first_fit import first_fit
from tpdist.plan.fitting import Fit
from tpdist.plan.memory import DTYPE_BYTES
from tpdist.plan.one_process import ONE, Task
from tpdist.plan.placement import Demand
from tpdist.plan.places import usable_bytes
from tpdist.plan.refusal import demand_in_words


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
            costs.logits_bytes(config, ONE, 0, demand, kind="cuda"), task.model.extra.activation_bytes
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
    try:
        layers, _ = first_fit_layers(task, demand)
    except PlanError:
        return None
    return task.fixed(layers).closest(demand)
