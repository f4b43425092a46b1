"""What a user is told when a model does not fit: what is missing where, what takes the room, and what would help."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tpdist.errors import PlanError
from tpdist.plan.amounts import amount, exact_amount
from tpdist.plan.costs import context_tokens, demanded_tokens
from tpdist.plan.fitting import Fit
from tpdist.plan.placement import Demand

FLAGS = {
    "max_model_len": "--max-model-len",
    "max_seq_len": "--max-seq-len",
    "max_batch_size": "--max-batch-size",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_num_seqs": "--max-num-seqs",
    "kv_cache_memory_bytes": "--kv-cache-memory-bytes",
}


def refuse(fit: Fit, *, before: Demand, helps: Sequence[str]) -> PlanError:
    """The error for a model of which `fit` is the closest it comes to fitting, after all that may shrink has."""
    lines = [
        f"the model does not fit: {_lacking(fit)}",
        f"  it needs {breakdown(fit)}",
        f"  for {demand_in_words(fit.demand)}{_already_shrunk(before, fit.demand)}",
        *(f"  - {each}" for each in helps),
    ]
    return PlanError("\n".join(lines))


def _lacking(fit: Fit) -> str:
    """What is missing where: room, or leave for the cache to take it."""
    worst, shortfall = fit.worst, exact_amount(fit.shortfall_bytes)
    where = f"{worst.device.name} on {worst.device.node}"
    cache = demanded_tokens(fit.demand) * worst.token_bytes
    if max(cache, fit.cache_bytes(worst)) > worst.room_bytes:
        return f"{where} lacks {shortfall} of the {exact_amount(worst.usable_bytes)} that may be used of it"
    asked = fit.demand.kv_cache_memory_bytes
    rule = "by default" if asked is None else f"with --kv-cache-memory-bytes {asked}"
    return (
        f"the KV cache of {where} may take {exact_amount(fit.worst_budget)} {rule}, which is {shortfall} less than it "
        f"needs; --kv-cache-memory-bytes {cache} or more would fit"
    )


def breakdown(fit: Fit) -> str:
    """What the worst device needs, part by part."""
    worst = fit.worst
    cache = max(fit.cache_bytes(worst), demanded_tokens(fit.demand) * worst.token_bytes)
    parts = (
        ("weights", worst.weight_bytes),
        ("KV cache", cache),
        ("activations", worst.activation_bytes),
        ("communication", worst.communication_bytes),
        ("overhead", worst.overhead_bytes),
    )
    layers = f"layers {worst.layers.start} to {worst.layers.stop - 1}"
    return f"{', '.join(f'{name} {amount(size)}' for name, size in parts)} ({layers}, {fit.demand.dtype})"


def demand_in_words(demand: Demand) -> str:
    sequences = "one sequence" if demand.max_batch_size == 1 else f"{demand.max_batch_size} sequences"
    return (
        f"{sequences} of {context_tokens(demand)} tokens, max_num_batched_tokens {demand.max_num_batched_tokens} and "
        f"max_num_seqs {demand.max_num_seqs}"
    )


def common_helps(demand: Demand, fits: Callable[[Demand], Demand | None]) -> Iterator[str]:
    """What would help on the same devices: each is tried. `fits` gives what is left of a demand that fits."""
    if demand.dtype == "float32" and fits(replace(demand, dtype="bfloat16")):
        yield "--dtype bfloat16 would fit"
    fixed = sorted(demand.fixed & FLAGS.keys(), key=list(FLAGS).index)
    if fixed and (left := fits(_without_limits(demand))):
        flags = ", ".join(FLAGS[name] for name in fixed)
        yield f"without {flags} it would fit with {demand_in_words(left)}"
    if demand.kv_cache_memory_bytes is not None and (left := fits(replace(demand, kv_cache_memory_bytes=None))):
        yield f"without --kv-cache-memory-bytes it would fit with {demand_in_words(left)}"
    if demand.gpu_memory_utilization < 0.98 and fits(replace(demand, gpu_memory_utilization=0.98)):
        yield "--gpu-memory-utilization 0.98 would fit, if nothing else uses the GPUs"


def _without_limits(demand: Demand) -> Demand:
    """As if the user had set none of the numbers that can shrink."""
    return replace(demand, fixed=frozenset(), max_batch_size=1, kv_cache_memory_bytes=None)


def _already_shrunk(before: Demand, after: Demand) -> str:
    if before == after:
        return ""
    return f" (shrunk from {demand_in_words(before)})"
