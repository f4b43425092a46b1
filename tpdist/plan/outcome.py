"""A fit as what is shown of it: the Placement that runs, and the Candidates that were weighed beside it."""

import math
from collections.abc import Sequence
from dataclasses import replace

from tpdist.plan import costs
from tpdist.plan.fitting import Fit, longest_context
from tpdist.plan.placement import Candidate, Device, DevicePlan, Method, Objective, Placement
from tpdist.plan.places import Need, usable_bytes
from tpdist.plan.shards import Interval


def placement(
    fit: Fit,
    *,
    method: Method,
    objective: Objective,
    unused: Sequence[Device] = (),
    rejected: Sequence[Candidate] = (),
    notes: Sequence[str] = (),
    advice: Sequence[str] = (),
) -> Placement:
    """What will run. `unused`: devices of a process that got no layers, which stand behind the others."""
    in_ranks = fit.layout.mode == "ranks"
    plans = [_device_plan(fit, need, rank if in_ranks else None) for rank, need in enumerate(fit.needs)]
    plans += [_idle(fit, device) for device in unused]
    longest = longest_context(fit)
    alone = longest if fit.demand.max_batch_size == 1 else _longest_sequence(fit)
    return Placement(
        architecture=fit.layout.model.config.architecture,
        method=method,
        objective=objective,
        demand=fit.demand,
        devices=tuple(plans),
        tp_size=_tp_size(fit),
        pp_size=len(fit.found.places),
        stage_layers=tuple(need.layers for need in fit.needs if need.tp_rank == 0),
        shares=tuple(fit.layout.places[place].partition.shares for place in fit.found.places),
        longest_context=longest,
        latency_s=fit.latency_s,
        slowest_stage_s=fit.slowest_stage_s,
        rejected=tuple(rejected),
        notes=(*_cut_context(fit), *notes),
        advice=tuple(advice),
        extra={
            "num_blocks": fit.num_blocks,
            "longest_sequence": alone,
        },
    )


def _cut_context(fit: Fit) -> tuple[str, ...]:
    """A sentence where the user asked for longer sequences than there can be."""
    demand = fit.demand
    if not costs.asks_too_much(demand):
        return ()
    architecture = fit.layout.model.config.architecture
    limit = "--max-model-len" if "max_model_len" in demand.fixed else f"what {architecture} supports"
    return (
        f"--max-seq-len {demand.max_seq_len} is more than {limit}: planned for {demand.max_model_len} tokens of one "
        "sequence",
    )


def _longest_sequence(fit: Fit) -> int:
    """Of one alone, whatever the batch that there must be room for."""
    return longest_context(replace(fit, demand=replace(fit.demand, max_batch_size=1)))


def candidate(fit: Fit, *, reason: str) -> Candidate:
    return Candidate(
        tp_size=_tp_size(fit),
        pp_size=len(fit.found.places),
        stage_layers=fit.found.counts,
        shortfall_bytes=fit.shortfall_bytes,
        latency_s=fit.latency_s,
        slowest_stage_s=fit.slowest_stage_s,
        reason=reason,
    )


def impossible(*, tp_size: int, pp_size: int, reason: str) -> Candidate:
    """A layout that the model cannot be cut to, whatever the memory."""
    return Candidate(
        tp_size=tp_size,
        pp_size=pp_size,
        stage_layers=(),
        shortfall_bytes=0,
        latency_s=math.inf,
        slowest_stage_s=math.inf,
        reason=reason,
    )


def _tp_size(fit: Fit) -> int:
    return fit.layout.places[fit.found.places[0]].partition.size


def _device_plan(fit: Fit, need: Need, rank: int | None) -> DevicePlan:
    return DevicePlan(
        device=need.device,
        rank=rank,
        stage=need.stage,
        tp_rank=need.tp_rank,
        layers=need.layers,
        holds_embedding=need.holds_embedding,
        holds_head=need.holds_head,
        usable_bytes=need.usable_bytes,
        weight_bytes=need.weight_bytes,
        kv_cache_bytes=fit.cache_bytes(need),
        activation_bytes=need.activation_bytes,
        communication_bytes=need.communication_bytes,
        overhead_bytes=need.overhead_bytes,
        tokens=fit.num_blocks * fit.demand.block_size,
    )


def _idle(fit: Fit, device: Device) -> DevicePlan:
    """A device behind the others, with no layer."""
    num_layers = fit.layout.model.num_layers
    return DevicePlan(
        device=device,
        rank=None,
        stage=len(fit.found.places),
        tp_rank=0,
        layers=Interval(num_layers, num_layers),
        holds_embedding=False,
        holds_head=False,
        usable_bytes=usable_bytes(device, fit.demand),
        weight_bytes=0,
        kv_cache_bytes=0,
        activation_bytes=0,
        communication_bytes=0,
        overhead_bytes=0,
        tokens=0,
    )
