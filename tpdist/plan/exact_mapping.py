"""The exact placement over the devices of one process: the best contiguous cut over any order of the GPUs.

The CPU, and then the disk, only if the GPUs cannot hold the model even when everything has shrunk that may. The
embedding lies with the first layer; final norm and output with the last one or the first, whichever keeps more of the
demand, and of equals whichever is better for the objective.
"""

from collections.abc import Sequence

from tpdist.errors import PlanError
from tpdist.plan import costs
from tpdist.plan.amounts import amount
from tpdist.plan.first_fit_mapping import first_fit_candidate
from tpdist.plan.fitting import Fit, Problem
from tpdist.plan.one_process import Task, best, closest, in_words, placed, refusal, weighed
from tpdist.plan.placement import Demand, Device, Placement
from tpdist.plan.shrinking import shrink_notes, smallest


def exact(task: Task, demand: Demand) -> Placement:
    if not any(True for _ in task.tiers):
        raise PlanError("there is no device to place layers on; give at least one GPU or CPU")
    tiers = [task.problems(devices) for devices in task.tiers]
    notes: tuple[str, ...] = ()
    tried = ((best(problems, demand), problems) for problems in tiers)
    fit, problems = next((pair for pair in tried if pair[0] is not None), (None, tiers[-1]))
    if fit is None:
        raise refusal(problems, demand)
    if problems[0].classes is None:
        num_devices = len(fit.layout.places)
        notes += (f"{num_devices} devices are too different to try all their orders: theirs was kept",)
    if fit.demand != demand:
        notes += shrink_notes(demand, fit, closest(problems, demand))
    if problems is not tiers[0]:
        notes += (_spilled(fit, tiers[0], demand),)
    advice = _keep_context(task, fit, demand) if problems is tiers[0] else ()
    rejected = weighed(fit, first_fit_candidate(task, fit.demand), task.objective, "first-fit")
    return placed(task, fit, method="exact", notes=notes, rejected=rejected, advice=advice)


def fitting(task: Task, devices: Sequence[Device], demand: Demand) -> Fit | None:
    """The best placement that keeps all of the demand."""
    made = [fit for problem in task.problems(devices) if (fit := problem.fit(demand))]
    return min(made, key=lambda fit: fit.seconds(task.objective), default=None)


def _spilled(fit: Fit, on_gpus: Sequence[Problem], demand: Demand) -> str:
    lacking = closest(on_gpus, smallest(demand))
    spilled = [need for need in fit.needs if need.device.kind != "cuda"]
    where = " and ".join(
        f"{need.layers.size} of {lacking.layout.model.num_layers} layers are on {need.device.name}" for need in spilled
    )
    without = "on the GPUs alone" if lacking.worst.device.kind == "cuda" else "in memory alone"
    return (
        f"{where}, which is slower: {without} {lacking.worst.device.name} lacks at least "
        f"{amount(lacking.shortfall_bytes)}"
    )


def _keep_context(task: Task, fit: Fit, demand: Demand) -> tuple[str, ...]:
    """Where the demand shrank to stay on the GPUs: what the CPU would keep of it."""
    if fit.demand == demand:
        return ()
    for devices in list(task.tiers)[1:]:
        if whole := fitting(task, devices, demand):
            return (f"setting --max-seq-len {costs.context_tokens(demand)} would keep it, with {in_words(whole)}",)
    return ()
