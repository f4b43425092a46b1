"""Placement of a model's layers over the devices of one process, which computes each layer where it lies.

    exact      the best contiguous cut over any order of the GPUs; the CPU, and then the disk, only if the GPUs cannot
               hold the model even when everything has shrunk that may (fitting.py)
    first-fit  as many layers on each GPU in turn as it has room for, the rest on the CPU (first_fit.py)
    manual     as many layers on each device as the user says, the rest on the CPU

In exact placements the embedding lies with the first layer, and final norm and output with the last; with first-fit,
all three lie with the first; by hand, the user says. A device has activations if it has layers. Layers on the disk are
computed in the machine's memory, which holds their caches and a few of them at a time; they are counted there, and
shown with the disk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tpdist.errors import PlanError
from tpdist.plan import costs
from tpdist.plan.advice import WORTH_SAYING
from tpdist.plan.amounts import amount
from tpdist.plan.first_fit import first_fit
from tpdist.plan.fitting import Fit, Problem
from tpdist.plan.memory import DEFAULT_CPU_CACHE_BYTES, DTYPE_BYTES
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.orders import is_too_large
from tpdist.plan.outcome import candidate, placement
from tpdist.plan.placement import Candidate, Demand, Device, Inventory, Method, Objective, Placement
from tpdist.plan.places import Layout, Place, usable_bytes
from tpdist.plan.refusal import common_helps, demand_in_words, refuse
from tpdist.plan.shards import Partition, Weights
from tpdist.plan.shrinking import shrink_notes, shrunk, smallest
from tpdist.plan.sizes import Extra, Model

ONE = Partition.even(1)


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
    first_extra_bytes: int = 0,
    first_extra_activation_bytes: int = 0,
) -> Placement:
    """Place the layers over the devices of one process, by one of the methods above.

    device_layers: for `manual`, (device, number of layers) in the order of the layers; with head_first, final norm and
    output go with the first of them, and not with the last. allow_disk: whether layers may
    lie on the inventory's disk. first_extra_bytes and first_extra_activation_bytes: of what else stays on the first
    device. Raises PlanError.
    """
    extra = Extra(bytes=first_extra_bytes, activation_bytes=first_extra_activation_bytes)
    task = _Task(Model(config, weights, extra), inventory, objective, allow_disk)
    if method == "exact":
        return _exact(task, demand)
    if method == "manual":
        return _manual(task, demand, device_layers or (), head_first=head_first)
    assert method == "first-fit", f"method {method} is not one of one process"
    return _first_fit(task, demand)


@dataclass(frozen=True)
class _Task:
    """What all placements of one call have in common."""

    model: Model
    inventory: Inventory
    objective: Objective
    allow_disk: bool

    @property
    def tiers(self) -> Iterator[tuple[Device, ...]]:
        """GPUs alone, then with the CPU, then with the disk: what is to be tried in turn."""
        devices: tuple[Device, ...] = ()
        for kind in ("cuda", "cpu", "disk") if self.allow_disk else ("cuda", "cpu"):
            more = tuple(device for device in self.inventory.devices if device.kind == kind)
            devices += more
            if more:
                yield devices

    @property
    def devices(self) -> tuple[Device, ...]:
        *_, devices = self.tiers
        return devices

    def problems(self, devices: Sequence[Device]) -> tuple[Problem, Problem]:
        """With the output beside the last layers, and beside the first."""
        return self.problem(devices), self.problem(devices, head_first=True)

    def problem(self, devices: Sequence[Device], *, head_first: bool = False) -> Problem:
        """Any order of the GPUs, or theirs if there are too many different ones."""
        kinds: dict[tuple[int, int, float], int] = {}
        gpus = [device for device in devices if device.kind == "cuda"]
        for device in gpus:
            kinds.setdefault((device.total_bytes, device.free_bytes, device.bandwidth), len(kinds))
        classes = [kinds[device.total_bytes, device.free_bytes, device.bandwidth] for device in gpus]
        num_last = len(devices) - len(gpus)
        classes += range(len(kinds), len(kinds) + num_last)
        return Problem(
            layout=self.layout(devices, head_first=head_first),
            objective=self.objective,
            classes=None if is_too_large(classes, num_last=num_last) else tuple(classes),
            num_last=num_last,
        )

    def layout(self, devices: Sequence[Device], *, head_first: bool = False) -> Layout:
        places = tuple(Place((device,), ONE) for device in devices)
        return Layout(model=self.model, inventory=self.inventory, places=places, mode="devices", head_first=head_first)

    def fixed(self, layers: Sequence[tuple[str, int]], *, head_first: bool = True) -> Problem:
        """The problem whose only cut is this one: (device, number of layers) in the order of the layers."""
        names = [device.name for device in self.devices]
        return Problem(
            layout=self.layout(self.devices, head_first=head_first),
            objective=self.objective,
            fixed=(tuple(names.index(name) for name, _ in layers), tuple(count for _, count in layers)),
        )


def _exact(task: _Task, demand: Demand) -> Placement:
    if not any(True for _ in task.tiers):
        raise PlanError("there is no device to place layers on; give at least one GPU or CPU")
    problems = [task.problem(devices) for devices in task.tiers]
    notes: tuple[str, ...] = ()
    tried = ((_best(task, devices, demand), problem) for devices, problem in zip(task.tiers, problems, strict=True))
    fit, problem = next((pair for pair in tried if pair[0] is not None), (None, problems[-1]))
    if fit is None:
        raise _refusal(problem, demand)
    if problem.classes is None:
        notes += (f"{len(problem.layout.places)} devices are too different to try all their orders: theirs was kept",)
    if fit.demand != demand:
        notes += shrink_notes(demand, fit, problem.closest(demand))
    if problem is not problems[0]:
        notes += (_spilled(fit, problems[0], demand),)
    advice = _keep_context(problems, fit, demand) if problem is problems[0] else ()
    rejected = _weighed(fit, _first_fit_candidate(task, fit.demand), task.objective, "first-fit")
    return _placed(task, fit, method="exact", notes=notes, rejected=rejected, advice=advice)


def _best(task: _Task, devices: Sequence[Device], demand: Demand) -> Fit | None:
    """The placement that keeps most of the demand, and of those the one that is best for the objective."""
    made = [fit for problem in task.problems(devices) if (fit := shrunk([problem], demand))]
    return min(made, key=lambda fit: (_lost(demand, fit.demand), fit.seconds(task.objective)), default=None)


def _fitting(task: _Task, devices: Sequence[Device], demand: Demand) -> Fit | None:
    """The best placement that keeps all of the demand."""
    made = [fit for problem in task.problems(devices) if (fit := problem.fit(demand))]
    return min(made, key=lambda fit: fit.seconds(task.objective), default=None)


def _lost(before: Demand, after: Demand) -> tuple[int, int, int]:
    """How much shrank, what shrinks last first."""
    return (
        before.max_num_seqs - after.max_num_seqs,
        before.max_num_batched_tokens - after.max_num_batched_tokens,
        costs.context_tokens(before) - costs.context_tokens(after),
    )


def _manual(task: _Task, demand: Demand, device_layers: Sequence[tuple[str, int]], *, head_first: bool) -> Placement:
    problem = task.fixed(_completed(task, device_layers), head_first=head_first)
    fit = shrunk([problem], demand)
    if fit is None:
        raise _refusal(problem, demand)
    notes = shrink_notes(demand, fit, problem.closest(demand)) if fit.demand != demand else ()
    return _beside_exact(task, fit, method="manual", notes=notes)


def _first_fit(task: _Task, demand: Demand) -> Placement:
    layers, warnings = _first_fit_layers(task, demand)
    problem = task.fixed(layers)
    fit = shrunk([problem], demand)
    if fit is None:
        raise _refusal(problem, demand)
    notes = shrink_notes(demand, fit, problem.closest(demand)) if fit.demand != demand else ()
    return _beside_exact(task, fit, method="first-fit", notes=(*warnings, *notes))


def _beside_exact(task: _Task, fit: Fit, *, method: Method, notes: Sequence[str]) -> Placement:
    """With the exact placement weighed, and recommended if it is enough faster."""
    exact = next((found for tier in task.tiers if (found := _fitting(task, tier, fit.demand))), None)
    rejected = _weighed(fit, exact, task.objective, "exact")
    advice: tuple[str, ...] = ()
    if exact is not None and exact.seconds(task.objective) * WORTH_SAYING < fit.seconds(task.objective):
        ratio = fit.seconds(task.objective) / exact.seconds(task.objective)
        advice = (f"the exact placement would be {ratio:.2f}x as fast: {_in_words(exact)}",)
    return _placed(task, fit, method=method, notes=notes, rejected=rejected, advice=advice)


def _placed(
    task: _Task,
    fit: Fit,
    *,
    method: Method,
    notes: Sequence[str],
    rejected: Sequence[Candidate],
    advice: Sequence[str],
) -> Placement:
    used = {need.device.name for need in fit.needs}
    return placement(
        fit,
        method=method,
        objective=task.objective,
        unused=[device for device in task.devices if device.name not in used],
        rejected=rejected,
        notes=notes,
        advice=advice,
    )


def _completed(task: _Task, device_layers: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """With the layers that are left on the CPU. Raises PlanError for what the model or the devices do not have."""
    names, num_layers = [device.name for device in task.devices], task.model.num_layers
    for name, _ in device_layers:
        if name not in names:
            raise PlanError(f"layers were placed on {name}, but there are only {', '.join(names) or 'no devices'}")
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


def _first_fit_layers(task: _Task, demand: Demand) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
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


def _first_fit_candidate(task: _Task, demand: Demand) -> Fit | None:
    try:
        layers, _ = _first_fit_layers(task, demand)
    except PlanError:
        return None
    return task.fixed(layers).closest(demand)


def _weighed(chosen: Fit, other: Fit | None, objective: Objective, name: str) -> list[Candidate]:
    if other is None or _in_words(other) == _in_words(chosen):
        return []
    if other.shortfall_bytes:
        worst = other.worst.device.name
        return [candidate(other, reason=f"{name}: does not fit: lacks {amount(other.shortfall_bytes)} on {worst}")]
    ratio = other.seconds(objective) / chosen.seconds(objective)
    speed = (
        f"slower by {ratio:.2f}x" if ratio > 1.005 else f"faster by {1 / ratio:.2f}x" if ratio < 0.995 else "as fast"
    )
    return [candidate(other, reason=f"{name}: {speed}: {_in_words(other)}")]


def _in_words(fit: Fit) -> str:
    return ", ".join(f"{need.layers.size} layers on {need.device.name}" for need in fit.needs)


def _spilled(fit: Fit, on_gpus: Problem, demand: Demand) -> str:
    lacking = on_gpus.closest(smallest(demand))
    spilled = [need for need in fit.needs if need.device.kind != "cuda"]
    where = " and ".join(
        f"{need.layers.size} of {lacking.layout.model.num_layers} layers are on {need.device.name}" for need in spilled
    )
    without = "on the GPUs alone" if lacking.worst.device.kind == "cuda" else "in memory alone"
    return (
        f"{where}, which is slower: {without} {lacking.worst.device.name} lacks at least "
        f"{amount(lacking.shortfall_bytes)}"
    )


def _keep_context(problems: Sequence[Problem], fit: Fit, demand: Demand) -> tuple[str, ...]:
    """Where the demand shrank to stay on the GPUs: what the CPU would keep of it."""
    if fit.demand == demand:
        return ()
    for problem in problems[1:]:
        if whole := problem.fit(demand):
            return (f"setting --max-seq-len {costs.context_tokens(demand)} would keep it, with {_in_words(whole)}",)
    return ()


def _refusal(problem: Problem, demand: Demand) -> PlanError:
    def fits(changed: Demand) -> Demand | None:
        fit = shrunk([problem], changed)
        return None if fit is None else fit.demand

    closest = problem.closest(smallest(demand))
    helps = list(common_helps(demand, fits))
    kinds = {place.devices[0].kind for place in problem.layout.places}
    if problem.fixed is not None and (other := shrunk([replace(problem, fixed=None)], demand)):
        helps.append(f"another placement would fit: {_in_words(other)}")
    if demand.kv_cache_memory_bytes is None and fits(
        replace(demand, kv_cache_memory_bytes=_cache_bytes(closest, demand))
    ):
        helps.append(
            f"--kv-cache-memory-bytes {_cache_bytes(closest, demand)} would fit: without it the caches on the CPU "
            f"take a quarter of what is free, at most {amount(DEFAULT_CPU_CACHE_BYTES)}"
        )
    if "cpu" not in kinds:
        helps.append("a CPU among the devices would take the layers that do not fit")
    elif "disk" not in kinds:
        helps.append("--offload-folder FOLDER lets layers lie on the disk, which is slowest")
    return refuse(closest, before=demand, helps=helps)


def _cache_bytes(fit: Fit, demand: Demand) -> int:
    """Of the caches on all devices together, for what is demanded."""
    return costs.demanded_tokens(demand) * sum(need.token_bytes for need in fit.needs)
