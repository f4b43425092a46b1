"""What placements over the devices of one process have in common: which devices there are in turn, as problems of
search, and how what was found is shown, weighed, or refused."""

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from tpdist.errors import DoesNotFitError
from tpdist.plan import costs
from tpdist.plan.amounts import amount
from tpdist.plan.devices import disk_of
from tpdist.plan.fitting import Fit, Problem
from tpdist.plan.memory import DEFAULT_CPU_CACHE_BYTES
from tpdist.plan.orders import is_too_large
from tpdist.plan.outcome import candidate, placement
from tpdist.plan.placement import Candidate, Demand, Device, Inventory, Method, Objective, Placement
from tpdist.plan.places import Layout, Place
from tpdist.plan.refusal import asked_cache_bytes, common_helps, flag_size, refuse
from tpdist.plan.shards import Partition
from tpdist.plan.shrinking import shrunk, smallest
from tpdist.plan.sizes import Model

ONE = Partition.even(1)

CPU_SIZES = tuple(2**power for power in range(30, 43))
"""What is tried of a CPU's memory when a user is told how much of it would do."""


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
        kinds: dict[Hashable, int] = {}
        gpus = [device for device in devices if device.kind == "cuda"]
        for device in gpus:
            kinds.setdefault(_kind(device), len(kinds))
        classes = [kinds[_kind(device)] for device in gpus]
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


def _kind(device: Device) -> Hashable:
    """What makes two GPUs the same to a placement."""
    return device.total_bytes, device.free_bytes, device.bandwidth, device.limit_bytes


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


def refusal(problems: Sequence[Problem], demand: Demand) -> DoesNotFitError:
    """Of the closest that any of `problems`, which have the same devices, comes to fitting."""

    def fits(changed: Demand) -> Demand | None:
        fit = best(problems, changed)
        return None if fit is None else fit.demand

    fit = closest(problems, smallest(demand))
    helps = list(common_helps(demand, fits))
    cache = asked_cache_bytes(fit, demand)
    if demand.kv_cache_memory_bytes is None and fits(replace(demand, kv_cache_memory_bytes=cache)):
        helps.append(
            f"--kv-cache-memory-bytes {cache} would fit: without it the caches on the CPU take a quarter of what is "
            f"free, at most {amount(DEFAULT_CPU_CACHE_BYTES)}"
        )
    return refuse(fit, before=demand, helps=[*helps, *_with_more(problems[0], demand)])


def _with_more(problem: Problem, demand: Demand) -> Iterator[str]:
    """What would help beside smaller numbers: leave for any cut, the limits of GPUs lifted, more memory, or the disk.
    Each is tried."""
    layout, given = problem.layout, ""
    kinds = {place.devices[0].kind for place in layout.places}
    task = Task(layout.model, layout.inventory, problem.objective, allow_disk="disk" in kinds)
    if problem.fixed is not None:
        given = "without --device-layers (-n), --device-map or --placement first-fit "
        if fit := best(task.problems(task.devices), demand):
            yield f"{given}it would fit: {in_words(fit)}"
            return
    limited = any(device.limit_bytes is not None for device in task.devices)
    if limited and _fits(_with(task, [_unlimited(device) for device in task.devices]), demand):
        yield f"{given}--max-memory that allows the GPUs more would fit"
    if (size := least_cpu_bytes(task, demand)) is not None:
        where = "cpu={} in --max-memory" if limited else "a CPU with {} among the devices"
        yield f"{given}{where.format(flag_size(size))} would take the layers that do not fit"
    if "disk" not in kinds and "cpu" in kinds and _fits(_with_disk(task), demand):
        yield f"{given}--offload-folder FOLDER would fit: it lets layers lie on the disk, which is slowest"


def least_cpu_bytes(task: Task, demand: Demand) -> int | None:
    """The least of CPU_SIZES that would hold what the other devices cannot; None if none does."""
    have = max((device.free_bytes for device in task.devices if device.kind == "cpu"), default=0)
    sizes = [size for size in CPU_SIZES if size > have]
    if not sizes or not _fits(_with_cpu(task, sizes[-1]), demand):
        return None
    first = bisect_left(sizes, True, key=lambda size: _fits(_with_cpu(task, size), demand))
    return int(sizes[first])


def _fits(task: Task, demand: Demand) -> bool:
    """Whether a placement does when all has shrunk that may."""
    least = smallest(demand)
    return any(problem.fit(least) is not None for problem in task.problems(task.devices))


def _with(task: Task, devices: Sequence[Device]) -> Task:
    return replace(task, inventory=replace(task.inventory, devices=tuple(devices)))


def _unlimited(device: Device) -> Device:
    return replace(device, limit_bytes=None) if device.kind == "cuda" else device


def _with_cpu(task: Task, size: int) -> Task:
    cpu = replace(task.devices[0], name="cpu", kind="cpu", total_bytes=size, free_bytes=size, limit_bytes=None)
    return _with(task, [*(device for device in task.devices if device.kind != "cpu"), cpu])


def _with_disk(task: Task) -> Task:
    return replace(_with(task, [*task.devices, disk_of(task.devices[0].node)]), allow_disk=True)
