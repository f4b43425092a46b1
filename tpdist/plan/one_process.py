"""What placements over the devices of one process have in common: which devices there are in turn, as problems of
search, and how what was found is shown, weighed, or refused."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tpdist.errors import PlanError
from tpdist.plan import costs
from tpdist.plan.amounts import amount
from tpdist.plan.fitting import Fit, Problem
from tpdist.plan.memory import DEFAULT_CPU_CACHE_BYTES
from tpdist.plan.orders import is_too_large
from tpdist.plan.outcome import candidate, placement
from tpdist.plan.placement import Candidate, Demand, Device, Inventory, Method, Objective, Placement
from tpdist.plan.places import Layout, Place
from tpdist.plan.refusal import common_helps, refuse
from tpdist.plan.shards import Partition
from tpdist.plan.shrinking import shrunk, smallest
from tpdist.plan.sizes import Model

ONE = Partition.even(1)


@dataclass(frozen=True)
class Task:
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


def placed(
    task: Task,
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


def weighed(chosen: Fit, other: Fit | None, objective: Objective, name: str) -> list[Candidate]:
    if other is None or in_words(other) == in_words(chosen):
        return []
    if other.shortfall_bytes:
        worst = other.worst.device.name
        return [candidate(other, reason=f"{name}: does not fit: lacks {amount(other.shortfall_bytes)} on {worst}")]
    ratio = other.seconds(objective) / chosen.seconds(objective)
    speed = (
        f"slower by {ratio:.2f}x" if ratio > 1.005 else f"faster by {1 / ratio:.2f}x" if ratio < 0.995 else "as fast"
    )
    return [candidate(other, reason=f"{name}: {speed}: {in_words(other)}")]


def in_words(fit: Fit) -> str:
    return ", ".join(f"{need.layers.size} layers on {need.device.name}" for need in fit.needs)


def best(problems: Sequence[Problem], demand: Demand) -> Fit | None:
    """The placement that keeps most of the demand, and of those the one that is best for the objective."""
    made = [(problem, fit) for problem in problems if (fit := shrunk([problem], demand))]
    ranks = [(_lost(demand, fit.demand), fit.seconds(problem.objective)) for problem, fit in made]
    return made[ranks.index(min(ranks))][1] if made else None


def closest(problems: Sequence[Problem], demand: Demand) -> Fit:
    """The placement that fits, or of which the fullest device lacks least."""
    return min((problem.closest(demand) for problem in problems), key=lambda fit: fit.shortfall_bytes)


def _lost(before: Demand, after: Demand) -> tuple[int, int, int]:
    """How much shrank, what shrinks last first."""
    return (
        before.max_num_seqs - after.max_num_seqs,
        before.max_num_batched_tokens - after.max_num_batched_tokens,
        costs.context_tokens(before) - costs.context_tokens(after),
    )


def refusal(problems: Sequence[Problem], demand: Demand) -> PlanError:
    """Of the closest that any of `problems`, which have the same devices, comes to fitting."""

    def fits(changed: Demand) -> Demand | None:
        fit = best(problems, changed)
        return None if fit is None else fit.demand

    fit = closest(problems, smallest(demand))
    helps = list(common_helps(demand, fits))
    kinds = {place.devices[0].kind for place in problems[0].layout.places}
    if problems[0].fixed is not None and (other := best(_searched(problems), demand)):
        helps.append(f"another placement would fit: {in_words(other)}")
    if demand.kv_cache_memory_bytes is None and fits(replace(demand, kv_cache_memory_bytes=_cache_bytes(fit, demand))):
        helps.append(
            f"--kv-cache-memory-bytes {_cache_bytes(fit, demand)} would fit: without it the caches on the CPU "
            f"take a quarter of what is free, at most {amount(DEFAULT_CPU_CACHE_BYTES)}"
        )
    if "cpu" not in kinds:
        helps.append("a CPU among the devices would take the layers that do not fit")
    elif "disk" not in kinds:
        helps.append("--offload-folder FOLDER lets layers lie on the disk, which is slowest")
    return refuse(fit, before=demand, helps=helps)


def _cache_bytes(fit: Fit, demand: Demand) -> int:
    """Of the caches on all devices together, for what is demanded."""
    return costs.demanded_tokens(demand) * sum(need.token_bytes for need in fit.needs)


def _searched(problems: Sequence[Problem]) -> list[Problem]:
    """The same devices, with any cut of the layers."""
    return [replace(problem, fixed=None) for problem in problems]
