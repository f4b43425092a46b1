"""Placement of a model's layers over the devices of one process, which computes each layer where it lies.

    exact      the best contiguous cut over any order of the GPUs; the CPU, and then the disk, only if the GPUs cannot
               hold the model even when everything has shrunk that may (exact_mapping.py)
    first-fit  as many layers on each GPU in turn as it has room for, the rest on the CPU (first_fit.py)
    manual     as many layers on each device as the user says, the rest on the CPU

The embedding lies with the first layer. In exact placements final norm and output lie with the last layer or the first,
whichever is better; with first-fit, with the first; by hand, the user says. A device has activations if it has layers.
Layers on the disk are computed in the machine's memory, which holds their caches and a few of them at a time; they are
counted there, and shown with the disk.
"""

from collections.abc import Sequence

from tpdist.errors import PlanError
from tpdist.plan.advice import WORTH_SAYING
from tpdist.plan.exact_mapping import exact, fitting
from tpdist.plan.first_fit_mapping import first_fit_layers, with_own_reserves, with_real_devices
from tpdist.plan.fitting import Fit
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.one_process import Task, in_words, placed, refusal, weighed
from tpdist.plan.placement import Demand, Inventory, Method, Objective, Placement
from tpdist.plan.shards import Weights
from tpdist.plan.shrinking import shrink_notes, shrunk
from tpdist.plan.sizes import NOTHING_ELSE, Extra, Model


def plan_mapping(
    config: ModelConfig,
    weights: Weights,
    inventory: Inventory,
    demand: Demand,
    *,
    method: Method,
    device_layers: tuple[tuple[str, int], ...] | None = None,
    head_first: bool = True,
    objective: Objective = "latency",
    allow_disk: bool = False,
    extra: Extra = NOTHING_ELSE,
) -> Placement:
    """Place the layers over the devices of one process, by one of the methods above.

    device_layers: for `manual`, (device, number of layers) in the order of the layers; with head_first, final norm and
    output go with the first of them, and not with the last. allow_disk: whether layers may
    lie on the inventory's disk. extra: what else stays on the first device. Raises PlanError.
    """
    task = Task(Model(config, weights, extra), inventory, objective, allow_disk)
    if method == "exact":
        return exact(task, demand)
    if method == "manual":
        return _manual(task, demand, device_layers or (), head_first=head_first)
    assert method == "first-fit", f"method {method} is not one of one process"
    return _first_fit(task, demand)


def _manual(task: Task, demand: Demand, device_layers: Sequence[tuple[str, int]], *, head_first: bool) -> Placement:
    problem = task.fixed(_completed(task, device_layers), head_first=head_first)
    fit = shrunk([problem], demand)
    if fit is None:
        raise refusal([problem], demand)
    notes = shrink_notes(demand, fit, problem.closest(demand)) if fit.demand != demand else ()
    return _beside_exact(task, fit, method="manual", notes=notes)


def _first_fit(task: Task, demand: Demand) -> Placement:
    own = with_own_reserves(task)
    layers, warnings = first_fit_layers(own, demand)
    problem = own.fixed(layers)
    fit = shrunk([problem], demand)
    if fit is None:
        raise refusal([task.fixed(layers)], demand)
    notes = shrink_notes(demand, fit, problem.closest(demand)) if fit.demand != demand else ()
    return with_real_devices(_beside_exact(task, fit, method="first-fit", notes=(*warnings, *notes)), task)


def _beside_exact(task: Task, fit: Fit, *, method: Method, notes: Sequence[str]) -> Placement:
    """With the exact placement weighed, and recommended if it is enough faster."""
    best = next((found for tier in task.tiers if (found := fitting(task, tier, fit.demand))), None)
    rejected = weighed(fit, best, task.objective, "exact")
    advice: tuple[str, ...] = ()
    if best is not None and best.seconds(task.objective) * WORTH_SAYING < fit.seconds(task.objective):
        ratio = fit.seconds(task.objective) / best.seconds(task.objective)
        advice = (f"the exact placement would be {ratio:.2f}x as fast: {in_words(best)}",)
    return placed(task, fit, method=method, notes=notes, rejected=rejected, advice=advice)


def _why_not_there(name: str, names: Sequence[str]) -> str:
    """And what to do."""
    if name == "disk":
        return "layers may not lie on the disk: --offload-folder FOLDER allows it"
    listed = f"the devices are {', '.join(names)}" if names else "there are no devices"
    if name == "cpu":
        return (
            f"{listed}: name its memory too (cpu=64GiB in --devices, cpu in --max-memory), or place all on the others"
        )
    return f"{listed}: name one of them"


def _completed(task: Task, device_layers: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """With the layers that are left on the CPU. Raises PlanError for what the model or the devices do not have."""
    names, num_layers = [device.name for device in task.devices], task.model.num_layers
    for name, count in device_layers:
        if name not in names:
            raise PlanError(f"{count} of {num_layers} layers are to be on {name}, but {_why_not_there(name, names)}")
    given = [(name, count) for name, count in device_layers if count > 0]
    left = num_layers - sum(count for _, count in given)
    if left < 0 or len({name for name, _ in given}) < len(given):
        listed = ", ".join(f"{name}: {count}" for name, count in given)
        problem = "a device stands in it twice" if left >= 0 else f"the model has {num_layers} layers"
        raise PlanError(f"layers cannot be placed as {listed}: {problem}")
    if left == 0:
        return given
    cpu = next((device.name for device in task.devices if device.kind == "cpu"), None)
    if cpu is None or any(name == cpu for name, _ in given):
        raise PlanError(f"{left} of {num_layers} layers have no device: place all of them")
    return [*given, (cpu, left)]
