"""From a model, devices and a demand to a placement, or to a refusal with all the numbers.

`plan_ranks` is for ranks in processes of their own: one on each device, in tensor-parallel groups that are stages.
`plan_mapping` (mapping.py) is for one process that has all the devices. Both are pure.

Of the layouts that the flags allow, plan_ranks takes the default and not the fastest: how many machines wait for each
other should not change because a figure did. What would be faster is weighed and said.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tpdist.errors import DoesNotFitError, PlanError
from tpdist.plan import layouts
from tpdist.plan.advice import advise, flags, reason_for, repeated_bytes, roomier
from tpdist.plan.amounts import amount
from tpdist.plan.fitting import Fit, Problem, first_that_fits
from tpdist.plan.mapping import plan_mapping
from tpdist.plan.memory import DTYPE_BYTES, weight_bytes
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.one_process import Task as ProcessTask
from tpdist.plan.one_process import least_cpu_bytes
from tpdist.plan.outcome import candidate, impossible, placement
from tpdist.plan.placement import Candidate, Demand, Device, Inventory, Objective, Placement
from tpdist.plan.places import Layout, Place, usable_bytes
from tpdist.plan.refusal import common_helps, flag_size, refuse
from tpdist.plan.shards import Partition, Weights
from tpdist.plan.shrinking import shrink_notes, shrunk, smallest
from tpdist.plan.sizes import NOTHING_ELSE, Extra, Model
from tpdist.plan.stages import stages_of

__all__ = ["plan_mapping", "plan_ranks"]

GivenShares = tuple[int, ...] | Literal["auto"] | None

MOST_DEVICES = 64
"""Up to so many devices are tried out when a user is told how many would do."""


def plan_ranks(
    config: ModelConfig,
    weights: Weights,
    inventory: Inventory,
    demand: Demand,
    *,
    tp_size: int | None,
    pp_size: int | None,
    shares: GivenShares,
    stage_layers: tuple[int, ...] | None,
    objective: Objective = "throughput",
    extra: Extra = NOTHING_ELSE,
) -> Placement:
    """Place a model on one rank for each device, in the order of `inventory`: on its GPUs, or on all if it has none.

    Sizes that are None are decided here (layouts.sizes). shares: how a stage's ranks divide its weights, evenly if
    None; `auto` is by their usable memory; else a number for each rank of a stage, or of all stages. stage_layers: by
    stage, else the best for `objective`. extra: what else stays on the first stage, on each of its ranks.
    Raises PlanError or JoinError.
    """
    devices = _rank_devices(inventory)
    sizes = {"--tensor-parallel-size": tp_size, "--pipeline-parallel-size": pp_size if stage_layers is None else None}
    if pp_size is None and stage_layers is not None:
        pp_size = len(stage_layers)
    tp_size, pp_size, notes = layouts.sizes(config, len(devices), tp_size=tp_size, pp_size=pp_size)
    given = tuple(flag for flag, size in sizes.items() if size not in (None, 1))
    task = _Task(Model(config, weights, extra), inventory, devices, shares, objective, given)
    problems = task.problems(tp_size, pp_size, demand, stage_layers=stage_layers)
    fit = shrunk(problems, demand)
    if fit is None:
        raise _refusal(task, problems, demand)
    others = list(task.others(tp_size, pp_size, fit.demand))
    if stage_layers is not None and (searched := first_that_fits(_searched(problems), fit.demand)):
        others += [searched] if searched.found.counts != fit.found.counts else []
    advice = advise([other for other in others if isinstance(other, Fit)], fit, objective)
    if fit.demand != demand:
        notes += shrink_notes(demand, fit, problems[-1].closest(demand))
        whole = [other for other in task.others(tp_size, pp_size, demand) if isinstance(other, Fit)]
        advice += roomier(whole, fit)
    return placement(
        fit,
        method="ranks",
        objective=objective,
        rejected=[_rejected(other, fit, objective) for other in others],
        notes=(*notes, *_notes(fit)),
        advice=advice,
    )


@dataclass(frozen=True)
class _Task:
    """What all layouts of one call have in common. `given_sizes`: the flags that were given and ask for several
    ranks."""

    model: Model
    inventory: Inventory
    devices: tuple[Device, ...]
    shares: GivenShares
    objective: Objective
    given_sizes: tuple[str, ...]

    def problems(
        self,
        tp_size: int,
        pp_size: int,
        demand: Demand,
        *,
        stage_layers: tuple[int, ...] | None = None,
        asked: bool = True,
    ) -> list[Problem]:
        """A problem for each of the shares that are to be tried in turn."""
        fixed = None
        if stage_layers is not None:
            fixed = (tuple(range(pp_size)), _checked(stage_layers, pp_size, self.model.num_layers))
        return [
            Problem(layout=self._layout(shares), objective=self.objective, fixed=fixed)
            for shares in self._shares(tp_size, pp_size, demand, asked=asked)
        ]

    def others(self, tp_size: int, pp_size: int, demand: Demand) -> Iterator[Fit | Candidate]:
        """All other layouts, with the best or the least bad cut."""
        for sizes in layouts.factorisations(len(self.devices)):
            if sizes == (tp_size, pp_size):
                continue
            reason = layouts.problem(self.model.config, *sizes)
            if reason is not None:
                yield impossible(tp_size=sizes[0], pp_size=sizes[1], reason=reason)
                continue
            problems = self.problems(*sizes, demand, asked=False)
            yield first_that_fits(problems, demand) or problems[-1].closest(demand)

    def _shares(self, tp_size: int, pp_size: int, demand: Demand, *, asked: bool) -> list[layouts.Shares]:
        if self.shares == "auto":
            return layouts.shares_by_memory(self.devices, demand, tp_size=tp_size)
        return [layouts.stage_shares(self.shares, tp_size=tp_size, pp_size=pp_size, asked=asked)]

    def shares_suit(self, other: Fit) -> bool:
        """Whether the shares that were given are for as many ranks as `other` has."""
        num_ranks = (len(other.layout.places[0].devices), len(self.devices))
        return not isinstance(self.shares, tuple) or len(self.shares) in num_ranks

    def _layout(self, shares: layouts.Shares) -> Layout:
        tp_size = len(shares[0])
        places = tuple(
            Place(self.devices[stage * tp_size : (stage + 1) * tp_size], Partition(each))
            for stage, each in enumerate(shares)
        )
        return Layout(model=self.model, inventory=self.inventory, places=places, mode="ranks")


def _rank_devices(inventory: Inventory) -> tuple[Device, ...]:
    gpus = tuple(device for device in inventory.devices if device.kind == "cuda")
    devices = gpus or tuple(device for device in inventory.devices if device.kind == "cpu")
    if not devices:
        raise PlanError("there is no device to place a rank on; give at least one GPU or CPU")
    return devices


def _checked(stage_layers: tuple[int, ...], pp_size: int, num_layers: int) -> tuple[int, ...]:
    if len(stage_layers) != pp_size:
        raise PlanError(
            f"layers of {len(stage_layers)} stages ({', '.join(map(str, stage_layers))}) were given, but there are "
            f"{pp_size} stages"
        )
    stages_of(stage_layers, num_layers)
    return stage_layers


def _searched(problems: Sequence[Problem]) -> list[Problem]:
    """The same layouts, with any cut of the layers."""
    return [replace(problem, fixed=None) for problem in problems]


def _rejected(other: Fit | Candidate, chosen: Fit, objective: Objective) -> Candidate:
    if isinstance(other, Candidate):
        return other
    return candidate(other, reason=reason_for(other, chosen, objective))


def _notes(fit: Fit) -> tuple[str, ...]:
    """What a layout costs that one would not expect."""
    more = repeated_bytes(fit)
    if not more:
        return ()
    config = fit.layout.model.config
    size = len(fit.layout.places[0].devices)
    return (
        f"{size} ranks and {config.num_key_value_heads} key-value heads: ranks repeat heads, which takes "
        f"{amount(more)} more for the demanded tokens",
    )


def _refusal(task: _Task, problems: Sequence[Problem], demand: Demand) -> DoesNotFitError:
    """Of the closest that the layout comes to fitting, with what would help."""
    closest = min((problem.closest(smallest(demand)) for problem in problems), key=lambda fit: fit.shortfall_bytes)
    return refuse(closest, before=demand, helps=list(_helps(task, problems, closest, demand)))


def _helps(task: _Task, problems: Sequence[Problem], closest: Fit, demand: Demand) -> Iterator[str]:
    def fits(changed: Demand) -> Demand | None:
        fit = shrunk(problems, changed)
        return None if fit is None else fit.demand

    if problems[0].fixed is not None and (fit := shrunk(_searched(problems), demand)):
        yield f"{', '.join(map(str, fit.found.counts))} layers on the stages would fit"
    size, stages = closest.layout.places[0].partition.size, len(closest.layout.places)
    layers = None if problems[0].fixed is None else problems[0].fixed[1]
    by_hand = () if layers is None else ("--pipeline-layers",)
    shares = () if task.shares is None else ("--tensor-shares",)
    if (
        len({(device.total_bytes, device.free_bytes) for device in task.devices}) > 1
        and task.shares != "auto"
        and size > 1
        and shrunk(replace(task, shares="auto").problems(size, stages, demand, stage_layers=layers), demand)
    ):
        yield "shares in proportion to the devices' memory (auto) would fit"
    least = smallest(demand)
    for other in task.others(size, stages, least):
        if isinstance(other, Fit) and not other.shortfall_bytes:
            yield f"{_without(by_hand if task.shares_suit(other) else by_hand + shares)}{flags(other)} would fit"
    yield from common_helps(demand, fits)
    yield _without(by_hand + shares) + _more_devices(task, closest, least)
    yield from (_without(task.given_sizes + by_hand + shares) + each for each in _on_the_cpu(task, least))


def _without(flags: Sequence[str]) -> str:
    """What was given and must be left out for what follows."""
    return f"without {', '.join(flags)}: " if flags else ""


def _on_the_cpu(task: _Task, demand: Demand) -> Iterator[str]:
    """What one process with all GPUs of a machine and its memory would do, which is tried."""
    if len({device.node for device in task.devices}) > 1 or task.devices[0].kind != "cuda":
        return
    inventory = replace(task.inventory, devices=task.devices)
    size = least_cpu_bytes(ProcessTask(task.model, inventory, task.objective, allow_disk=False), demand)
    if size is not None:
        yield (
            "MISTRALRS_NO_NCCL=1 places the layers that do not fit on the CPU, which is slower: "
            f"{flag_size(size)} of its memory would do"
        )


def _more_devices(task: _Task, closest: Fit, demand: Demand) -> str:
    """How many devices such as the fullest one would do."""
    device, have = closest.worst.device, len(task.devices)
    whole = weight_bytes(task.model.weights, Partition.even(1), 0, dtype_bytes=DTYPE_BYTES[demand.dtype])
    least = max(have + 1, -(-whole // max(1, usable_bytes(device, demand))))
    for count in range(least, MOST_DEVICES + 1):
        more = tuple(_another(device, number) for number in range(count))
        larger = replace(task, devices=more, inventory=replace(task.inventory, devices=more), shares=None)
        for tp_size, pp_size in layouts.factorisations(count):
            if layouts.problem(task.model.config, tp_size, pp_size) is None:
                fit = first_that_fits(larger.problems(tp_size, pp_size, demand), demand)
                if fit is not None:
                    return f"{count} devices such as {device.name} would fit: {flags(fit)}"
    return f"not even {MOST_DEVICES} devices such as {device.name} would fit"


def _another(device: Device, number: int) -> Device:
    """One more such GPU on its node, or one more such machine."""
    node = device.node if device.kind == "cuda" else f"{device.node}-{number}"
    return replace(device, name=f"{device.name}-{number}", node=node)
